"""Replay of all stages of a plan under a cost model: does it run, how fast, and what does it keep in memory?

`replay` knows a plan only by its operations in order, ``Plan.batches``, and its one dependency rule, ``Plan.needs``,
which ``Plan.receiver`` is as well, read from the other end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from math import inf

from ds_ddg.schedules.plan import BACKWARD, FORWARD, UPDATE, WEIGHT, Op, Plan
from ds_ddg.schedules.timeline import Event, Timeline

__all__ = ["UNIT_COST", "Cost", "Deadlock", "num_operations", "replay"]


class Deadlock(RuntimeError):  # noqa: N818 (a finding, as much as an error)
    """No stage can go on; the message says, per stage, what comes next and what it waits for."""


@dataclass(frozen=True)
class Cost:
    """The costs of operations and links, in any one unit of time; ValueError if a cost is negative or not finite."""

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
    """Time of every forward and every backward on top, however small the part of the model: mostly Python."""
    weight_share: float = 0.5
    """Share of a backward that the gradients of the weights take, where a schedule splits it; overhead is on both."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", tuple(self.scale))  # hashable
        for name in ("forward", "backward", "update", "link", "num_bytes", "scale", "overhead", "weight_share"):
            value = getattr(self, name)
            if not all(0 <= number < inf for number in (value if name == "scale" else [value])):
                raise ValueError(f"cost {name!r} must be finite and 0 or more, got {value!r}")
        if not self.weight_share <= 1:
            raise ValueError(f"cost 'weight_share' must be in 0 .. 1, got {self.weight_share!r}")
        if not self.bandwidth > 0:
            raise ValueError(f"cost 'bandwidth' must be above 0, got {self.bandwidth!r}; leave it out if unlimited")

    def of(self, op: Op, plan: Plan) -> float:
        """Return the time that `op` of `plan` keeps its stage busy; all but an update are of one of its chunks."""
        scale = self.scale[op.stage] if self.scale else 1.0
        if op.kind == UPDATE:
            return self.update * scale
        share = self.weight_share if plan.splits_backward else 0.0
        work = {
            FORWARD: self.forward,
            BACKWARD: self.backward * (1 - share),
            WEIGHT: self.backward * share,
        }
        return work[op.kind] * scale / plan.num_chunks + self.overhead

    @property
    def transfer(self) -> float:
        """Return the time that one message keeps one direction of a link busy."""
        return self.num_bytes / self.bandwidth


UNIT_COST = Cost()

MOST_OPERATIONS = 5_000_000
"""The largest number of operations that `replay` takes on: each takes about 5 microseconds and 300 bytes."""

_KINDS = (FORWARD, BACKWARD, WEIGHT, UPDATE)


def replay(
    plan: Plan,
    calls: int,
    cost: Cost = UNIT_COST,
    drain: bool = False,
    stages: Iterable[int] | None = None,
) -> Timeline:
    """Run all stages of `plan` for `calls` calls; return the timeline of `stages`, which are all by default.

    Raises:
        Deadlock: no stage can go on.
        ValueError: the replay would take minutes and gigabytes, times add up to more than a float can say, or the
            cost is of another number of stages.
    """
    if cost.scale and len(cost.scale) != plan.num_stages:
        raise ValueError(f"cost 'scale' must have one number for each of {plan.num_stages} stages, got {cost.scale}")
    if (operations := num_operations(plan, calls)) > MOST_OPERATIONS:
        raise ValueError(
            f"{plan.num_stages} stages x {calls} calls of {plan.micro_batches} micro-batches are {operations:,} "
            f"operations to replay, more than {MOST_OPERATIONS:,}; use fewer stages, calls or micro-batches, or less "
            "slack, for which more calls are replayed"
        )
    shown = set(range(plan.num_stages) if stages is None else stages)
    events = _flow(plan, calls, cost, drain, shown)
    if not all(event.end < inf for event in events):
        raise ValueError("times add up to more than a float can say; measure costs in a larger unit of time")
    return Timeline(tuple(events), plan.num_stages)


def num_operations(plan: Plan, calls: int) -> int:
    """Return the largest number of operations that a replay of `calls` calls goes through."""
    return plan.num_stages * calls * ((2 + plan.splits_backward) * plan.num_chunks * plan.micro_batches + 1)


def _flow(plan: Plan, calls: int, cost: Cost, drain: bool, shown: Container[int]) -> list[Event]:
    """Return what `shown` stages do and when, if a send takes no time of its stage; messages queue for their link."""
    stages = range(plan.num_stages)
    todo = [deque(plan.batches(stage, calls, drain)) for stage in stages]
    times = [{kind: cost.of(Op(kind, stage, 0), plan) for kind in _KINDS} for stage in stages]
    transfer, link = cost.transfer, cost.link
    clock = [0.0 for _ in stages]
    free = [[0.0 for _ in stages] for _ in stages]  # since when, by sender and receiver
    sent: dict[Op, float] = {}  # when the result of an operation has left its stage
    waits: list[tuple[Op, Op] | None] = [None for _ in stages]  # what each stage does next, and needs for that
    events: list[Event] = []

    def start(stage: int) -> float | None:
        """Return when the next operations of `stage` can start; None while something that they need is not there."""
        if (wait := waits[stage]) and wait[1] not in sent:
            return None
        ops, begin = todo[stage][0], clock[stage]
        for op in ops:
            for need in plan.needs(op):
                if need in sent:
                    if need.stage != stage:
                        begin = max(begin, sent[need] + link)
                elif need not in ops[: ops.index(op)]:
                    waits[stage] = op, need
                    return None
        return begin

    def run(stage: int, begin: float) -> None:
        """Run the next operations of `stage`."""
        ops = todo[stage].popleft()
        for op in ops:
            end = begin + times[stage][op.kind]
            if stage in shown:
                events.append(Event(op, begin, end))
            begin = end
        clock[stage] = begin
        for op in ops:
            peer = plan.receiver(op) if transfer else None
            if peer is None:
                sent[op] = begin
            else:
                sent[op] = free[stage][peer] = max(begin, free[stage][peer]) + transfer

    while any(todo):
        left = sum(map(len, todo))
        for stage in stages:
            while todo[stage] and (begin := start(stage)) is not None:
                run(stage, begin)
        if sum(map(len, todo)) == left:
            names = (wait and f"next {wait[0]}, waits for {wait[1]} of stage {wait[1].stage}" for wait in waits)
            raise _deadlock(plan, [name if batches else None for name, batches in zip(names, todo, strict=True)])
    return events


def _deadlock(plan: Plan, waits: Sequence[str | None]) -> Deadlock:
    lines = "".join(f"\n  stage {stage}: {wait or 'finished'}" for stage, wait in enumerate(waits))
    return Deadlock(f"plan {plan.name!r}: no stage can go on" + lines)
