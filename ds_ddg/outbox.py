"""Sending messages to another stage, without waiting for it.

Every message has buffers of its own, which live until they have arrived. DeepSpeed's ``p2p`` blocks and receives into
shared buffers, so it cannot be used here.

The shape of the first training message becomes the *standing* one: from then on the receiver has receives posted for
tensors of that shape, so that they travel while it computes. Messages of another shape (evaluation, say) are received
on demand, and tensors of a few bytes ride in the header. When training has gone over to another shape for good, that
becomes the standing one. Both sides (the other is ``inbox.py``) derive which is which from the messages alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor

from ds_ddg.message import INLINE_BYTES, Header, Kind, Spec, bytes_of, empty, fit, spec_of
from ds_ddg.wire import HEADER_TAG, LAST_WORDS_TAG, ON_DEMAND_TAG, STANDING_TAG, StageError, Wire

__all__ = ["Outbox"]

_SETTLED = 4
"""So many messages of one other shape in a row, and it becomes the standing one; that costs one message of the old."""

_under_way: WeakKeyDictionary[dist.ProcessGroup, list[Any]] = WeakKeyDictionary()
"""What outboxes have sent, as long as their group lives. A send is withdrawn when its handle goes, and the peer would
wait for ever: so handles must outlive an engine that failed, or is done, and is dropped before all has arrived."""


@dataclass
class Outbox:
    """Sends messages to another stage without waiting for it.

    Args:
        wire: where to.
        depth: data messages that may be on their way. In a call the schedule guarantees that an older one has
            arrived, so waiting for it never blocks; in a drain, where a stage sends without receiving, a post may wait
            until the receiver has come so far, which it does without this stage.
    """

    wire: Wire
    depth: int
    _sent: deque[tuple[Kind, list[tuple[Any, Tensor]]]] = field(default_factory=deque)
    _data: int = 0
    _standing: Spec | None = None
    _other: Spec | None = None
    _others: int = 0

    def __post_init__(self) -> None:
        _under_way.setdefault(self.wire.peer.group, []).append(self._sent)

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
            **info: small plain values.
        """
        payload = [None if t is None else _plain(t.detach()) for t in tensors]
        spec, parts = spec_of(payload), bytes_of(payload)
        if sum(part.numel() for part in parts) <= INLINE_BYTES:
            inline = b"".join(part.numpy().tobytes() for part in parts)
            works = [self._send(Header(kind, info, spec, inline=inline).encode(), HEADER_TAG)]
        else:
            works = self._reshape(spec) if recurs else []
            standing = spec == self._standing
            works += [self._send(Header(kind, info, spec, standing, recurs).encode(), HEADER_TAG)]
            works += [self._send(part, STANDING_TAG if standing else ON_DEMAND_TAG) for part in parts]
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
        settled = self._standing not in (None, spec) and self._others >= _SETTLED
        return self._release(Kind.RESHAPE) if settled else []

    def park(self) -> None:
        """Let the receiver drop its standing receive, then wait until all has arrived.

        Two stages that park at once must both `listen` before.
        """
        self._sent.append((Kind.PARK, self._release(Kind.PARK)))
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
            in_turn, last_words = (self._send(message, tag) for tag in (HEADER_TAG, LAST_WORDS_TAG))
            self._sent.append((Kind.ERROR, [in_turn]))
            self.wire.wait(last_words[0], "it did not hear of a failure", patience)
        except StageError:
            return  # the peer is gone or stuck; it learns of the failure from the broken connection

    def _release(self, kind: Kind) -> list[tuple[Any, Tensor]]:
        """Let the receiver drop its standing receive, by filling it once more."""
        works = [self._send(Header(kind, {}).encode(), HEADER_TAG)]
        works += [self._send(part, STANDING_TAG) for part in bytes_of(empty(self._standing or ()))]
        self._standing = None
        return works

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
