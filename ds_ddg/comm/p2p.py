"""Raw bytes between this stage and one other, in a lane of a process group that all stages of a pipeline share.

Sends and receives go to the group itself: ``dist.isend`` and ``irecv`` check per message what never changes here, at a
good part of the cost of a small message.

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
    "ERROR_NOTICE_TAG",
    "HEADER_TAG",
    "NOTICED_WITHIN",
    "ON_DEMAND_TAG",
    "PREPOSTED_TAG",
    "Peer",
    "StageError",
    "Wire",
    "timed_out",
]

HEADER_TAG, PREPOSTED_TAG, ON_DEMAND_TAG, ERROR_NOTICE_TAG = range(4)
_TAGS = 8
_PROBE_TAG = 2**31 - 1
"""A tag with which nothing is ever sent."""
NOTICED_WITHIN = 1.0
"""Seconds in which every group of this process notices that another process has ended."""


class StageError(RuntimeError):
    """Another stage failed, left or was lost; the message says which and why."""


class Peer:
    """Another stage, as this one reaches it.

    Args:
        group: a gloo process group of this project's own.
        rank: global rank of the other.
        name: the name that errors give it, such as "stage 1 (rank 1)".
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, name: str) -> None:
        self.group, self.name = group, name
        self.rank = dist.get_group_rank(group, rank)
        self._global_rank = rank
        self.error_notices: list[Callable[[], None]] = []
        """Functions called when the peer turns out to be lost; each may raise the error that the peer reported."""

    @property
    def connected(self) -> bool:
        """Whether the connection holds, as far as this group has noticed; asking waits for nothing."""
        return _connected(self.group, self.rank)

    def gave_up(self) -> bool:
        """Return whether the peer's process lives on without the connection, as it does if a wait timed out there."""
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
    """Return whether an error of gloo says that a wait was too long, which leaves open what became of the peer."""
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
        """Start to send `part`, a contiguous uint8 tensor in host memory.

        Args:
            part: the bytes; they and the handle must live until they have arrived.
            tag: below 8.

        Returns:
            A handle for `wait`.

        Raises:
            StageError: the other stage is lost.
        """
        try:
            return self.peer.group.send([part], self.peer.rank, self._lane * _TAGS + tag)
        except RuntimeError as error:
            self._raise_lost("a message could not be sent to it", error)

    def recv(self, part: Tensor, tag: int, why: str) -> Any:
        """Start to receive into `part` and return a handle for `wait`; StageError with `why` if the peer is lost."""
        try:
            return self.peer.group.recv([part], self.peer.rank, self._lane * _TAGS + tag)
        except RuntimeError as error:
            self._raise_lost(why, error)

    def wait(self, work: Any, why: str, patience: timedelta | None = None) -> None:
        """Wait until the send or receive of a handle is done; each handle may be waited for once.

        Args:
            work: the handle.
            why: what this stage waits for, in words for errors.
            patience: the longest wait; default: the timeout of the group.

        Raises:
            StageError: the other stage is lost, or did not answer in time.
        """
        try:
            work.wait() if patience is None else work.wait(patience)
        except RuntimeError as error:
            self._raise_lost(why, error)

    def _raise_lost(self, why: str, error: RuntimeError) -> NoReturn:
        for raise_notice in self.peer.error_notices:
            raise_notice()
        reason = str(error).splitlines()[0].partition(". This is typically")[0]
        if timed_out(reason):
            fate = "has not answered (it is stuck, or waits for another stage itself)"
        else:
            fate = "has given up waiting for another stage" if self.peer.gave_up() else "is lost"
        raise StageError(f"{self.peer.name} {fate}: {why} ({reason})") from error
