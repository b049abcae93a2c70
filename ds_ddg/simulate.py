"""Replay of all stages of a plan under a cost model: does it run, how fast, and what does it keep in memory?

`replay` knows a plan only by its streams of operations and its one dependency rule, ``Plan.needs``. The `Timeline`
that it returns *counts* activations, versions and staleness from what happened, never by the plan's formulas.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, isclose
from typing import NamedTuple

from .plan import BACKWARD, FORWARD, UPDATE, Op, Plan

__all__ = ["Cost", "Deadlock", "Event", "Timeline", "replay"]


class Deadlock(RuntimeError):  # noqa: N818 (a finding, as much as an error)
    """No stage can go on; the message says, per stage, what comes next and what it waits for."""


class Event(NamedTuple):
    """An operation with its start and end, planned (in the unit of the `Cost`) or measured (in seconds)."""

    op: Op
    start: float
    end: float


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", tuple(self.scale))  # hashable
        for name in ("forward", "backward", "update", "link", "num_bytes", "scale"):
            value = getattr(self, name)
            if not all(0 <= number < inf for number in (value if name == "scale" else [value])):
                raise ValueError(f"cost {name!r} must be finite and 0 or more, got {value!r}")
        if not self.bandwidth > 0:
            raise ValueError(f"cost 'bandwidth' must be above 0, got {self.bandwidth!r}; leave it out if unlimited")

    def of(self, op: Op, num_chunks: int = 1) -> float:
        """Time that `op` keeps its stage busy; a forward or backward is of one of the stage's chunks."""
        share = 1 if op.kind == UPDATE else 1 / num_chunks
        time = {FORWARD: self.forward, BACKWARD: self.backward, UPDATE: self.update}[op.kind] * share
        return time * self.scale[op.stage] if self.scale else time

    @property
    def transfer(self) -> float:
        """Time that one message keeps one direction of a link busy."""
        return self.num_bytes / self.bandwidth


UNIT_COST = Cost()


@dataclass(frozen=True)
class Timeline:
    """What every stage did and when, in order of start. Shares are in 0 .. 1, times in the events' own unit.

    The steady state of a stage is the later half of its calls without the drain; ValueError if there is only one.
    """

    events: tuple[Event, ...]
    num_stages: int

    def __post_init__(self) -> None:
        # A stable sort: operations that take no time keep their order within a stage.
        object.__setattr__(self, "events", tuple(sorted(self.events, key=lambda event: event[1])))

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    @cached_property
    def rows(self) -> list[list[Event]]:
        """The events of each stage, in order."""
        return [[event for event in self.events if event.op.stage == stage] for stage in range(self.num_stages)]

    @property
    def makespan(self) -> float:
        """From the first start to the last end, over all stages."""
        return max((end for _, _, end in self), default=0.0) - min((start for _, start, _ in self), default=0.0)

    def period(self, stage: int = 0) -> float:
        """Time per call in the steady state: exact if the calls of `stage` repeat in groups of q, else the mean."""
        ends = [event.end for event in self._steady(stage) if event.op.kind == UPDATE]
        for q in range(1, (len(ends) + 1) // 2):
            gaps = [later - earlier for earlier, later in zip(ends, ends[q:], strict=False)]
            if isclose(min(gaps), max(gaps), rel_tol=1e-9):
                return gaps[0] / q
        return (ends[-1] - ends[0]) / (len(ends) - 1)

    def busy(self, stage: int) -> float:
        """Share of its time that `stage` computes in the steady state."""
        work = self._steady(stage)[1:]
        calls = sum(event.op.kind == UPDATE for event in work)
        return sum(end - start for _, start, end in work) / calls / self.period(stage)

    @property
    def bubble(self) -> float:
        """Idle share of the steady state, mean over the stages."""
        return 1 - sum(map(self.busy, range(self.num_stages))) / self.num_stages

    def peak_activations(self, stage: int) -> int:
        """Most forward passes begun whose backward is not finished, counted."""
        return max((len(alive) for _, _, alive in self._states(stage)), default=0)

    def peak_versions(self, stage: int) -> int:
        """Most weight versions alive at once, counted: the newest, and that of every forward without a backward."""
        return max((len({version, *alive.values()}) for _, version, alive in self._states(stage)), default=0)

    def staleness(self, stage: int) -> int:
        """Most updates between a forward and the update that uses its gradient, counted."""
        backwards = (state for state in self._states(stage) if state[0].kind == BACKWARD)
        return max((version - alive[op._replace(kind=FORWARD)] for op, version, alive in backwards), default=0)

    def _states(self, stage: int) -> Iterator[tuple[Op, int, dict[Op, int]]]:
        """At each operation: the version of the weights, and those that the forward passes in flight saw."""
        version = 0
        alive: dict[Op, int] = {}
        for op, _, _ in self.rows[stage]:
            forward = op._replace(kind=FORWARD)
            if op.kind == UPDATE:
                version += 1
            else:
                alive.setdefault(forward, version)
            yield op, version, alive
            if op.kind == BACKWARD:
                del alive[forward]

    def _steady(self, stage: int) -> list[Event]:
        """The update before the later half of the calls of `stage`, and all from there to the last call's update."""
        events = self.rows[stage]
        last_forward = max((i for i, event in enumerate(events) if event.op.kind == FORWARD), default=-1)
        updates = [i for i, event in enumerate(events) if event.op.kind == UPDATE]
        # The first update behind the last forward ends the last call; any later one belongs to a drain.
        updates = updates[: 1 + sum(i < last_forward for i in updates)]
        if len(updates) < 2:
            raise ValueError(
                f"stage {stage} has no steady state: it needs 2 calls that end in an update, got {len(updates)}; "
                "replay or record more calls"
            )
        return events[updates[(len(updates) - 1) // 2] : updates[-1] + 1]


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
    streams = [list(plan.stream(stage, calls, drain)) for stage in range(plan.num_stages)]
    needs = {op: plan.needs(op) for stream in streams for op in stream}
    sends: dict[Op, list[_Step]] = {}
    for op, needed in needs.items():
        for need in needed:
            if need.stage != op.stage:
                sends.setdefault(need, []).append(_Step("send", need, op.stage, need))
    programs = []
    for stream in streams:
        steps: deque[_Step] = deque()
        held: list[_Step] = []
        for op in stream:
            receives = [_Step("receive", need, need.stage, op) for need in needs[op] if need.stage != op.stage]
            # The gradient of the micro-batch just forwarded cannot come back before its activation is sent.
            own = any(send.op.micro_batch == op.micro_batch for send in held)
            swap = receive_first and op.kind == BACKWARD and not own
            steps += receives + held if swap else held + receives
            steps += [_Step("wait", need, op.stage, op) for need in needs[op] if need.stage == op.stage]
            steps.append(_Step("run", op, op.stage, op))
            held = sends.get(op, [])
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
        if not sum(advance(stage) for stage, steps in enumerate(todo) if steps):
            waits = "".join(f"\n  stage {k}: {steps[0] if steps else 'finished'}" for k, steps in enumerate(todo))
            raise Deadlock(f"plan {plan.name!r}: no stage can go on" + waits)
    return Timeline(tuple(done.values()), plan.num_stages)
