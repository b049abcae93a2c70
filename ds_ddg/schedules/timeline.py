"""Timelines of all stages, planned or measured: how long they took, how busy they were, what they kept.

A `Timeline` *counts* activations, versions and staleness from what happened, never by the plan's formulas.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import isclose
from typing import NamedTuple

from ds_ddg.schedules.plan import BACKWARD, FORWARD, UPDATE, WEIGHT, Op

__all__ = ["Event", "Timeline"]


class Event(NamedTuple):
    """An operation with its start and end, planned (in the unit of the costs) or measured (in seconds)."""

    op: Op
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The events of every stage, in order of start. Shares are in 0 .. 1, times in the events' own unit.

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
        rows: list[list[Event]] = [[] for _ in range(self.num_stages)]
        for event in self.events:
            rows[event.op.stage].append(event)
        return rows

    @property
    def makespan(self) -> float:
        """The time from the first start to the last end, over all stages."""
        return max((end for _, _, end in self), default=0.0) - min((start for _, start, _ in self), default=0.0)

    def period(self, stage: int = 0) -> float:
        """Return the time per call in the steady state: exact if calls of `stage` repeat in groups, else the mean."""
        ends = [event.end for event in self._steady(stage) if event.op.kind == UPDATE]
        for q in range(1, (len(ends) + 1) // 2):
            gaps = [later - earlier for earlier, later in zip(ends, ends[q:], strict=False)]
            if isclose(min(gaps), max(gaps), rel_tol=1e-9):
                return gaps[0] / q
        return (ends[-1] - ends[0]) / (len(ends) - 1)

    def busy(self, stage: int) -> float:
        """Return the share of its time that `stage` computes in the steady state."""
        work = self._steady(stage)[1:]
        calls = sum(event.op.kind == UPDATE for event in work)
        return sum(end - start for _, start, end in work) / calls / self.period(stage)

    @property
    def bubble(self) -> float:
        """Return the idle share of the steady state, mean over the stages."""
        return 1 - sum(map(self.busy, range(self.num_stages))) / self.num_stages

    def peak_activations(self, stage: int) -> int:
        """Return the most forward passes begun whose backward, both parts of it, is not finished, counted."""
        return max((len(alive) for _, _, alive in self._states(stage)), default=0)

    def peak_versions(self, stage: int) -> int:
        """Return the most weight versions alive at once, counted: the newest, and those of micro-batches in flight."""
        return max((len({version, *alive.values()}) for _, version, alive in self._states(stage)), default=0)

    def staleness(self, stage: int) -> int:
        """Return the most updates between a forward and the update that uses its gradient, counted."""
        split = self._split(stage)
        uses = (state for state in self._states(stage) if _makes_gradients(state[0], split))
        return max((version - alive[op._replace(kind=FORWARD)] for op, version, alive in uses), default=0)

    def _states(self, stage: int) -> Iterator[tuple[Op, int, dict[Op, int]]]:
        """Yield, at each operation, the version of the weights, and those that the forward passes in flight saw."""
        version = 0
        alive: dict[Op, int] = {}
        split = self._split(stage)
        for op, _, _ in self.rows[stage]:
            forward = op._replace(kind=FORWARD)
            if op.kind == UPDATE:
                version += 1
            else:
                alive.setdefault(forward, version)
            yield op, version, alive
            if _makes_gradients(op, split):
                del alive[forward]

    def _split(self, stage: int) -> set[Op]:
        """Return the backwards of `stage` that leave the gradients of the weights to a W."""
        return {event.op._replace(kind=BACKWARD) for event in self.rows[stage] if event.op.kind == WEIGHT}

    def _steady(self, stage: int) -> list[Event]:
        """Return the events of the later half of the calls of `stage`, with the update before them."""
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


def _makes_gradients(op: Op, split: Container[Op]) -> bool:
    """Return whether `op` makes the gradients of the weights, after which nobody needs its activations."""
    return op.kind == WEIGHT or (op.kind == BACKWARD and op not in split)
