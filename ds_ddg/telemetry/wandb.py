"""Sends values to W&B in the order of their steps: it drops values that come late, with a warning at most.

DeepSpeed sends the learning rate of a call at once, and under the delayed schedule the loss of that call is known
some calls later. So for W&B alone, values newer than the newest complete step wait until their step is complete.
"""

from __future__ import annotations

import atexit
import math
import sys
from collections.abc import Iterable
from typing import Any

__all__ = ["InOrder"]

Event = tuple[str, Any, int]
"""The name, value and step of one value, as DeepSpeed's monitors take it."""


class InOrder:
    """Replaces a monitor that takes no value of an earlier step than it has seen.

    Args:
        monitor: DeepSpeed's monitor for W&B.
    """

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor
        self._waiting: list[Event] = []
        self._complete = math.inf
        # For a script that ends with calls in flight. W&B ends its run at exit as well, but it came first, so it
        # goes last.
        atexit.register(self._at_exit)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._monitor, name)

    def write_events(self, events: Iterable[Event]) -> None:
        """Take `events` as DeepSpeed's monitor does; they arrive sorted by step, and within a step as they came."""
        self._waiting.extend(events)
        self._send()

    def complete(self, step: float = math.inf) -> None:
        """Declare steps up to `step` complete; by default all, so that no value has to wait."""
        self._complete = step
        self._send()

    def _at_exit(self) -> None:
        if getattr(sys.modules.get("wandb"), "run", None) is not None:  # or the script has ended the run itself
            self.complete()

    def _send(self) -> None:
        ready = [event for event in self._waiting if event[2] <= self._complete]
        self._waiting = [event for event in self._waiting if event[2] > self._complete]
        if ready:
            self._monitor.write_events(sorted(ready, key=lambda event: event[2]))
