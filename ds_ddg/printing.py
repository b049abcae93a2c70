"""What is printed of a call, and when DeepSpeed is kept from doing so.

DeepSpeed's own line and timers would present a loss as that of the call that returns it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType, SimpleNamespace
from typing import Any

from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER
from deepspeed.utils.logging import print_dist

from ds_ddg.execute import Executor
from ds_ddg.losses import Loss
from ds_ddg.watch import WatchedLinks

__all__ = ["Printer"]

_NO_MONITOR = SimpleNamespace(enabled=False)


class Printer(Executor):
    """Mixed into a ``PipelineEngine``: its printed lines."""

    _links: WatchedLinks

    # The host's state that printing is about.
    monitor: Any

    _only_deepspeed: bool = True
    """Whether it is DeepSpeed's own method that runs, so that what it says of a loss is to be silenced."""
    _silenced: Any = None
    """The monitor, while it is out of DeepSpeed's reach."""
    _seconds_printed: Mapping[str, float] = MappingProxyType({})
    """Waited until the last line, by what for."""

    def steps_per_print(self) -> int | None:
        """DeepSpeed's; practically never while it must not print."""
        period: int | None = super().steps_per_print()
        return sys.maxsize if self._silenced is not None and period is not None else period

    def _silence(self) -> None:
        """From here on DeepSpeed neither prints nor records."""
        self._silenced, self.monitor = self.monitor, _NO_MONITOR

    def _speak(self) -> None:
        """From here on it does again."""
        if self._silenced is not None:
            self._silenced, self.monitor = None, self._silenced

    @contextmanager
    def _in_silence(self) -> Iterator[None]:
        """Inside, DeepSpeed neither prints nor records."""
        self._silence()
        try:
            yield
        finally:
            self._speak()

    def _forget_time(self) -> None:
        """A call that did not happen took no time."""
        timer = self.timers(TRAIN_BATCH_TIMER)
        if timer.started_:  # a project's own train_batch may do without it
            timer.stop()
            timer.event_timers.pop()

    def _print(self, newest: Loss, call: int) -> None:
        """DeepSpeed's line with the newest loss, and the number of its `call`; "steps" is how many were made."""
        timer = self.timers(TRAIN_BATCH_TIMER)
        calls = len(timer.event_timers)
        if not calls:
            return  # a project's own train_batch has printed
        seconds = timer.elapsed(reset=True) / 1000.0 / calls
        if self.global_rank != 0:
            return
        losses = [("loss", newest.mean), *(newest.additional or ())]
        parts = [f"steps: {self.global_steps}", *(f"{name}: {value:0.4f}" for name, value in losses)]
        parts.insert(2, f"(of call {call}, counted from 0)")
        rate = self.train_batch_size() / max(seconds, 1e-9)
        print(*parts, f"iter time (s): {seconds:0.3f} samples/sec: {rate:0.3f}")
        if self.wall_clock_breakdown():
            self._print_waits()

    def _print_waits(self) -> None:
        """In place of DeepSpeed's pipe timers: sends wait for nobody here, receives do."""
        seconds = dict(self._links.seconds)
        waits = [f" | {n}: {1000 * (s - self._seconds_printed.get(n, 0.0)):.2f}" for n, s in seconds.items()]
        print_dist("time (ms)" + "".join(waits), ranks=[0])
        self._seconds_printed = seconds
