"""The clock of a stage is that of the host if it computes on the CPU, that of its device otherwise.

On a GPU the host only launches work and runs ahead of it, so its waits say nothing of those of the device. There a
moment is an event on the compute stream. Its time is known once the device has passed it, so whatever is to be done
with moments is done then, in order::

    compute stream   | F |a     idle     |b F |c          a to b: the device waited, b to c: it worked,
    main thread      F a wait for a message b F c ...     however far the host is ahead

No stage waits for that. Times are seconds of ``time.perf_counter``, which all ranks of a machine share; those of a
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
"""The most seconds that are counted from one event, as torch counts in float32."""
_TRIES = 5
"""The number of attempts to bring two clocks together; the quickest is the closest."""
_MANY = 256
"""The number of waiting functions from which on `DeviceClock.then` calls `read` itself."""


class Clock(Protocol):
    """The clock of the processor that computes a stage: the host or a device."""

    def now(self) -> Any:
        """Return the moment at which all work that the processor was given until now is done."""

    def then(self, act: Callable[..., None], what: str, *moments: Any) -> None:
        """Call ``act(what, *times)``, in seconds, once all `moments` have passed, after the functions given before."""

    def read(self, wait: bool = False) -> None:
        """Call the functions whose moments have passed; all of them with `wait`, which waits for the device.

        Raises:
            RuntimeError: the device has failed.
        """


class HostClock:
    """The `Clock` of a stage on the CPU, where a moment is its time in seconds and no function has to wait."""

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
        """Bring the clock of the device, which must be idle, and that of the host together."""
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
        # The device passes an event after its launch and before now, so the clocks cannot have drifted further apart.
        sure = min(max(at, moment.launched), time.perf_counter())
        self._origin_time += sure - at
        at = sure
        if at - self._origin_time > _NEAR:
            self._origin, self._origin_time = moment, at
        return at


def clock_for(device: torch.device) -> Clock:
    """Make the clock of a stage on `device`."""
    return HostClock() if device.type == "cpu" else DeviceClock(device)
