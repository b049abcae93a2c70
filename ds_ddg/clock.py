"""When a stage did something, by the clock of what computes: the host's, or that of its device.

On a GPU the host only launches work and runs ahead of it; what it waits for says nothing of what the device waits for.
There a moment is an event on the compute stream. When it happened is known once the device has passed it, so whatever
is to be done with moments is done then, in order::

    compute stream   | F |a     idle     |b F |c          a to b: the device waited, b to c: it worked,
    main thread      F a wait for a message b F c ...     however far the host is ahead

Nobody waits for that. Times are seconds of ``time.perf_counter``, so those of all ranks of a machine compare.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

__all__ = ["Clock", "DeviceClock", "HostClock", "clock_for"]

_NEAR = 1.0
"""Seconds that are counted from one event: torch counts in float32."""
_TRIES = 5
"""To bring the device's clock and the host's together; the quickest is the closest."""
_MANY = 256
"""What is to be done later, before it is looked at without being asked."""


class Clock(Protocol):
    """That of what computes."""

    def now(self) -> Any:
        """The moment at which all that it was given until now is done."""

    def then(self, act: Callable[..., None], what: str, *moments: Any) -> None:
        """``act(what, *times of the moments)`` once the last of them has passed, after what was given before."""

    def read(self, wait: bool = False) -> None:
        """Do what can be done by now, or all of it.

        Raises:
            RuntimeError: the device has failed.
        """

    def passed(self) -> float:
        """The time up to which everything is known, not long ago."""


class HostClock:
    """The `Clock` of a stage on the CPU: a moment is its time, and nothing is left for later."""

    def now(self) -> float:
        return time.perf_counter()

    passed = now

    def then(self, act: Callable[..., None], what: str, *moments: float) -> None:
        act(what, *moments)

    def read(self, wait: bool = False) -> None:
        pass


class _Moment(NamedTuple):
    event: Any
    launched: float


class DeviceClock:
    """The `Clock` of a stage on a device; see the module's docstring.

    Args:
        device: where the stage computes.
        streams: has ``Event`` and ``current_stream``; default: torch's module for `device`.
    """

    def __init__(self, device: torch.device, streams: Any = None) -> None:
        self._device = device
        self._streams = torch.get_device_module(device) if streams is None else streams
        self._later: deque[tuple[Callable[..., None], str, tuple[_Moment, ...]]] = deque()
        origins = [self._met() for _ in range(_TRIES)]
        self._origin, self._origin_time = min(origins, key=lambda met: met[1] - met[0].launched)
        self._passed = self._origin_time

    def now(self) -> _Moment:
        event = self._streams.Event(enable_timing=True)
        launched = time.perf_counter()
        event.record(self._streams.current_stream(self._device))
        return _Moment(event, launched)

    def then(self, act: Callable[..., None], what: str, *moments: _Moment) -> None:
        self._later.append((act, what, moments))
        if len(self._later) > _MANY:
            self.read()

    def read(self, wait: bool = False) -> None:
        while self._later:
            act, what, moments = self._later[0]
            if moments and wait:
                moments[-1].event.synchronize()
            elif moments and not moments[-1].event.query():
                return
            self._later.popleft()
            act(what, *map(self._time, moments))

    def passed(self) -> float:
        self.then(lambda what, now: None, "now", self.now())
        self.read()
        return self._passed

    def _met(self) -> tuple[_Moment, float]:
        """A moment, and the time at which the host has seen it pass: later, by no more than since its launch."""
        moment = self.now()
        moment.event.synchronize()
        return moment, time.perf_counter()

    def _time(self, moment: _Moment) -> float:
        origin = self._origin
        if moment.launched < origin.launched:
            at = self._origin_time - moment.event.elapsed_time(origin.event) / 1e3
        else:
            at = self._origin_time + origin.event.elapsed_time(moment.event) / 1e3
        # It passed after it was launched and before this was asked: so far two clocks drift apart, and no further.
        sure = min(max(at, moment.launched), time.perf_counter())
        self._origin_time += sure - at
        at = sure
        if at - self._origin_time > _NEAR:
            self._origin, self._origin_time = moment, at
        self._passed = max(self._passed, at)
        return at


def clock_for(device: torch.device) -> Clock:
    """That of a stage on `device`."""
    return HostClock() if device.type == "cpu" else DeviceClock(device)
