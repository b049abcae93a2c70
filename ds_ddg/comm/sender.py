"""The sending end of a channel, which does not wait for the other stage.

Every message has buffers of its own, which live until they have arrived. DeepSpeed's ``p2p`` blocks and receives into
shared buffers, so it cannot be used here.

From the first training message on, the receiver has *preposted* receives of its sizes, so that the next messages
travel while it computes. The sizes of these receives are the *capacity*. Gloo (over TCP) also fills a receive with
less, so messages of changing shapes that fit into the capacity travel in the same way. Training messages increase
the capacity when they need more, and reduce it when they have needed much less for a while. Messages that do not fit
(of an evaluation, say) are received on demand, and tensors of a few bytes travel in the header. The receiver
(``receiver.py``) learns all of this from the messages alone.

Tensors on a device (``host_staging.py``) are copied first; a thread of its own sends their message when the copy is
done, and messages posted after it wait for their turn. All else is as with tensors on the host: a message is posted,
is pending, counts against the depth and is settled in the same way, whether it has left already or not.
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

import torch
import torch.distributed as dist
from torch import Tensor

from ds_ddg.comm.host_staging import Staging, refuse_other_devices
from ds_ddg.comm.lifetime import this_process
from ds_ddg.comm.message import INLINE_BYTES, Capacity, Header, Kind, bytes_of, fit, fits, larger, spec_of
from ds_ddg.comm.p2p import ERROR_NOTICE_TAG, HEADER_TAG, ON_DEMAND_TAG, PREPOSTED_TAG, StageError, Wire

__all__ = ["Sender"]

_Tagged = list[tuple[Tensor, int]]
"""The parts of a message, each with its tag."""
_Works = list[tuple[Any, Tensor]]
"""Sends under way: their handles and the bytes that they send."""

_SHRINK_AFTER = 16
"""Messages in a row that fill less than half of the capacity before it shrinks."""

_FILLER = torch.zeros(1, dtype=torch.uint8)


@dataclass
class Sender:
    """Sends messages to another stage without waiting for it.

    Args:
        wire: leads to the receiver.
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
    _capacity: Capacity = ()
    """Sizes of the receives that the receiver has preposted."""
    _underfilled: list[Capacity] = field(default_factory=list)
    """Sizes of the latest training messages, as far as each filled less than half of the capacity."""
    _failure: StageError | None = None
    """The error that happened on the sender's thread, if any."""

    def __post_init__(self) -> None:
        this_process().kept_by(self.wire.peer.group).sends.append(self._sent)

    @property
    def pending(self) -> int:
        """The number of messages not known to have arrived."""
        return len(self._sent)

    def post(self, kind: Kind, tensors: Sequence[Tensor | None] = (), recurs: bool = True, **info: Any) -> None:
        """Send one message; `tensors` must not be written to afterwards.

        Args:
            kind: its purpose.
            tensors: its tensors, of any type and shape; None stands for a tensor that does not exist.
            recurs: whether more of its sizes will follow, so that the receiver should have receives preposted.
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
            capacity = self._new_capacity(sizes) if recurs else None
            preposted = capacity is not None or fits(sizes, self._capacity)
            tagged = [(Header(kind, info, spec, preposted).encode(), HEADER_TAG)]
            if capacity is not None:
                tagged = [*self._release(Kind.RESHAPE, capacity=capacity), *tagged]
                self._capacity, self._underfilled = capacity, []
            tagged += [(part, PREPOSTED_TAG if preposted else ON_DEMAND_TAG) for part in parts]
            if preposted:
                tagged += _fillers(len(self._capacity) - len(sizes))
        self._dispatch(kind, tagged, copied)
        # A call may send no data at all (DeepSpeed's own schedule), so what announces calls is bounded as well.
        self._data += kind is Kind.DATA
        while self._data > self.depth or len(self._sent) > 2 * self.depth + 2:
            self._settle_oldest()

    def _new_capacity(self, sizes: Capacity) -> Capacity | None:
        """Return the capacity that the receiver should have from this training message on; None: the one it has."""
        if not fits(sizes, self._capacity):
            return larger(sizes, self._capacity)
        if 2 * sum(sizes) >= sum(self._capacity):
            self._underfilled.clear()
            return None
        self._underfilled.append(sizes)
        if len(self._underfilled) < _SHRINK_AFTER:
            return None
        capacity = reduce(larger, self._underfilled)
        self._underfilled.clear()
        return None if capacity == self._capacity else capacity

    def flush(self) -> None:
        """Let the receiver drop its preposted receives, then wait until all has arrived.

        Two stages that flush at once must both call `Receiver.listen` before.
        """
        self._dispatch(Kind.FLUSH, self._release(Kind.FLUSH))
        self._capacity, self._underfilled = (), []
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

        The text goes twice: behind all messages before it, and as an error notice, for which a receive is always
        posted. The notice arrives at once however busy the peer is; it is read if the connection breaks before the
        peer comes to the message.
        """
        message = Header(Kind.ERROR, {"text": fit(text)}).encode()
        # If the peer is gone or stuck, it learns of the failure from the broken connection.
        with suppress(StageError):
            self._dispatch(Kind.ERROR, [(message, HEADER_TAG)])
        with suppress(StageError):
            self.wire.wait(self.wire.send(message, ERROR_NOTICE_TAG), "it did not hear of a failure", patience)

    def _release(self, kind: Kind, **info: Any) -> _Tagged:
        """Let the receiver drop its preposted receives, by filling each with one byte."""
        return [(Header(kind, info).encode(), HEADER_TAG), *_fillers(len(self._capacity))]

    def _dispatch(self, kind: Kind, tagged: _Tagged, copied: Any = None) -> None:
        """Send the message now, or in turn if it or one before it has to wait for a copy."""
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


def _fillers(count: int) -> _Tagged:
    """Bytes for preposted receives that no tensor is sent to."""
    return [(_FILLER, PREPOSTED_TAG)] * count
