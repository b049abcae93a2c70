"""Messages between all ranks of a job, for moments that concern every one of them, such as a checkpoint.

In a collective of gloo a rank talks to some of the others only, so it would not hear that a rank is lost, and no error
could say which. An exchange makes every rank wait for all, so it belongs where they wait anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch

from ds_ddg.comm.message import HEADER_BYTES, Header, Kind
from ds_ddg.comm.p2p import HEADER_TAG, Peer, StageError, Wire

__all__ = ["AllRanks"]

_LANE = 5
"""The lane of these messages; a pipeline uses those below."""


class AllRanks:
    """The other ranks, as this one reaches them.

    Args:
        peers: one for each other rank.
    """

    def __init__(self, peers: Iterable[Peer]) -> None:
        self._wires = [Wire(peer, _LANE) for peer in peers]
        self._sent: list[tuple[Wire, Any, torch.Tensor]] = []
        """Sends under way, with their handles: gloo withdraws a send when its handle is freed."""

    def gone(self) -> list[Peer]:
        """Return the peers whose connection is broken, as far as that has been noticed; asking waits for nothing."""
        return [wire.peer for wire in self._wires if not wire.peer.connected]

    def tell(self, **info: Any) -> None:
        """Send `info` to each rank still there, in place of an `exchange` in which this rank cannot take part."""
        message = Header(Kind.DATA, info).encode()
        self._sent = []
        for wire in self._wires:
            with suppress(StageError):
                self._sent.append((wire, wire.send(message, HEADER_TAG), message))

    def exchange(self, what: str, **info: Any) -> list[dict[str, Any]]:
        """Send `info` to each of the other ranks and wait for theirs; every rank must call it.

        Args:
            what: name of what the ranks are doing, for errors.
            **info: small plain values.

        Returns:
            The messages of the other ranks, up to the first rank that has failed for good.

        Raises:
            StageError: another rank is lost, or the wait timed out.
        """
        buffers = [torch.empty(HEADER_BYTES, dtype=torch.uint8) for _ in self._wires]
        why = f"this rank waited for it in {what}"
        pending = [wire.recv(buffer, HEADER_TAG, why) for wire, buffer in zip(self._wires, buffers, strict=True)]
        self.tell(what=what, **info)
        heard = []
        for wire, work, buffer in zip(self._wires, pending, buffers, strict=True):
            wire.wait(work, why)
            heard.append(Header.decode(buffer.numpy().data).info)
            if heard[-1].get("fatal"):
                return heard  # that rank listens no more, and soon no rank will
        sent, self._sent = self._sent, []
        for wire, work, _ in sent:
            wire.wait(work, why)
        return heard
