"""Raw bytes between this stage and one other, in a lane of a process group that all stages of a pipeline share.

Sends and receives go to the group itself: ``dist.isend`` and ``irecv`` check per message what never changes here, at a
good part of the cost of a small one.

A work handle of gloo must be waited on exactly once (twice hangs).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist
from torch import Tensor

__all__ = ["HEADER_TAG", "LAST_WORDS_TAG", "ON_DEMAND_TAG", "STANDING_TAG", "Peer", "StageError", "Wire"]

HEADER_TAG, STANDING_TAG, ON_DEMAND_TAG, LAST_WORDS_TAG = range(4)
_TAGS = 8


class StageError(RuntimeError):
    """Another stage failed, left or was lost; the message says which and why."""


class Peer:
    """Another stage, as this one reaches it.

    Args:
        group: a gloo process group of this project's own.
        rank: global rank of the other.
        name: what errors call it, such as "stage 1 (rank 1)".
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, name: str) -> None:
        self.group, self.name = group, name
        self.rank = dist.get_group_rank(group, rank)
        self.last_words: list[Callable[[], None]] = []
        """Called when it turns out to be lost; each may raise what it said before."""


class Wire:
    """Asynchronous sends and receives of byte tensors.

    Args:
        peer: the other stage.
        lane: tells apart what travels to one peer for different purposes, 0 and up. Gloo matches messages by tag, so
            a receive pending in one lane delays nothing in another, as if each had a group of its own; but each group
            has a thread that wakes up a hundred times a second.
    """

    def __init__(self, peer: Peer, lane: int = 0) -> None:
        self.peer, self._lane = peer, lane

    def send(self, part: Tensor, tag: int) -> Any:
        """Start to send, with a tag below 8; `part` and the handle returned must live until it has arrived."""
        try:
            return self.peer.group.send([part], self.peer.rank, self._lane * _TAGS + tag)
        except RuntimeError as error:
            self._raise_lost("a message could not be sent to it", error)

    def recv(self, part: Tensor, tag: int, why: str) -> Any:
        """Start to receive into `part`; a handle to wait on. StageError with `why` if the other is lost."""
        try:
            return self.peer.group.recv([part], self.peer.rank, self._lane * _TAGS + tag)
        except RuntimeError as error:
            self._raise_lost(why, error)

    def wait(self, work: Any, why: str, patience: timedelta | None = None) -> None:
        """Wait on a handle; StageError with `why` if the other is lost or `patience` (default: the group's) ends."""
        try:
            work.wait() if patience is None else work.wait(patience)
        except RuntimeError as error:
            self._raise_lost(why, error)

    def _raise_lost(self, why: str, error: RuntimeError) -> NoReturn:
        for last_words in self.peer.last_words:
            last_words()
        reason = str(error).splitlines()[0].partition(". This is typically")[0]
        raise StageError(f"{self.peer.name} is lost: {why} ({reason})") from error
