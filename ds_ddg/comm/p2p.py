"""Raw bytes between this stage and one other, in a lane of a process group that all stages of a pipeline share.

Sends and receives go to the group itself: ``dist.isend`` and ``irecv`` check per message what never changes here, at a
good part of the cost of a small one.

A work handle of gloo must be waited on exactly once (twice hangs).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "HEADER_TAG",
    "LAST_WORDS_TAG",
    "NOTICED_WITHIN",
    "ON_DEMAND_TAG",
    "STANDING_TAG",
    "Peer",
    "StageError",
    "Wire",
    "timed_out",
]

HEADER_TAG, STANDING_TAG, ON_DEMAND_TAG, LAST_WORDS_TAG = range(4)
_TAGS = 8
_PROBE_TAG = 2**31 - 1
"""Nothing is ever sent with it."""
NOTICED_WITHIN = 1.0
"""Seconds in which every group of this process notices that another process has ended."""


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
        self._global_rank = rank
        self.last_words: list[Callable[[], None]] = []
        """Called when it turns out to be lost; each may raise what it said before."""

    @property
    def connected(self) -> bool:
        """False once this group has noticed that the connection is broken. Waits for nothing."""
        return _connected(self.group, self.rank)

    def gave_up(self) -> bool:
        """Of a broken connection: whether its process lives on, as after a wait that timed out there."""
        # A process that ends closes the connections of all its groups; gloo those of one, where a wait has timed out.
        if not dist.is_initialized() or dist.get_backend() != "gloo":
            return False
        world, deadline = dist.group.WORLD, time.monotonic() + NOTICED_WITHIN
        assert world is not None
        while _connected(world, self._global_rank):
            if time.monotonic() > deadline:
                return True
            time.sleep(0.01)
        return False


def _connected(group: dist.ProcessGroup, rank: int) -> bool:
    try:
        group.recv([torch.empty(1, dtype=torch.uint8)], rank, _PROBE_TAG)  # gloo refuses it at once, or forgets it
    except RuntimeError:
        return False
    return True


def timed_out(reason: str) -> bool:
    """Whether an error of gloo's says that a wait was too long, and so nothing of the other's fate."""
    return "timed out" in reason.lower() or "timeout" in reason.lower()


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
        if timed_out(reason):
            fate = "has not answered (it is stuck, or waits for another stage itself)"
        else:
            fate = "has given up waiting for another stage" if self.peer.gave_up() else "is lost"
        raise StageError(f"{self.peer.name} {fate}: {why} ({reason})") from error
