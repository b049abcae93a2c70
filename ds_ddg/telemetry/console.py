"""One rank prints a line on a call in place of DeepSpeed, which is muted meanwhile.

DeepSpeed's own line, monitor and timers would present a loss as the loss of the call that returns it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType, SimpleNamespace
from typing import Any

from deepspeed.runtime.pipe.engine import PIPE_RECV_GRAD_TIMER, PIPE_RECV_INPUT_TIMER, TRAIN_BATCH_TIMER
from deepspeed.utils.logging import print_dist

from ds_ddg.comm.loss_exchange import Loss
from ds_ddg.host import Host
from ds_ddg.stage import Stage

__all__ = ["Console"]

_NO_MONITOR = SimpleNamespace(enabled=False)
_TIMERS = {"activation": PIPE_RECV_INPUT_TIMER, "gradient": PIPE_RECV_GRAD_TIMER, "loss": "recv_loss"}
"""The names of waits in the printed line: those of DeepSpeed's timers, as far as it has them."""


class Console:
    """Prints the lines of one rank, and mutes DeepSpeed.

    Args:
        stage: this stage.
        host: DeepSpeed's engine.
    """

    def __init__(self, stage: Stage, host: Host) -> None:
        self._stage, self._host = stage, host
        self.only_deepspeed = True
        """Whether DeepSpeed's own method runs, so that what it says of a loss is muted; not if a project's does."""
        self._muted: Any = None
        """The monitor, while it is kept out of DeepSpeed's reach; else None."""
        self._seconds_printed: Mapping[str, float] = MappingProxyType({})
        """The seconds waited until the last line, by what for."""

    def period(self, own: int | None) -> int | None:
        """Return DeepSpeed's `own` number of calls between two lines; a huge one while the host is muted."""
        return sys.maxsize if self._muted is not None and own is not None else own

    def mute_host(self) -> None:
        """Keep DeepSpeed from printing and recording."""
        self._muted, self._host.monitor = self._host.monitor, _NO_MONITOR

    def unmute_host(self) -> None:
        """Let DeepSpeed print and record again."""
        if self._muted is not None:
            self._muted, self._host.monitor = None, self._muted

    @contextmanager
    def host_muted(self) -> Iterator[None]:
        """Inside this block DeepSpeed neither prints nor records."""
        self.mute_host()
        try:
            yield
        finally:
            self.unmute_host()

    def forget_time(self) -> None:
        """Drop the time of a call that did not happen."""
        timer = self._host.timers(TRAIN_BATCH_TIMER)
        if timer.started_:  # a project's own train_batch may do without it
            timer.stop()
            timer.event_timers.pop()

    def print_call(self, newest: Loss, call: int, waited: Mapping[str, float]) -> None:
        """Print DeepSpeed's line with the newest loss, and the number of its `call`; "steps" is how many were made.

        Args:
            newest: the loss.
            call: the number of the call that it belongs to, from 0.
            waited: seconds waited since the start, by what for.
        """
        host = self._host
        timer = host.timers(TRAIN_BATCH_TIMER)
        calls = len(timer.event_timers)
        if not calls:
            return  # a project's own train_batch has printed
        seconds = timer.elapsed(reset=True) / 1000.0 / calls
        if self._stage.rank != 0:
            return
        losses = [("loss", newest.mean), *(newest.additional or ())]
        parts = [f"steps: {host.global_steps}", *(f"{name}: {value:0.4f}" for name, value in losses)]
        parts.insert(2, f"(of call {call}, counted from 0)")
        rate = host.train_batch_size() / max(seconds, 1e-9)
        print(*parts, f"iter time (s): {seconds:0.3f} samples/sec: {rate:0.3f}")
        if host.wall_clock_breakdown():
            self._print_waits(waited)

    def _print_waits(self, waited: Mapping[str, float]) -> None:
        """Print the waits since the last line in place of DeepSpeed's pipe timers: here only receives wait."""
        waits = [
            f" | {_TIMERS[what]}: {1000 * (seconds - self._seconds_printed.get(what, 0.0)):.2f}"
            for what, seconds in waited.items()
        ]
        print_dist("time (ms)" + "".join(waits), ranks=[0])
        self._seconds_printed = dict(waited)
