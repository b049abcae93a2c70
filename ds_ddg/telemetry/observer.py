"""The one place where the waits of a stage are timed.

Links and data feed say what they wait for (``comm/waits.py``). Each wait is timed once, by the clock of the stage, and
whoever has subscribed gets its name, start and end: the totals here always, the trace if one is wanted. On a GPU the
times are known a little later (``clock.py``), and no stage waits for them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from ds_ddg.comm.waits import What
from ds_ddg.telemetry.clock import Clock, HostClock

__all__ = ["Observer", "Timestamp"]

Subscriber = Callable[[str, float, float], None]
"""A function that takes the name of a wait, its start and its end, both in seconds."""


class Timestamp(NamedTuple):
    """A moment, and how long the stage had waited for other stages until then, both in seconds."""

    time: float
    waited: float

    def busy(self, later: Timestamp) -> float:
        """Return the share of the time from here to `later` in which the stage did not wait, from 0 to 1."""
        return 1.0 - (later.waited - self.waited) / max(later.time - self.time, 1e-9)


class _Wait:
    """A block that is timed; a generator would cost more than the reading of the clock."""

    __slots__ = ("_clock", "_start", "_subscribers", "_what")

    def __init__(self, clock: Clock, what: str, subscribers: list[Subscriber]) -> None:
        self._clock, self._what, self._subscribers = clock, what, subscribers

    def __enter__(self) -> None:
        self._start: Any = self._clock.now()

    def __exit__(self, *_: object) -> None:
        end = self._clock.now()
        for subscriber in self._subscribers:
            self._clock.then(subscriber, self._what, self._start, end)


class Observer:
    """Times the waits of one stage; a `WaitObserver`.

    Args:
        clock: the clock of the stage; default: the host's.
    """

    _not_timed = nullcontext()

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or HostClock()
        self.seconds = {"activation": 0.0, "gradient": 0.0, "loss": 0.0}
        """The seconds for which this stage has waited for other stages so far, by what for."""
        self._subscribers: dict[What, list[Subscriber]] = {}
        self.subscribe(self._add, "activation", "gradient", "loss")

    def subscribe(self, subscriber: Subscriber, *names: What) -> None:
        """Call `subscriber` after each wait of these `names`, once its times are known, in the order of the waits."""
        for what in names:
            self._subscribers.setdefault(what, []).append(subscriber)

    def waits(self, what: What) -> AbstractContextManager[None]:
        """Return a block in which the stage waits for `what`; it is timed if anybody has subscribed to that name."""
        subscribers = self._subscribers.get(what)
        return self._not_timed if subscribers is None else _Wait(self.clock, what, subscribers)

    def timestamp(self, keep: Callable[[Timestamp], None]) -> None:
        """Give this moment to `keep`; at once, or on a device once it has passed."""
        self.clock.then(lambda _, now: keep(Timestamp(now, sum(self.seconds.values()))), "timestamp", self.clock.now())

    def _add(self, what: str, start: float, end: float) -> None:
        self.seconds[what] += end - start
