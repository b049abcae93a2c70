"""What a stage measures of itself, and how that gets to the last stage at no cost of its own.

Times are those of the clock it is given (``clock.py``); a GPU's are known a little later, and nobody waits for them.
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
from ds_ddg.comm.stage_links import Here, Links
from ds_ddg.telemetry.clock import Clock, HostClock
from ds_ddg.weights.versions import WeightVersions

__all__ = ["MEASURED", "Gauge", "Mark", "WatchedLinks"]

MEASURED = ("staleness", "busy", "micro_batches_in_flight", "weight_versions")
"""The values of a row, after the number of the stage."""

_LOSS = "recv_loss"


class Mark(NamedTuple):
    """A moment, and how long the stage had waited until then."""

    time: float
    waited: float

    def busy(self, later: Mark) -> float:
        """Share of the time from here to `later` in which the stage did not wait."""
        return 1.0 - (later.waited - self.waited) / max(later.time - self.time, 1e-9)


class _Waiting:
    """Counts the time inside the block; a generator would cost more than the reading of the clock."""

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
        """Of this stage; default: the host's."""
        self.seconds = dict.fromkeys((PIPE_RECV_INPUT_TIMER, PIPE_RECV_GRAD_TIMER, _LOSS), 0.0)
        """Waited so far, by what for."""
        self.rows: tuple[Row, ...] = ()
        """What the stages above, then this one, measured; gone once it is sent on."""
        self.update = Update()
        """Likewise what the updates of the call before came to."""
        super().__init__(*args, **kwargs)

    def mark(self, keep: Callable[[Mark], None]) -> None:
        """Give this moment to `keep`; at once, or on a device once it has passed."""
        self.clock.then(lambda _, now: keep(Mark(now, sum(self.seconds.values()))), "mark", self.clock.now())

    def _waited(self, what: str, start: float, end: float) -> None:
        self.seconds[what] += end - start

    def begin(self, here: Here, ready: bool, with_data: bool) -> Kind:
        """As in ``Links``; takes over the rows of the stages above."""
        with _Waiting(self, PIPE_RECV_INPUT_TIMER):
            kind = super().begin(here, ready, with_data)
        info = {} if self._first is None else self._first.info
        self.rows = info.get("rows", ())
        self.update = Update(*info.get("update", ()))
        return kind

    def send_activations(self, outputs: Any, more: dict[str, Any] | None = None) -> None:
        """As in ``Links``; rows and updates ride along, where there are any."""
        riders = {"rows": self.rows, "update": tuple(self.update) if any(self.update) else ()}
        self.rows, self.update = (), Update()
        super().send_activations(outputs, {**(more or {}), **{name: what for name, what in riders.items() if what}})

    def recv_activations(self) -> Any:
        """As in ``Links``."""
        with _Waiting(self, PIPE_RECV_INPUT_TIMER):
            return super().recv_activations()

    def recv_grads(self) -> tuple[Tensor | None, ...]:
        """As in ``Links``."""
        with _Waiting(self, PIPE_RECV_GRAD_TIMER):
            return super().recv_grads()

    def next_loss(self) -> dict[str, Any]:
        """As in ``Links``."""
        with _Waiting(self, _LOSS):
            return super().next_loss()

    def share(self, value: float) -> float:
        """As in ``Links``."""
        with _Waiting(self, _LOSS):
            return super().share(value)

    def ping(self, tensors: Sequence[Tensor], times: int = 5) -> float:
        """With all stages drained, on all of them: seconds that `tensors` take to the next stage; 0 on the last.

        Half of the time there and back, the median over `times`. First the stage before asks, then this one does, so
        one message travels at a time and nobody computes meanwhile.
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
        self.park()
        return median(seconds[1:]) if seconds else 0.0  # at the first one there was no room yet


@dataclass
class _Known:
    """Of the moments between calls, those that are known."""

    before: Mark | None = None
    newest: Mark | None = None
    period: Mark | None = None
    """When it began."""

    def add(self, mark: Mark) -> None:
        self.before, self.newest = self.newest, mark
        self.period = self.period or mark


class Gauge:
    """Measures calls of one stage between them; a *period* is some calls long.

    Args:
        stage: its number.
        links: know how long it waits.
        calls: that can have micro-batches in flight at once, at most.
    """

    def __init__(self, stage: int, links: WatchedLinks, calls: int) -> None:
        self._stage, self._links, self._calls = stage, links, calls
        self.forget()

    def forget(self) -> None:
        """Nothing is in flight: what was measured is over."""
        self._known = _Known()
        self._first = True
        self._versions: deque[int] = deque(maxlen=self._calls)
        self.row: Row | None = None
        """That of the last period, not sent yet."""

    def begin_call(self, version: int) -> None:
        """A call begins on weights of this version; in its first message travels the row of a period just over."""
        if self._first:
            self._first = False
            self._links.mark(self._known.add)
        self._versions.append(version)
        if self.row is not None:
            self._links.rows += (self.row,)
            self.row = None

    def end_call(self) -> None:
        """The call that has begun is over. What the script does until the next one is work of the stage."""
        self._links.mark(self._known.add)
        self._links.clock.read()

    def end_period(self, versions: WeightVersions, micro_batches: int) -> None:
        """So is a period; its row leaves with the next call, and is of the last call known if no more is known yet."""
        known = self._known
        since = known.before if known.period is known.newest else known.period
        self.row = self._measure(since, versions, micro_batches)
        known.period = known.newest

    def now(self, versions: WeightVersions, micro_batches: int) -> Row:
        """The row of the last call, or on a device of the last one whose times are known."""
        return self._measure(self._known.before, versions, micro_batches)

    def _measure(self, since: Mark | None, versions: WeightVersions, micro_batches: int) -> Row:
        calls = -(-versions.in_flight // micro_batches)
        while len(self._versions) > calls:
            self._versions.popleft()
        staleness = versions.version - self._versions[0] if self._versions else 0
        until = self._known.newest
        busy = round(since.busy(until), 4) if since is not None and until is not None else 0.0
        return self._stage, staleness, busy, versions.in_flight, versions.alive
