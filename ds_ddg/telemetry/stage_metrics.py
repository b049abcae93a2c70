"""A stage measures how old its gradients are and what that does to it, how busy it is, and how much it holds."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ds_ddg.comm.loss_exchange import Row
from ds_ddg.telemetry.delay_effects import EFFECTS, DelayEffects
from ds_ddg.telemetry.observer import Observer, Timestamp
from ds_ddg.weights.versions import WeightVersions

__all__ = ["MEASURED", "StageMeter"]

MEASURED = ("staleness", "busy", "micro_batches_in_flight", "weight_versions", *EFFECTS)
"""The values of a row, after the number of the stage; one that is not known is None."""


@dataclass
class _Known:
    """The moments between calls that are known."""

    before: Timestamp | None = None
    newest: Timestamp | None = None
    period: Timestamp | None = None
    """The moment at which the period began."""

    def add(self, moment: Timestamp) -> None:
        self.before, self.newest = self.newest, moment
        self.period = self.period or moment


class StageMeter:
    """Measures calls of one stage between them; a *period* is some calls long.

    Args:
        stage: the number of the stage.
        observer: knows how long it waits.
        effects: samples what delay does to it.
        calls: the largest number of calls that can have micro-batches in flight at once.
    """

    def __init__(self, stage: int, observer: Observer, effects: DelayEffects, calls: int) -> None:
        self._stage, self._observer, self._effects, self._calls = stage, observer, effects, calls
        self.forget()

    def forget(self) -> None:
        """Forget all measurements; nothing may be in flight."""
        self._effects.forget()
        self._known = _Known()
        self._first = True
        self._versions: deque[int] = deque(maxlen=self._calls)
        self.row: Row | None = None
        """The row of the last period if it is not sent yet."""

    def begin_call(self, version: int) -> tuple[Row, ...]:
        """Note that a call begins on weights of `version`.

        Returns:
            The row of the last period, if it has not been returned yet.
        """
        if self._first:
            self._first = False
            self._observer.timestamp(self._known.add)
        self._versions.append(version)
        row, self.row = self.row, None
        return () if row is None else (row,)

    def end_call(self) -> None:
        """Note that the call is over; what the script does until the next one counts as work of the stage."""
        self._observer.timestamp(self._known.add)
        self._observer.clock.read()
        self._effects.end_call()

    def end_period(self, versions: WeightVersions, micro_batches: int) -> None:
        """End a period, whose row `begin_call` returns; it is that of the last known call if no more is known."""
        known = self._known
        since = known.before if known.period is known.newest else known.period
        self.row = self._measure(since, versions, micro_batches)
        known.period = known.newest

    def now(self, versions: WeightVersions, micro_batches: int) -> Row:
        """Return the row of the last call, or on a device that of the last call whose times are known."""
        return self._measure(self._known.before, versions, micro_batches)

    def _measure(self, since: Timestamp | None, versions: WeightVersions, micro_batches: int) -> Row:
        calls = -(-versions.in_flight // micro_batches)
        while len(self._versions) > calls:
            self._versions.popleft()
        staleness = versions.version - self._versions[0] if self._versions else 0
        until = self._known.newest
        busy = round(since.busy(until), 4) if since is not None and until is not None else 0.0
        return self._stage, staleness, busy, versions.in_flight, versions.alive, *self._effects.values
