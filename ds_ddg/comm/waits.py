"""How a stage's links say what they wait for, without knowing who measures it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

__all__ = ["UNOBSERVED", "WaitObserver", "What"]

What = Literal["activation", "gradient", "loss", "data", "send", "hop"]
"""The purpose of a wait. A "hop" is one of a measurement: a message that travels to the next stage and back."""


class WaitObserver(Protocol):
    """Measures how long a stage waits."""

    def waits(self, what: What) -> AbstractContextManager[None]:
        """Return a block in which the stage waits for `what`; such blocks are not nested."""


class _Unobserved:
    """The `WaitObserver` of links that nobody measures."""

    _block = nullcontext()

    def waits(self, what: What) -> AbstractContextManager[None]:
        return self._block


UNOBSERVED: WaitObserver = _Unobserved()
