"""The receiving end of a channel, which posts receives ahead; ``sender.py`` says what travels how."""

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
from ds_ddg.comm.message import HEADER_BYTES, Capacity, Header, Kind, Message, from_parts, sizes_of, unpack
from ds_ddg.comm.p2p import ERROR_NOTICE_TAG, HEADER_TAG, ON_DEMAND_TAG, PREPOSTED_TAG, StageError, Wire

__all__ = ["Receiver"]

_LARGE = 2**20
"""Bytes from which on a message travels for longer than it takes to allocate its buffers."""


class Receiver:
    """Receives the messages of another stage, in the order in which they were sent.

    Args:
        wire: the wire from the sender.
        staging: puts tensors on the device of this stage; None: they stay in host memory.
    """

    def __init__(self, wire: Wire, staging: Staging | None = None) -> None:
        self.wire, self.staging = wire, staging
        self._capacity: Capacity = ()
        """Sizes of the receives that are posted ahead."""
        self._preposted: tuple[list[Tensor], list[Any]] | None = None
        self._header, self._header_bytes = _header_buffer()
        self._header_work: Any = None
        """The receive of the next header; each is read before the next is posted, so one buffer is enough."""
        error_notice, self._error_notice_bytes = _header_buffer()
        self._error_notice_work = wire.recv(error_notice, ERROR_NOTICE_TAG, "it cannot be listened to")
        self._error_notice: str | None = None
        self._asking = Lock()  # the main thread may learn of a loss, and the one that sends
        wire.peer.error_notices.append(self._raise_error_notice)
        self.listen()

    def listen(self, what: str = "a message") -> None:
        """Post the receives for the next message unless they are posted; otherwise `take` does, and waits longer."""
        if self._header_work is None:
            self._header_work = self.wire.recv(self._header, HEADER_TAG, _waited(what))
            if self._capacity and self._preposted is None:
                self._preposted = self._post(self._capacity, PREPOSTED_TAG, what)

    def take(self, *expected: Kind, what: str = "a message", patience: timedelta | None = None) -> Message:
        """Wait for the next message and return it.

        Args:
            *expected: the kinds that the message may have.
            what: name of what this stage waits for, in errors.
            patience: the longest wait; default: the timeout of the group.

        Raises:
            StageError: the sender failed, or has left, or is lost, or the wait timed out.
            RuntimeError: the message is of a kind not `expected`; the ranks are out of step.
        """
        header = self._take_header(what, patience)
        if header.kind is Kind.RESHAPE:
            self._take_preposted(what)
            self._capacity = header.info["capacity"]
            header = self._take_header(what, patience)
        tensors: list[Tensor | None] = []
        if header.kind is Kind.FLUSH:
            self._take_preposted(what)
            self._capacity = ()
        elif header.inline is not None:
            tensors = unpack(header.spec, header.inline)
        else:
            sizes = sizes_of(header.spec)
            parts = self._take_preposted(what)[: len(sizes)] if header.preposted else self._receive(sizes, what)
            filled = [self._filled(part, size) for part, size in zip(parts, sizes, strict=True)]
            tensors = from_parts(header.spec, filled)
        if header.kind not in expected:
            self._refuse(header.kind, expected, what)
        if self.staging is not None and tensors:
            tensors = self.staging.to_device(tensors)
        if header.preposted and sum(self._capacity) >= _LARGE:
            # Gloo sends once the receive is posted. The first stage and the last send only right before they need the
            # next message, so they would post too late, and no slack would hide how long it travels.
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

    def _post(self, capacity: Capacity, tag: int, what: str) -> tuple[list[Tensor], list[Any]]:
        allocate = partial(torch.empty, dtype=torch.uint8) if self.staging is None else self.staging.host_buffer
        parts = [allocate(size) for size in capacity]
        return parts, [self.wire.recv(part, tag, _waited(what)) for part in parts]

    def _filled(self, part: Tensor, size: int) -> Tensor:
        """Return the bytes that arrived; a buffer much larger than they are is not kept for as long as they live."""
        filled = part[:size]
        return filled.clone() if self.staging is None and 2 * size < part.numel() else filled

    def _take_preposted(self, what: str) -> list[Tensor]:
        if self._preposted is None:
            return []
        parts, works = self._preposted
        self._preposted = None
        self._wait(works, what)
        return parts

    def _receive(self, sizes: Capacity, what: str) -> list[Tensor]:
        parts, works = self._post(sizes, ON_DEMAND_TAG, what)
        self._wait(works, what)
        return parts

    def _wait(self, works: Sequence[Any], what: str, patience: timedelta | None = None) -> None:
        for work in works:
            self.wire.wait(work, _waited(what), patience)

    def _raise_error_notice(self) -> None:
        """Raise StageError if the sender had time to say why it failed."""
        with self._asking:
            if self._error_notice_work is not None:
                work, self._error_notice_work = self._error_notice_work, None  # to be waited on once
                try:
                    work.wait(timedelta(milliseconds=1))
                except RuntimeError:
                    return
                self._error_notice = Header.decode(self._error_notice_bytes).info["text"]
        if self._error_notice is not None:
            raise StageError(self._error_notice)


def _header_buffer() -> tuple[Tensor, memoryview]:
    buffer = torch.empty(HEADER_BYTES, dtype=torch.uint8)
    return buffer, buffer.numpy().data


def _waited(what: str) -> str:
    return f"this stage waited for {what} from it"
