"""Receiving the messages of another stage, listening ahead; see ``outbox.py`` for what travels how."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ds_ddg.comm.host_staging import Staging
from ds_ddg.comm.message import HEADER_BYTES, Header, Kind, Message, Room, from_parts, sizes_of, unpack
from ds_ddg.comm.p2p import HEADER_TAG, LAST_WORDS_TAG, ON_DEMAND_TAG, STANDING_TAG, StageError, Wire

__all__ = ["Inbox"]

_LARGE = 2**20
"""So many bytes travel for longer than it takes to make room for them."""


class Inbox:
    """Receives the messages of another stage, in the order in which they were sent.

    Args:
        wire: where from.
        staging: puts tensors on the device of this stage; None: they stay in host memory.
    """

    def __init__(self, wire: Wire, staging: Staging | None = None) -> None:
        self.wire, self.staging = wire, staging
        self._room: Room = ()
        """Sizes of the receive that is posted ahead, the standing one."""
        self._standing_receive: tuple[list[Tensor], list[Any]] | None = None
        self._header, self._header_bytes = _room_for_header()
        self._header_work: Any = None
        """Posted and not waited for; the header is read before the next receive is posted, so one buffer does."""
        last_words, self._last_words_bytes = _room_for_header()
        self._last_words_work = wire.recv(last_words, LAST_WORDS_TAG, "it cannot be listened to")
        self._last_words: str | None = None
        self._asking = Lock()  # the main thread may learn of a loss, and the one that sends
        wire.peer.last_words.append(self._raise_last_words)
        self.listen()

    def listen(self, what: str = "a message") -> None:
        """Post the receives for the next message, if they are not; `take` would do it, and wait that much longer."""
        if self._header_work is None:
            self._header_work = self.wire.recv(self._header, HEADER_TAG, _waited(what))
            if self._room and self._standing_receive is None:
                self._standing_receive = self._post(self._room, STANDING_TAG, what)

    def take(self, *expected: Kind, what: str = "a message", patience: timedelta | None = None) -> Message:
        """Wait for the next message and hand it over; `what` says in errors what was waited for.

        Raises:
            StageError: the sender failed, or has left, or is lost, or the wait timed out.
            RuntimeError: the message is of a kind not `expected`; the ranks are out of step.
        """
        header = self._take_header(what, patience)
        if header.kind is Kind.RESHAPE:
            self._take_standing(what)
            self._room = header.info["room"]
            header = self._take_header(what, patience)
        tensors: list[Tensor | None] = []
        if header.kind is Kind.PARK:
            self._take_standing(what)
            self._room = ()
        elif header.inline is not None:
            tensors = unpack(header.spec, header.inline)
        else:
            sizes = sizes_of(header.spec)
            parts = self._take_standing(what)[: len(sizes)] if header.standing else self._receive(sizes, what)
            held = [self._held(part, size) for part, size in zip(parts, sizes, strict=True)]
            tensors = from_parts(header.spec, held)
        if header.kind not in expected:
            self._refuse(header.kind, expected, what)
        if self.staging is not None and tensors:
            tensors = self.staging.to_device(tensors)
        if header.standing and sum(self._room) >= _LARGE:
            # Gloo sends when there is room to receive. The first stage and the last send only right before they need
            # the next message, so they would make room too late, and no slack would hide its journey.
            with suppress(StageError):  # this message is good; whoever waits for the next one hears it
                self.listen(what)
        return Message(header.kind, header.info, tuple(tensors))

    def _take_header(self, what: str, patience: timedelta | None) -> Header:
        self.listen(what)
        work, self._header_work = self._header_work, None
        self._wait([work], what, patience)
        header = Header.decode(self._header_bytes)
        if header.kind is Kind.ERROR:
            raise StageError(header.info["text"])
        return header

    def _refuse(self, kind: Kind, expected: Sequence[Kind], what: str) -> None:
        if kind is Kind.LEAVE:
            raise StageError(
                f"{self.wire.peer.name} has left: its script ended or failed, or dropped its engine, while this stage "
                f"waited for {what}; if its output tells of no failure, make the same number of calls on every rank"
            )
        raise RuntimeError(
            f"the ranks are out of step: expected {what} ({' or '.join(kind.name for kind in expected)}) from "
            f"{self.wire.peer.name}, got {kind.name}; "
            "make the same calls (train_batch, eval_batch, drain, ...) in the same order on every rank"
        )

    def _post(self, room: Room, tag: int, what: str) -> tuple[list[Tensor], list[Any]]:
        new = partial(torch.empty, dtype=torch.uint8) if self.staging is None else self.staging.room
        parts = [new(size) for size in room]
        return parts, [self.wire.recv(part, tag, _waited(what)) for part in parts]

    def _held(self, part: Tensor, size: int) -> Tensor:
        """The bytes that came, in memory that is not much larger for as long as they are needed."""
        held = part[:size]
        return held.clone() if self.staging is None and 2 * size < part.numel() else held

    def _take_standing(self, what: str) -> list[Tensor]:
        if self._standing_receive is None:
            return []
        parts, works = self._standing_receive
        self._standing_receive = None
        self._wait(works, what)
        return parts

    def _receive(self, room: Room, what: str) -> list[Tensor]:
        parts, works = self._post(room, ON_DEMAND_TAG, what)
        self._wait(works, what)
        return parts

    def _wait(self, works: Sequence[Any], what: str, patience: timedelta | None = None) -> None:
        for work in works:
            self.wire.wait(work, _waited(what), patience)

    def _raise_last_words(self) -> None:
        """If the sender had time to say why it leaves, raise that."""
        with self._asking:
            if self._last_words_work is not None:
                work, self._last_words_work = self._last_words_work, None  # to be waited on once
                try:
                    work.wait(timedelta(milliseconds=1))
                except RuntimeError:
                    return
                self._last_words = Header.decode(self._last_words_bytes).info["text"]
        if self._last_words is not None:
            raise StageError(self._last_words)


def _room_for_header() -> tuple[Tensor, memoryview]:
    room = torch.empty(HEADER_BYTES, dtype=torch.uint8)
    return room, room.numpy().data


def _waited(what: str) -> str:
    return f"this stage waited for {what} from it"
