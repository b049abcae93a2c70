"""Asynchronous messages between two stages: an outbox that never blocks and an inbox that listens ahead.

Every message has buffers of its own: the sender's live until they are sent, the receiver's belong to whoever takes the
message. DeepSpeed's ``p2p`` blocks and receives into shared buffers, so it cannot be used here.

The receiver has a receive posted for the next header. The shape of the first training message becomes the *standing*
one: from then on a receive for its tensors is posted too, so that they travel while this stage computes. Messages of
another shape (evaluation, say) are received on demand, and tensors of a few bytes ride in the header. When training
has gone over to another shape for good, that becomes the standing one. Both sides derive which is which from the
messages alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ds_ddg.message import (
    HEADER_BYTES,
    INLINE_BYTES,
    Header,
    Kind,
    Message,
    Spec,
    bytes_of,
    empty,
    fit,
    spec_of,
    unpack,
)
from ds_ddg.wire import StageError, Wire

__all__ = ["Inbox", "Outbox"]

_SETTLED = 4
"""So many messages of one other shape in a row, and it becomes the standing one; that costs one message of the old."""

_HEADER_TAG, _STANDING_TAG, _ON_DEMAND_TAG, _LAST_WORDS_TAG = 0, 1, 2, 3

_under_way: WeakKeyDictionary[dist.ProcessGroup, list[Any]] = WeakKeyDictionary()
"""What outboxes have sent, as long as their group lives. A send is withdrawn when its handle goes, and the peer would
wait for ever: so handles must outlive an engine that failed, or is done, and is dropped before all has arrived."""


@dataclass
class Outbox:
    """Sends messages to another stage without waiting for it.

    Args:
        wire: where to.
        depth: data messages that may be on their way; the schedule guarantees that an older one has arrived, so
            waiting for it never blocks.
    """

    wire: Wire
    depth: int
    _sent: deque[tuple[Kind, list[tuple[Any, Tensor]]]] = field(default_factory=deque)
    _data: int = 0
    _standing: Spec | None = None
    _other: Spec | None = None
    _others: int = 0

    def __post_init__(self) -> None:
        _under_way.setdefault(self.wire.group, []).append(self._sent)

    @property
    def pending(self) -> int:
        """Messages not known to have arrived."""
        return len(self._sent)

    def post(self, kind: Kind, tensors: Sequence[Tensor | None] = (), recurs: bool = True, **info: Any) -> None:
        """Send one message; `tensors` must not be written to afterwards.

        Args:
            kind: what it is about.
            tensors: its tensors; None where there is none.
            recurs: whether more of the same shape will follow, so that it may become the standing one.
            **info: small values that JSON can hold.
        """
        payload = [None if t is None else _plain(t.detach()) for t in tensors]
        spec, parts = spec_of(payload), bytes_of(payload)
        if sum(part.numel() for part in parts) <= INLINE_BYTES:
            inline = b"".join(part.numpy().tobytes() for part in parts)
            works = [self._send(Header(kind, info, spec, inline=inline).encode(), _HEADER_TAG)]
        else:
            works = self._reshape(spec) if recurs else []
            standing = spec == self._standing
            works += [self._send(Header(kind, info, spec, standing, recurs).encode(), _HEADER_TAG)]
            works += [self._send(part, _STANDING_TAG if standing else _ON_DEMAND_TAG) for part in parts]
            if self._standing is None and recurs:
                self._standing = spec
        self._sent.append((kind, works))
        # A call may send no data at all (DeepSpeed's own schedule), so what announces calls is bounded as well.
        self._data += kind is Kind.DATA
        while self._data > self.depth or len(self._sent) > 2 * self.depth + 2:
            self._settle_oldest()

    def _reshape(self, spec: Spec) -> list[tuple[Any, Tensor]]:
        """If messages are of another shape by now, let the receiver drop its standing receive."""
        self._others = self._others + 1 if spec == self._other else 1
        self._other = spec
        if self._standing in (None, spec) or self._others < _SETTLED:
            return []
        works = [self._send(Header(Kind.RESHAPE, {}).encode(), _HEADER_TAG)]
        works += [self._send(part, _STANDING_TAG) for part in bytes_of(empty(self._standing or ()))]
        self._standing = None
        return works

    def park(self) -> None:
        """Let the receiver drop its standing receive (by filling it once more), then wait until all has arrived.

        Two stages that park at once must both `listen` before.
        """
        works = [self._send(Header(Kind.PARK, {}).encode(), _HEADER_TAG)]
        works += [self._send(part, _STANDING_TAG) for part in bytes_of(empty(self._standing or ()))]
        self._standing = None
        self._sent.append((Kind.PARK, works))
        while self._sent:
            self._settle_oldest()

    def settle(self, patience: timedelta) -> None:
        """Wait until all has arrived.

        Raises:
            StageError: the receiver is lost, or one message took longer than `patience`.
        """
        while self._sent:
            self._settle_oldest(patience)

    def post_error(self, text: str, patience: timedelta = timedelta(seconds=5)) -> None:
        """Tell the peer, as far as it can still be reached, that this stage failed.

        Twice: behind all messages before it, and as last words, for which a receive is always posted. Those arrive at
        once however busy the peer is, and are read if the connection breaks before the former could be.
        """
        message = Header(Kind.ERROR, {"text": fit(text)}).encode()
        try:
            in_turn, last_words = (self._send(message, tag) for tag in (_HEADER_TAG, _LAST_WORDS_TAG))
            self._sent.append((Kind.ERROR, [in_turn]))
            self.wire.wait(last_words[0], "it did not hear of a failure", patience)
        except StageError:
            return  # the peer is gone or stuck; it learns of the failure from the broken connection

    def _send(self, part: Tensor, tag: int) -> tuple[Any, Tensor]:
        return self.wire.send(part, tag), part

    def _settle_oldest(self, patience: timedelta | None = None) -> None:
        kind, works = self._sent.popleft()
        self._data -= kind is Kind.DATA
        for work, _ in works:
            self.wire.wait(work, "a message to it did not arrive", patience)


def _plain(tensor: Tensor) -> Tensor:
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor if tensor.is_contiguous() else tensor.contiguous()


class Inbox:
    """Receives the messages of another stage, in the order in which they were sent.

    Args:
        wire: where from.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._standing: Spec | None = None
        self._standing_receive: tuple[list[Tensor | None], list[Any]] | None = None
        self._header: tuple[Tensor, Any] | None = None
        self._last_words = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        self._last_words_work = wire.recv(self._last_words, _LAST_WORDS_TAG, "it cannot be listened to")
        wire.last_words = self._raise_last_words
        self.listen()

    def listen(self, what: str = "a message") -> None:
        """Post the receives for the next message, if they are not; `take` would do it, and wait that much longer."""
        if self._header is None:
            header = torch.empty(HEADER_BYTES, dtype=torch.uint8)
            self._header = header, self.wire.recv(header, _HEADER_TAG, _waited(what))
            if self._standing is not None and self._standing_receive is None:
                self._standing_receive = self._post(self._standing, _STANDING_TAG, what)

    def take(self, *expected: Kind, what: str = "a message", patience: timedelta | None = None) -> Message:
        """Wait for the next message and hand it over; `what` says in errors what was waited for.

        Raises:
            StageError: the sender failed, or has left, or is lost, or the wait timed out.
            RuntimeError: the message is of a kind not `expected`; the ranks are out of step.
        """
        header = self._take_header(what, patience)
        if header.kind is Kind.RESHAPE:
            self._take_standing(what)
            self._standing = None
            header = self._take_header(what, patience)
        tensors: list[Tensor | None] = []
        if header.kind is Kind.PARK:
            self._take_standing(what)
            self._standing = None
        elif header.inline is not None:
            tensors = unpack(header.spec, header.inline)
        else:
            tensors = self._take_standing(what) if header.standing else self._receive(header.spec, what)
            if self._standing is None and header.recurs:
                self._standing = header.spec
        if header.kind not in expected:
            self._refuse(header.kind, expected, what)
        return Message(header.kind, header.info, tuple(tensors))

    def _take_header(self, what: str, patience: timedelta | None) -> Header:
        self.listen(what)
        assert self._header is not None
        received, work = self._header
        self._header = None
        self._wait([work], what, patience)
        header = Header.decode(received)
        if header.kind is Kind.ERROR:
            raise StageError(header.info["text"])
        return header

    def _refuse(self, kind: Kind, expected: Sequence[Kind], what: str) -> None:
        if kind is Kind.LEAVE:
            raise StageError(
                f"{self.wire.name} has left: its script ended, or dropped its engine, while this stage waited for "
                f"{what}; make the same number of calls on every rank"
            )
        raise RuntimeError(
            f"the ranks are out of step: expected {what} ({' or '.join(kind.name for kind in expected)}) from "
            f"{self.wire.name}, got {kind.name}; "
            "make the same calls (train_batch, eval_batch, drain, ...) in the same order on every rank"
        )

    def _post(self, spec: Spec, tag: int, what: str) -> tuple[list[Tensor | None], list[Any]]:
        tensors = empty(spec)
        return tensors, [self.wire.recv(part, tag, _waited(what)) for part in bytes_of(tensors)]

    def _take_standing(self, what: str) -> list[Tensor | None]:
        if self._standing_receive is None:
            return []
        tensors, works = self._standing_receive
        self._standing_receive = None
        self._wait(works, what)
        return tensors

    def _receive(self, spec: Spec, what: str) -> list[Tensor | None]:
        tensors, works = self._post(spec, _ON_DEMAND_TAG, what)
        self._wait(works, what)
        return tensors

    def _wait(self, works: Sequence[Any], what: str, patience: timedelta | None = None) -> None:
        for work in works:
            self.wire.wait(work, _waited(what), patience)

    def _raise_last_words(self) -> None:
        """If the sender had time to say why it leaves, raise that."""
        try:
            self._last_words_work.wait(timedelta(milliseconds=1))
        except RuntimeError:
            return
        raise StageError(Header.decode(self._last_words).info["text"])


def _waited(what: str) -> str:
    return f"this stage waited for {what} from it"
