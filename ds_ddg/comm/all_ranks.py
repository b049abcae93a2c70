"""All ranks of a job, as one of them reaches the others: what concerns every one of them, as a checkpoint does.

In a collective of gloo's a rank only talks to some of the others, so it would not hear of the loss of another, and no
error could say which. This is for moments when every rank waits for all anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch

from ds_ddg.comm.message import HEADER_BYTES, Header, Kind
from ds_ddg.comm.p2p import HEADER_TAG, Peer, StageError, Wire

__all__ = ["Everyone"]

_LANE = 5
"""Below it are those of a pipeline."""


class Everyone:
    """The other ranks.

    Args:
        peers: each of them.
    """

    def __init__(self, peers: Iterable[Peer]) -> None:
        self._wires = [Wire(peer, _LANE) for peer in peers]
        self._sent: list[tuple[Wire, Any, torch.Tensor]] = []
        """With handles; a send is withdrawn when its handle goes."""

    def gone(self) -> list[Peer]:
        """Those to whom the connection is broken, as far as that has been noticed. Waits for nothing."""
        return [wire.peer for wire in self._wires if not wire.peer.connected]

    def tell(self, **info: Any) -> None:
        """Say it to each that is still there, in place of an `exchange` that this rank cannot take part in."""
        message = Header(Kind.DATA, info).encode()
        self._sent = []
        for wire in self._wires:
            with suppress(StageError):
                self._sent.append((wire, wire.send(message, HEADER_TAG), message))

    def exchange(self, what: str, **info: Any) -> list[dict[str, Any]]:
        """On every rank: say it to each of the others, and wait for what they say.

        Args:
            what: the ranks are doing, for errors.
            **info: small plain values.

        Raises:
            StageError: another rank is lost, or the wait timed out.
        """
        rooms = [torch.empty(HEADER_BYTES, dtype=torch.uint8) for _ in self._wires]
        why = f"this rank waited for it in {what}"
        pending = [wire.recv(room, HEADER_TAG, why) for wire, room in zip(self._wires, rooms, strict=True)]
        self.tell(what=what, **info)
        heard = []
        for wire, work, room in zip(self._wires, pending, rooms, strict=True):
            wire.wait(work, why)
            heard.append(Header.decode(room.numpy().data).info)
            if heard[-1].get("fatal"):
                return heard  # that one listens no more, and nobody will
        sent, self._sent = self._sent, []
        for wire, work, _ in sent:
            wire.wait(work, why)
        return heard
