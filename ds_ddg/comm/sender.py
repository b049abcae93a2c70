"""Sending messages to another stage, without waiting for it.

Every message has buffers of its own, which live until they have arrived. DeepSpeed's ``p2p`` blocks and receives into
shared buffers, so it cannot be used here.

From the first training message on the receiver has receives of its sizes posted, the *standing* ones, so that what
follows travels while it computes. Gloo (over TCP) fills a receive with less as well, so messages of changing shapes
travel so too where there is room for them: training messages make it larger when they need that, and smaller when they
have needed much less for a while. Others that find no room (of an evaluation, say) are received on demand, and tensors
of a few bytes ride in the header. The receiver (``inbox.py``) learns which is which from the messages alone.

Tensors on a device (``staging.py``) are copied first, and their message leaves, from a thread of its own, when that is
done; what is posted behind it waits for its turn. All else is as with tensors on the host: a message is posted, is
pending, counts against the depth and is settled in the same way, whether it has left already or not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial, reduce
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ds_ddg.comm.host_staging import Staging, refuse_other_devices
from ds_ddg.comm.message import INLINE_BYTES, Header, Kind, Room, bytes_of, fit, fits, larger, spec_of
from ds_ddg.comm.p2p import HEADER_TAG, LAST_WORDS_TAG, ON_DEMAND_TAG, STANDING_TAG, StageError, Wire

__all__ = ["Outbox"]

_Tagged = list[tuple[Tensor, int]]
"""What a message consists of, each with its tag."""
_Works = list[tuple[Any, Tensor]]
"""Sends under way: handles, and what is sent."""

_SMALL = 16
"""So many messages in a row that fill less than half of the room, and it shrinks."""

_NEXT_TO_NOTHING = torch.zeros(1, dtype=torch.uint8)

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
        staging: copies tensors from the device of this stage; None: they are in host memory.
    """

    wire: Wire
    depth: int
    staging: Staging | None = None
    _sent: deque[tuple[Kind, _Works | Future[_Works]]] = field(default_factory=deque)
    _data: int = 0
    _room: Room = ()
    """Of the receives that the receiver has standing."""
    _small: list[Room] = field(default_factory=list)
    """The sizes of the latest training messages, if they left more than half of it empty."""
    _failure: StageError | None = None
    """What went wrong on the sender's thread."""

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
            recurs: whether more of its kind will follow, so that there should be standing room for it.
            **info: small plain values.

        Raises:
            ValueError: a header cannot hold the types and shapes of `tensors`, or one is on another device.
            StageError: the receiver is lost, or an earlier message could not leave this stage's device.
        """
        refuse_other_devices(tensors, self.staging)
        payload = [None if t is None else _plain(t.detach()) for t in tensors]
        copied = None
        if self.staging is not None:
            payload, copied = self.staging.to_host(payload)
        spec, parts = spec_of(payload), bytes_of(payload)
        sizes = tuple(part.numel() for part in parts)
        if copied is None and sum(sizes) <= INLINE_BYTES:
            inline = b"".join(part.numpy().tobytes() for part in parts)
            tagged = [(Header(kind, info, spec, inline=inline).encode(), HEADER_TAG)]
        else:
            room = self._other_room(sizes) if recurs else None
            standing = room is not None or fits(sizes, self._room)
            tagged = [(Header(kind, info, spec, standing).encode(), HEADER_TAG)]
            if room is not None:
                tagged = [*self._release(Kind.RESHAPE, room=room), *tagged]
                self._room, self._small = room, []
            tagged += [(part, STANDING_TAG if standing else ON_DEMAND_TAG) for part in parts]
            if standing:
                tagged += _nothing(len(self._room) - len(sizes))
        self._dispatch(kind, tagged, copied)
        # A call may send no data at all (DeepSpeed's own schedule), so what announces calls is bounded as well.
        self._data += kind is Kind.DATA
        while self._data > self.depth or len(self._sent) > 2 * self.depth + 2:
            self._settle_oldest()

    def _other_room(self, sizes: Room) -> Room | None:
        """What room the receiver should have from this training message on; None: that which it has."""
        if not fits(sizes, self._room):
            return larger(sizes, self._room)
        if 2 * sum(sizes) >= sum(self._room):
            self._small.clear()
            return None
        self._small.append(sizes)
        if len(self._small) < _SMALL:
            return None
        room = reduce(larger, self._small)
        self._small.clear()
        return None if room == self._room else room

    def park(self) -> None:
        """Let the receiver drop its standing receive, then wait until all has arrived.

        Two stages that park at once must both `listen` before.
        """
        self._dispatch(Kind.PARK, self._release(Kind.PARK))
        self._room, self._small = (), []
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
        # If the peer is gone or stuck, it learns of the failure from the broken connection.
        with suppress(StageError):
            self._dispatch(Kind.ERROR, [(message, HEADER_TAG)])
        with suppress(StageError):
            self.wire.wait(self.wire.send(message, LAST_WORDS_TAG), "it did not hear of a failure", patience)

    def _release(self, kind: Kind, **info: Any) -> _Tagged:
        """Let the receiver drop its standing receives, by filling them with next to nothing."""
        return [(Header(kind, info).encode(), HEADER_TAG), *_nothing(len(self._room))]

    def _dispatch(self, kind: Kind, tagged: _Tagged, copied: Any = None) -> None:
        """Send now; or in turn, if this message or one before it has to wait for a copy."""
        works: _Works | Future[_Works]
        if self.staging is None:
            works = self._send(tagged)
        else:
            self._raise_failure()
            before = self._sent[-1][1] if self._sent else None
            in_turn = copied is not None or (isinstance(before, Future) and not before.done())
            works = self.staging.later(partial(self._depart, tagged, copied)) if in_turn else self._send(tagged)
        self._sent.append((kind, works))

    def _send(self, tagged: _Tagged) -> _Works:
        return [(self.wire.send(part, tag), part) for part, tag in tagged]

    def _depart(self, tagged: _Tagged, copied: Any) -> _Works:
        """On the sender's thread: wait for the copy, then send. Failures are for the main thread to raise."""
        assert self.staging is not None
        if self._failure is not None:
            self.staging.keep_if_lost(tagged)
            return []
        try:
            if copied is not None:
                copied.synchronize()
        except RuntimeError as error:
            self.staging.keep_if_lost(self, tagged)
            text = (
                f"rank {dist.get_rank()}: a message to {self.wire.peer.name} could not be copied to the host: {error}"
            )
            self._failure = StageError(text)
            # The main thread may be waiting for an answer to it; the receiver, told instead, tells this stage.
            tagged = [(Header(Kind.ERROR, {"text": fit(text)}).encode(), HEADER_TAG)]
        try:
            return self._send(tagged)
        except StageError as error:
            self._failure = self._failure or error
            return []

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise StageError(str(self._failure)) from self._failure

    def _settle_oldest(self, patience: timedelta | None = None) -> None:
        kind, works = self._sent.popleft()
        self._data -= kind is Kind.DATA
        if isinstance(works, Future):
            works = self._departed(works, patience)
        for work, _ in works:
            self.wire.wait(work, "a message to it did not arrive", patience)

    def _departed(self, message: Future[_Works], patience: timedelta | None) -> _Works:
        done, _ = wait([message], None if patience is None else patience.total_seconds())
        if not done:
            raise StageError(f"a message to {self.wire.peer.name} was not copied to the host within {patience}")
        works = message.result()
        self._raise_failure()
        return works


def _plain(tensor: Tensor) -> Tensor:
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _nothing(count: int) -> _Tagged:
    """For standing receives that there is nothing for."""
    return [(_NEXT_TO_NOTHING, STANDING_TAG)] * count
