"""Links with a latency of one's choice: what a slow network does to a schedule, on one machine.

    with added_latency(0.045):
        engine, *_ = ds_ddg.initialize(...)     # every message of the engine arrives 45 ms later

A message waits in a queue at its sender and goes on its way when its time has come, so that many can be under way at
once, as on a real network. DeepSpeed's own schedule has links of its own, which this does not touch.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ds_ddg.comm import channels
from ds_ddg.comm.p2p import Wire


class _Late:
    """The handle of a send that has not begun: waits for it to begin, then for it."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.work: Any = None
        self.error: RuntimeError | None = None

    def wait(self, *patience: Any) -> None:
        self.begun.wait()
        if self.error is not None:
            raise self.error
        self.work.wait(*patience)


@contextmanager
def added_latency(seconds: float) -> Iterator[None]:
    """Inside this block links that are opened deliver each message so much later; 0 changes nothing."""

    class LateWire(Wire):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._outgoing: queue.SimpleQueue[tuple[float, Any, int, _Late]] = queue.SimpleQueue()
            threading.Thread(target=self._forward, daemon=True).start()

        def send(self, part: Any, tag: int) -> Any:
            late = _Late()
            self._outgoing.put((time.perf_counter() + seconds, part, tag, late))
            return late

        def _forward(self) -> None:
            while True:
                due, part, tag, late = self._outgoing.get()
                time.sleep(max(0.0, due - time.perf_counter()))
                try:
                    late.work = super().send(part, tag)
                except RuntimeError as error:
                    late.error = error
                late.begun.set()

    original, channels.Wire = channels.Wire, LateWire if seconds else Wire
    try:
        yield
    finally:
        channels.Wire = original
