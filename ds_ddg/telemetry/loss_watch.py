"""Notices that a loss rises, from the losses alone, and says so once."""

from __future__ import annotations

import math
from collections import deque
from itertools import pairwise
from statistics import fmean

__all__ = ["LossWatch"]

_CALLS = 20
"""The number of calls of which a mean is taken."""
_OF_START = 0.1
"""The rise that matters, of the first mean."""
_OF_FALL = 0.3
"""The rise that matters, of what the loss had fallen by."""
_ERRORS = 8.0
"""The rise that is no chance, in standard errors of the mean, by how much losses differ from call to call."""


class LossWatch:
    """Compares the mean of the newest losses with the lowest that there was.

    A loss rises if that mean is above the lowest by a tenth of the first one, by three tenths of what it had fallen by
    until then, and by more than the noise of the losses explains. A loss that is not finite needs no comparison.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, as another training does."""
        self._losses: deque[float] = deque(maxlen=_CALLS)
        self._first = self._lowest = math.inf
        self._said = False

    def add(self, loss: float) -> str | None:
        """Take the loss of the next call; return what is wrong, the first time that something is."""
        if self._said:
            return None
        if not math.isfinite(loss):
            self._said = True
            return f"the loss is {loss}"
        self._losses.append(loss)
        if len(self._losses) < _CALLS:
            return None
        mean = fmean(self._losses)
        if self._first == math.inf:
            self._first = mean
        self._lowest = min(self._lowest, mean)
        noise = math.sqrt(fmean((b - a) ** 2 for a, b in pairwise(self._losses)) / 2 / _CALLS)
        matters = max(_OF_START * abs(self._first), _OF_FALL * (self._first - self._lowest), _ERRORS * noise)
        self._said = mean - self._lowest > matters
        if not self._said:
            return None
        return f"the loss rises: {mean:.4g}, the mean of {_CALLS} calls, was down at {self._lowest:.4g}"
