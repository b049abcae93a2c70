"""Measurements of a stage, and how they get to the last stage without messages of their own.

The stage's clock (``clock.py``) gives the times; on a GPU they are known a little later, and no stage waits for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from deepspeed.runtime.pipe.engine import PIPE_RECV_GRAD_TIMER, PIPE_RECV_INPUT_TIMER
from torch import Tensor

from ds_ddg.comm.loss_exchange import Row, Update
from ds_ddg.comm.message import Kind
from ds_ddg.comm.stage_links import CallPosition, Links
from ds_ddg.telemetry.clock import Clock, HostClock
from ds_ddg.weights.versions import WeightVersions

__all__ = ["MEASURED", "StageMeter", "Timestamp", "WatchedLinks"]

MEASURED = ("staleness", "busy", "micro_batches_in_flight", "weight_versions")
"""The values of a row, after the number of the stage."""

_LOSS = "recv_loss"


class Timestamp(NamedTuple):
    """A moment, and how long the stage had waited until then, both in seconds."""

    time: float
    waited: float

    def busy(self, later: Timestamp) -> float:
        """Return the share of the time from here to `later` in which the stage did not wait, from 0 to 1."""
        return 1.0 - (later.waited - self.waited) / max(later.time - self.time, 1e-9)


class _Waiting:
    """A block whose time is counted as waiting; a generator would cost more than the reading of the clock."""

    __slots__ = ("_links", "_start", "_what")

    def __init__(self, links: WatchedLinks, what: str) -> None:
        self._links, self._what = links, what

    def __enter__(self) -> None:
        self._start: Any = self._links.clock.now()

    def __exit__(self, *_: object) -> None:
        clock = self._links.clock
        clock.then(self._links._waited, self._what, self._start, clock.now())


class WatchedLinks(Links):
    """``Links`` that count the seconds spent in receives.

    Measurements travel down with the first activation of a call, each stage adding its own row; from the last stage
    they go to all with the loss. These messages exist anyway, and nobody waits for a row.
    """

    def __init__(self, *args: Any, clock: Clock | None = None, **kwargs: Any) -> None:
        self.clock = clock or HostClock()
        """The clock of this stage; default: the host's."""
        self.seconds = dict.fromkeys((PIPE_RECV_INPUT_TIMER, PIPE_RECV_GRAD_TIMER, _LOSS), 0.0)
        """Seconds waited so far, by what for."""
        self.rows: tuple[Row, ...] = ()
        """Rows of the stages above, then of this one; empty once they are sent on."""
        self.update = Update()
        """The result of the updates of the call before, on the stages above and this one; empty once it is sent on."""
        super().__init__(*args, **kwargs)

    def timestamp(self, keep: Callable[[Timestamp], None]) -> None:
        """Give this moment to `keep`; at once, or on a device once it has passed."""
        self.clock.then(lambda _, now: keep(Timestamp(now, sum(self.seconds.values()))), "timestamp", self.clock.now())

    def _waited(self, what: str, start: float, end: float) -> None:
        self.seconds[what] += end - start

    def begin(self, here: CallPosition, ready: bool, with_data: bool) -> Kind:
        """Start a call as ``Links.begin`` does, and take over the rows of the stages above."""
        with _Waiting(self, PIPE_RECV_INPUT_TIMER):
            kind = super().begin(here, ready, with_data)
        info = {} if self._first is None else self._first.info
        self.rows = info.get("rows", ())
        self.update = Update(*info.get("update", ()))
        return kind

    def send_activations(self, outputs: Any, more: dict[str, Any] | None = None) -> None:
        """Post `outputs` as ``Links.send_activations`` does, with rows and updates if there are any."""
        riders = {"rows": self.rows, "update": tuple(self.update) if any(self.update) else ()}
        self.rows, self.update = (), Update()
        super().send_activations(outputs, {**(more or {}), **{name: what for name, what in riders.items() if what}})

    def recv_activations(self) -> Any:
        """Do what ``Links.recv_activations`` does, and count its time."""
        with _Waiting(self, PIPE_RECV_INPUT_TIMER):
            return super().recv_activations()

    def recv_grads(self) -> tuple[Tensor | None, ...]:
        """Do what ``Links.recv_grads`` does, and count its time."""
        with _Waiting(self, PIPE_RECV_GRAD_TIMER):
            return super().recv_grads()

    def next_loss(self) -> dict[str, Any]:
        """Do what ``Links.next_loss`` does, and count its time."""
        with _Waiting(self, _LOSS):
            return super().next_loss()

    def share(self, value: float) -> float:
        """Do what ``Links.share`` does, and count its time."""
        with _Waiting(self, _LOSS):
            return super().share(value)

    def ping(self, tensors: Sequence[Tensor], times: int = 5) -> float:
        """Measure how long `tensors` take to the next stage; all stages must be drained, and must call it.

        First the stage before asks, then this one does, so one message travels at a time and no stage computes.

        Args:
            tensors: what travels there and back.
            times: how often.

        Returns:
            Seconds: half of the median time there and back; 0 on the last stage.
        """
        if self._activations_in is not None and self._gradients_out is not None:
            for _ in range(times + 1):
                asked = self._activations_in.take(Kind.DATA, what="a measurement of the link")
                self._gradients_out.post(Kind.DATA, asked.tensors)
        seconds: list[float] = []
        if self._activations_out is not None and self._gradients_in is not None:
            for _ in range(times + 1):
                start = self.clock.now()
                self._activations_out.post(Kind.DATA, tensors)
                self._gradients_in.listen()
                self._gradients_in.take(Kind.DATA, what="a measurement of the link")
                end = self.clock.now()
                self.clock.then(lambda _, sent, back: seconds.append((back - sent) / 2), "hop", start, end)
            self.clock.read(wait=True)
        self.flush()
        return median(seconds[1:]) if seconds else 0.0  # the first one had no preposted receive yet


@dataclass
class _Known:
    """The moments between calls that are known."""

    before: Timestamp | None = None
    newest: Timestamp | None = None
    period: Timestamp | None = None
    """The beginning of the period."""

    def add(self, moment: Timestamp) -> None:
        self.before, self.newest = self.newest, moment
        self.period = self.period or moment


class StageMeter:
    """Measures calls of one stage between them; a *period* is some calls long.

    Args:
        stage: the number of the stage.
        links: its links, which know how long it waits.
        calls: the largest number of calls that can have micro-batches in flight at once.
    """

    def __init__(self, stage: int, links: WatchedLinks, calls: int) -> None:
        self._stage, self._links, self._calls = stage, links, calls
        self.forget()

    def forget(self) -> None:
        """Forget all measurements; nothing may be in flight."""
        self._known = _Known()
        self._first = True
        self._versions: deque[int] = deque(maxlen=self._calls)
        self.row: Row | None = None
        """The row of the last period if it is not sent yet."""

    def begin_call(self, version: int) -> None:
        """Note that a call begins on weights of `version`; its first message carries the row of the last period."""
        if self._first:
            self._first = False
            self._links.timestamp(self._known.add)
        self._versions.append(version)
        if self.row is not None:
            self._links.rows += (self.row,)
            self.row = None

    def end_call(self) -> None:
        """Note that the call is over; what the script does until the next one counts as work of the stage."""
        self._links.timestamp(self._known.add)
        self._links.clock.read()

    def end_period(self, versions: WeightVersions, micro_batches: int) -> None:
        """End a period, whose row leaves with the next call; it is that of the last known call if no more is known."""
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
        return self._stage, staleness, busy, versions.in_flight, versions.alive
