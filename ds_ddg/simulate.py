"""Replay of all stages of a plan under a cost model: does it run, how fast, and what does it keep in memory?

`replay` knows a plan only by its operations in order, ``Plan.batches``, and its one dependency rule, ``Plan.needs``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from .plan import BACKWARD, FORWARD, UPDATE, Op, Plan
from .timeline import Event, Timeline

__all__ = ["Cost", "Deadlock", "replay"]


class Deadlock(RuntimeError):  # noqa: N818 (a finding, as much as an error)
    """No stage can go on; the message says, per stage, what comes next and what it waits for."""


@dataclass(frozen=True)
class Cost:
    """What operations and links cost, in any one unit of time. ValueError if a cost is negative or not finite."""

    forward: float = 1.0
    backward: float = 2.0
    update: float = 0.0
    link: float = 0.0
    """Latency of one hop: it passes while the link already carries the next message."""
    num_bytes: float = 0.0
    """Size of the activation (and so of its gradient) that crosses a hop."""
    bandwidth: float = inf
    """Bytes per unit of time over one hop in one direction; messages queue for it."""
    scale: Sequence[float] = ()
    """Relative time of each stage's operations, for uneven stages; empty: all equal."""
    overhead: float = 0.0
    """Of every forward and every backward on top, however small the part of the model: mostly Python."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", tuple(self.scale))  # hashable
        for name in ("forward", "backward", "update", "link", "num_bytes", "scale", "overhead"):
            value = getattr(self, name)
            if not all(0 <= number < inf for number in (value if name == "scale" else [value])):
                raise ValueError(f"cost {name!r} must be finite and 0 or more, got {value!r}")
        if not self.bandwidth > 0:
            raise ValueError(f"cost 'bandwidth' must be above 0, got {self.bandwidth!r}; leave it out if unlimited")

    def of(self, op: Op, num_chunks: int = 1) -> float:
        """Time that `op` keeps its stage busy; a forward or backward is of one of the stage's chunks."""
        scale = self.scale[op.stage] if self.scale else 1.0
        if op.kind == UPDATE:
            return self.update * scale
        return (self.forward if op.kind == FORWARD else self.backward) * scale / num_chunks + self.overhead

    @property
    def transfer(self) -> float:
        """Time that one message keeps one direction of a link busy."""
        return self.num_bytes / self.bandwidth


UNIT_COST = Cost()


class _Step(NamedTuple):
    """What a stage does next for `user`: run it, or receive or send the result `op` from or to `peer`."""

    verb: str
    op: Op
    peer: int
    user: Op

    def __str__(self) -> str:
        if self.verb == "send":
            return f"next sends {self.op}, waits for stage {self.peer} to receive it"
        return f"next {self.user}, waits for {self.op} of stage {self.op.stage}"


def _programs(plan: Plan, calls: int, drain: bool, receive_first: bool) -> list[deque[_Step]]:
    """The streams of all stages with the receives and sends that ``plan.needs`` asks for."""
    streams = [list(plan.batches(stage, calls, drain)) for stage in range(plan.num_stages)]
    needs = {op: plan.needs(op) for stream in streams for batch in stream for op in batch}
    sends: dict[Op, list[_Step]] = {}
    for op, needed in needs.items():
        for need in needed:
            if need.stage != op.stage:
                sends.setdefault(need, []).append(_Step("send", need, op.stage, need))
    programs = []
    for stream in streams:
        steps: deque[_Step] = deque()
        held: list[_Step] = []
        for batch in stream:
            receives: list[_Step] = []
            work: list[_Step] = []
            for op in batch:
                for need in needs[op]:
                    if need.stage != op.stage:
                        receives.append(_Step("receive", need, need.stage, op))
                    else:
                        work.append(_Step("wait", need, op.stage, op))
                work.append(_Step("run", op, op.stage, op))
            swap = receive_first and batch[0].kind == BACKWARD
            # The gradient of the micro-batch just forwarded cannot come back before its activation is sent.
            swap = swap and not any(send.op.micro_batch == op.micro_batch for send in held for op in batch)
            steps += receives + held if swap else held + receives
            steps += work
            held = [send for op in batch for send in sends.get(op, ())]
        programs.append(steps + deque(held))
    return programs


def replay(
    plan: Plan,
    calls: int,
    cost: Cost = UNIT_COST,
    drain: bool = False,
    blocking: bool = False,
    receive_first: bool = True,
) -> Timeline:
    """Run all stages of `plan` for `calls` calls. Raises `Deadlock` when no stage can go on.

    With `blocking` a send lasts until its receiver takes the message, as with DeepSpeed's p2p, and the order in a
    tick matters: `receive_first` receives the gradient for the backward *before* it sends the activation of the
    forward ahead of it, which is safe for DDG; in the naive order neighbours wait for each other in ``send``.
    """
    if cost.scale and len(cost.scale) != plan.num_stages:
        raise ValueError(f"cost 'scale' must have one number for each of {plan.num_stages} stages, got {cost.scale}")
    todo = _programs(plan, calls, drain, blocking and receive_first)
    clock = [0.0] * plan.num_stages
    link_free: dict[tuple[int, int], float] = {}
    arrival: dict[tuple[Op, int], float] = {}
    done: dict[Op, Event] = {}

    def advance(stage: int) -> bool:
        """Take the next step of `stage`; False if it has to wait."""
        verb, op, peer, _ = todo[stage][0]
        if verb == "run":
            done[op] = Event(op, clock[stage], clock[stage] + cost.of(op, plan.num_chunks))
            clock[stage] = done[op].end
        elif verb == "wait" and op not in done:
            return False
        elif verb == "send":
            if blocking:
                return False  # the receiver completes the rendezvous for both
            link_free[stage, peer] = max(clock[stage], link_free.get((stage, peer), 0.0)) + cost.transfer
            arrival[op, peer] = link_free[stage, peer] + cost.link
        elif verb == "receive" and blocking:
            if not todo[peer] or todo[peer][0] != ("send", op, stage, op):
                return False
            clock[stage] = clock[peer] = max(clock[stage], clock[peer]) + cost.transfer + cost.link
            todo[peer].popleft()
        elif verb == "receive":
            if (op, stage) not in arrival:
                return False
            clock[stage] = max(clock[stage], arrival[op, stage])
        todo[stage].popleft()
        return True

    while any(todo):
        left = sum(map(len, todo))
        for stage, steps in enumerate(todo):
            while steps and advance(stage):
                pass
        if sum(map(len, todo)) == left:
            waits = "".join(f"\n  stage {k}: {steps[0] if steps else 'finished'}" for k, steps in enumerate(todo))
            raise Deadlock(f"plan {plan.name!r}: no stage can go on" + waits)
    return Timeline(tuple(done.values()), plan.num_stages)
