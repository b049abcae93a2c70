"""When a stage did something, by the clock of what computes: the host's, or that of its device.

On a GPU the host only launches work and runs ahead of it; what it waits for says nothing of what the device waits for.
There a moment is an event on the compute stream. When it happened is known once the device has passed it, so whatever
is to be done with moments is done then, in order::

    compute stream   | F |a     idle     |b F |c          a to b: the device waited, b to c: it worked,
    main thread      F a wait for a message b F c ...     however far the host is ahead

Nobody waits for that. Times are seconds of ``time.perf_counter``, which all ranks of a machine share; those of a
device are as close to it as can be known without a wait: an event passes after its launch and before that was seen.
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
"""To bring two clocks together; the quickest is the closest."""
_MANY = 256
"""What is to be done later, before it is looked at without being asked."""


class Clock(Protocol):
    """That of what computes."""

    def now(self) -> Any:
        """The moment at which all that it was given until now is done."""

    def then(self, act: Callable[..., None], what: str, *moments: Any) -> None:
        """``act(what, *times of the moments)`` once all of them have passed, after what was given before."""

    def read(self, wait: bool = False) -> None:
        """Do what can be done by now, or all of it.

        Raises:
            RuntimeError: the device has failed.
        """


class HostClock:
    """The `Clock` of a stage on the CPU: a moment is its time, and nothing is left for later."""

    def now(self) -> float:
        return time.perf_counter()

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
        self._meet()

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
            for moment in moments:
                if wait:
                    moment.event.synchronize()
                elif not moment.event.query():
                    return
            self._later.popleft()
            act(what, *map(self._time, moments))
        if wait:
            self._meet()

    def _meet(self) -> None:
        """With nothing to do on the device: bring its clock and the host's together."""
        seen = []
        for _ in range(_TRIES):
            moment = self.now()
            moment.event.synchronize()
            seen.append((time.perf_counter(), moment))
        self._origin_time, self._origin = min(seen, key=lambda met: met[0] - met[1].launched)

    def _time(self, moment: _Moment) -> float:
        origin = self._origin
        if moment.launched < origin.launched:
            at = self._origin_time - moment.event.elapsed_time(origin.event) / 1e3
        else:
            at = self._origin_time + origin.event.elapsed_time(moment.event) / 1e3
        # So far the clocks can drift apart, and no further.
        sure = min(max(at, moment.launched), time.perf_counter())
        self._origin_time += sure - at
        at = sure
        if at - self._origin_time > _NEAR:
            self._origin, self._origin_time = moment, at
        return at


def clock_for(device: torch.device) -> Clock:
    """That of a stage on `device`."""
    return HostClock() if device.type == "cpu" else DeviceClock(device)
