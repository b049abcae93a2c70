"""Asynchronous messages between two stages: an outbox that never blocks and an inbox that is always listening.

Every message has buffers of its own: the sender's live until they are sent, the receiver's belong to whoever takes the
message. DeepSpeed's ``p2p`` blocks and receives into shared buffers, so it cannot be used here.

The receiver always has one header receive posted. The shape of the first training message becomes the *standing* one:
from then on a receive for its tensors is posted too, so that they travel while this stage computes. Messages of
another shape (evaluation, say) are received on demand, and tensors of a few bytes ride in the header. Both sides
derive which is which from the messages alone.

Sends and receives go to the group itself: ``dist.isend`` and ``irecv`` check per message what never changes here, at a
good part of the cost of a small one.

A work handle of gloo must be waited on exactly once (twice hangs), so handles are popped when they are waited on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn
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

__all__ = ["Inbox", "Outbox", "StageError"]

_HEADER_TAG, _STANDING_TAG, _ON_DEMAND_TAG, _LAST_WORDS_TAG = 0, 1, 2, 3

_under_way: WeakKeyDictionary[dist.ProcessGroup, list[Any]] = WeakKeyDictionary()
"""What outboxes have sent, as long as their group lives. A send is withdrawn when its handle goes, and the peer would
wait for ever: so handles must outlive an engine that failed, or is done, and is dropped before all has arrived."""


class StageError(RuntimeError):
    """Another stage failed, left or was lost; the message says which and why."""


@dataclass
class Outbox:
    """Sends messages to global rank `peer` without waiting for it.

    Args:
        group: a gloo process group of this stage, its neighbour and no other traffic in this direction.
        peer: global rank of the receiver.
        name: what errors call the receiver, such as "stage 1 (rank 1)".
        depth: data messages that may be on their way; the schedule guarantees that an older one has arrived, so
            waiting for it never blocks.
    """

    group: dist.ProcessGroup
    peer: int
    name: str
    depth: int
    _sent: deque[tuple[Kind, list[tuple[Any, Tensor]]]] = field(default_factory=deque)
    _standing: Spec | None = None

    def __post_init__(self) -> None:
        _under_way.setdefault(self.group, []).append(self._sent)

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
        payload = [None if t is None else t.detach().resolve_conj().resolve_neg().contiguous() for t in tensors]
        spec, parts = spec_of(payload), bytes_of(payload)
        if sum(part.numel() for part in parts) <= INLINE_BYTES:
            inline = b"".join(part.numpy().tobytes() for part in parts)
            works = [self._send(Header(kind, info, spec, inline=inline).encode(), _HEADER_TAG)]
        else:
            standing = spec == self._standing
            works = [self._send(Header(kind, info, spec, standing, recurs).encode(), _HEADER_TAG)]
            works += [self._send(part, _STANDING_TAG if standing else _ON_DEMAND_TAG) for part in parts]
            if self._standing is None and recurs:
                self._standing = spec
        self._sent.append((kind, works))
        # A call may send no data at all (DeepSpeed's own schedule), so what announces calls is bounded as well.
        while sum(sent is Kind.DATA for sent, _ in self._sent) > self.depth or len(self._sent) > 2 * self.depth + 2:
            self._settle_oldest()

    def park(self) -> None:
        """Let the receiver drop its standing receive (by filling it once more), then wait until all has arrived."""
        works = [self._send(Header(Kind.PARK, {}).encode(), _HEADER_TAG)]
        works += [self._send(part, _STANDING_TAG) for part in bytes_of(empty(self._standing or ()))]
        self._standing = None
        self._sent.append((Kind.PARK, works))
        while self._sent:
            self._settle_oldest()

    def settle(self, patience: timedelta) -> None:
        """Wait until all has arrived; not longer than `patience` for one message, and not for a peer that is gone."""
        while self._sent:
            for work, _ in self._sent.popleft()[1]:
                try:
                    work.wait(patience)
                except RuntimeError:
                    return

    def post_error(self, text: str, patience: timedelta = timedelta(seconds=5)) -> None:
        """Tell the peer, as far as it can still be reached, that this stage failed.

        Twice: behind all messages before it, and as last words, for which a receive is always posted. Those arrive at
        once however busy the peer is, and are read if the connection breaks before the former could be.
        """
        message = Header(Kind.ERROR, {"text": fit(text)}).encode()
        try:
            in_turn, last_words = (self._send(message, tag) for tag in (_HEADER_TAG, _LAST_WORDS_TAG))
            self._sent.append((Kind.ERROR, [in_turn]))
            last_words[0].wait(patience)
        except RuntimeError:
            return  # the peer is gone or stuck; it learns of the failure from the broken connection

    def _send(self, part: Tensor, tag: int) -> tuple[Any, Tensor]:
        try:
            return self.group.send([part], dist.get_group_rank(self.group, self.peer), tag), part
        except RuntimeError as error:
            _raise_lost(self.name, "a message could not be sent to it", error)

    def _settle_oldest(self) -> None:
        for work, _ in self._sent.popleft()[1]:
            try:
                work.wait()
            except RuntimeError as error:
                _raise_lost(self.name, "a message to it did not arrive", error)


class Inbox:
    """Receives the messages of global rank `peer`, in the order in which they were sent.

    Args:
        group: a gloo process group of this stage, its neighbour and no other traffic in this direction.
        peer: global rank of the sender.
        name: what errors call the sender, such as "stage 1 (rank 1)".
    """

    def __init__(self, group: dist.ProcessGroup, peer: int, name: str) -> None:
        self.group = group
        self.peer = peer
        self.name = name
        self._standing: Spec | None = None
        self._standing_receive: tuple[list[Tensor | None], list[Any]] | None = None
        self._header = self._post_header()
        self._last_words = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        self._last_words_work = self._irecv(self._last_words, _LAST_WORDS_TAG)

    def take(self, *expected: Kind, what: str = "a message") -> Message:
        """Wait for the next message and hand it over; `what` says in errors what was waited for.

        Raises:
            StageError: the sender failed, or is lost, or the wait timed out.
            RuntimeError: the message is of a kind not `expected`; the ranks are out of step.
        """
        received, work = self._header
        self._wait(work, what)
        header = Header.decode(received)
        if header.kind is Kind.ERROR:
            raise StageError(header.info["text"])
        self._header = self._post_header()
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
            if self._standing is not None and self._standing_receive is None:
                self._standing_receive = self._post(self._standing, _STANDING_TAG)
        message = Message(header.kind, header.info, tuple(tensors))
        if message.kind not in expected:
            names = " or ".join(kind.name for kind in expected)
            raise RuntimeError(
                f"the ranks are out of step: expected {what} ({names}) from {self.name}, got {message.kind.name}; "
                "make the same calls (train_batch, eval_batch, drain, ...) in the same order on every rank"
            )
        return message

    def _post_header(self) -> tuple[Tensor, Any]:
        header = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        return header, self._irecv(header, _HEADER_TAG)

    def _post(self, spec: Spec, tag: int) -> tuple[list[Tensor | None], list[Any]]:
        tensors = empty(spec)
        return tensors, [self._irecv(part, tag) for part in bytes_of(tensors)]

    def _take_standing(self, what: str) -> list[Tensor | None]:
        if self._standing_receive is None:
            return []
        tensors, works = self._standing_receive
        self._standing_receive = None
        for work in works:
            self._wait(work, what)
        return tensors

    def _receive(self, spec: Spec, what: str) -> list[Tensor | None]:
        tensors, works = self._post(spec, _ON_DEMAND_TAG)
        for work in works:
            self._wait(work, what)
        return tensors

    def _irecv(self, part: Tensor, tag: int) -> Any:
        try:
            return self.group.recv([part], dist.get_group_rank(self.group, self.peer), tag)
        except RuntimeError as error:
            _raise_lost(self.name, "it cannot be listened to", error)

    def _wait(self, work: Any, what: str) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            self._raise_last_words()
            _raise_lost(self.name, f"this stage waited for {what} from it", error)

    def _raise_last_words(self) -> None:
        """If the sender had time to say why it leaves, raise that."""
        try:
            self._last_words_work.wait(timedelta(milliseconds=1))
        except RuntimeError:
            return
        raise StageError(Header.decode(self._last_words).info["text"])


def _raise_lost(name: str, why: str, error: RuntimeError) -> NoReturn:
    reason = str(error).splitlines()[0].partition(". This is typically")[0]
    raise StageError(f"{name} is lost: {why} ({reason})") from error
