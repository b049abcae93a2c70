"""A stage's messages to the others: activations down, gradients up, losses from the last stage to all.

Each direction has a lane of its own, so that a receive pending in one never delays a send in the other. All of it is
point-to-point and asynchronous: in steady state no stage waits for another beyond what the plan needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout
from torch import Tensor

from ds_ddg.channel import Inbox, Outbox
from ds_ddg.message import Kind, Message
from ds_ddg.plan import DDGPlan
from ds_ddg.wire import StageError, Wire

__all__ = ["Here", "Links", "as_tuple"]

Here = tuple[str, int, int]
"""What a stage is about to do: the method, the number of the call, its micro-batches."""


def as_tuple(tensors: Any) -> tuple[Tensor, ...]:
    """What travels between stages, a tensor or a tuple of tensors, as a tuple."""
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


class Links:
    """The links of one rank. Constructing them is collective: every rank creates the groups of every pipeline.

    Args:
        pipelines: global ranks of each pipeline in stage order (one for each data-parallel replica).
        rank: this global rank.
        plan: says how many messages can be on their way.
    """

    def __init__(self, pipelines: Sequence[Sequence[int]], rank: int, plan: DDGPlan) -> None:
        self._activations_in: Inbox | None = None
        self._activations_out: Outbox | None = None
        self._gradients_in: Inbox | None = None
        self._gradients_out: Outbox | None = None
        self._losses_in: Inbox | None = None
        self._losses_out: list[Outbox] = []
        self._own_losses: deque[tuple[int, float]] = deque()
        self._announce: Here | None = None
        self._first: Message | None = None
        self._failed = False
        self._left = False
        for ranks in pipelines:
            if len(ranks) == 1:
                continue
            group = dist.new_group(list(ranks), default_pg_timeout, backend="gloo")
            if rank in ranks:
                self._open(list(ranks), list(ranks).index(rank), group, plan)

    def _open(self, ranks: list[int], stage: int, group: Any, plan: DDGPlan) -> None:
        def wire(lane: int, other: int) -> Wire:
            return Wire(group, ranks[other], f"stage {other} (rank {ranks[other]})", lane)

        down, up, across = range(3)
        last = len(ranks) - 1
        # An Outbox waits for its oldest message beyond `depth`, so depth is what may still be unread by the receiver:
        # the gradient of n tells that the activation of n was read; the activation of n, that the stage before has
        # used the gradient that its tick n - 1 needs; being in call t, that every stage has read loss t - L - 1.
        if stage > 0:
            self._activations_in = Inbox(wire(down, stage - 1))
            self._gradients_out = Outbox(wire(up, stage - 1), depth=plan.delay(stage - 1) - plan.delay(stage) + 1)
        if stage < last:
            self._activations_out = Outbox(wire(down, stage + 1), depth=plan.activations(stage))
            self._gradients_in = Inbox(wire(up, stage + 1))
            self._losses_in = Inbox(wire(across, last))
        else:
            self._losses_out = [Outbox(wire(across, k), depth=plan.delay(0) + 1) for k in range(last)]

    def begin(self, here: Here, ready: bool, with_data: bool) -> Kind:
        """Start a call on this stage as on the one before; END if the first stage has no data.

        Args:
            here: what this stage is about to do; must be the same on every stage.
            ready: whether this stage has its data (matters on the first).
            with_data: announce the call with its first activation rather than by a message of its own.

        Raises:
            RuntimeError: the stage before is doing something else.
        """
        kind = Kind.BEGIN if ready else Kind.END
        if self._activations_in is not None:
            message = self._activations_in.take(
                Kind.DATA if with_data else Kind.BEGIN, Kind.END, what=f"the start of {here[0]}"
            )
            if (there := tuple(message.info["here"] or ())) != here:
                raise RuntimeError(
                    f"the ranks are out of step: this stage is in {_named(here)}, {self._activations_in.wire.name} is "
                    f"in {_named(there)}; make the same calls in the same order on every rank"
                )
            self._first = message if message.kind is Kind.DATA else None
            kind = Kind.END if message.kind is Kind.END else Kind.BEGIN
        self._announce = here
        if self._activations_out is not None and (kind is Kind.END or not with_data):
            self._activations_out.post(kind, here=here)
        return kind

    def send_activations(self, outputs: Any) -> None:
        """Post what this stage put out, a tensor or a tuple of tensors, to the next stage."""
        assert self._activations_out is not None
        here, self._announce = self._announce, None
        info = {"tuple": isinstance(outputs, tuple), "here": here}
        self._activations_out.post(Kind.DATA, as_tuple(outputs), recurs=torch.is_grad_enabled(), **info)
        self._listen()

    def recv_activations(self) -> Any:
        """Wait for what the stage before put out; tensors and container as it sent them, in memory of their own."""
        assert self._activations_in is not None
        message, self._first = self._first, None
        if message is None:
            message = self._activations_in.take(Kind.DATA, what="an activation")
        return message.tensors if message.info["tuple"] else message.tensors[0]

    def send_grads(self, gradients: Sequence[Tensor | None]) -> None:
        """Post the gradient of each input tensor (None: it has none) to the stage before."""
        assert self._gradients_out is not None
        self._gradients_out.post(Kind.DATA, gradients)
        self._listen()

    def recv_grads(self) -> tuple[Tensor | None, ...]:
        """Wait for the gradient of each output tensor, None where there is none."""
        assert self._gradients_in is not None
        return self._gradients_in.take(Kind.DATA, what="a gradient").tensors

    def tell_loss(self, call: int, loss: float) -> None:
        """On the last stage: let every stage know the loss of a call."""
        self._own_losses.append((call, loss))
        for outbox in self._losses_out:
            outbox.post(Kind.DATA, call=call, loss=loss)

    def meet(self) -> None:
        """Wait until every stage has begun this call; hears it if one could not."""
        self.share(1.0)

    def share(self, value: float) -> float:
        """On every stage: the last one's `value`. Losses that come before it are kept for `next_loss`."""
        for outbox in self._losses_out:
            outbox.post(Kind.DATA, shared=value)
        if self._losses_in is None:
            return value
        while "shared" not in (info := self._losses_in.take(Kind.DATA, what="the last stage").info):
            self._own_losses.append((info["call"], info["loss"]))
        return float(info["shared"])

    def next_loss(self) -> tuple[int, float]:
        """The oldest ``(call, loss)`` not taken yet; waits for it."""
        if self._losses_in is None or self._own_losses:
            return self._own_losses.popleft()
        info = self._losses_in.take(Kind.DATA, what="a loss").info
        return info["call"], info["loss"]

    def park(self) -> None:
        """With all stages drained: wait until everything sent has arrived, and release the posted receives."""
        for inbox in self._inboxes():
            inbox.listen()
        for outbox in self._outboxes():
            outbox.park()
        for inbox in self._inboxes():
            inbox.take(Kind.PARK, what="the end of a drain")

    def leave(self) -> None:
        """Tell the others that this stage will send nothing more."""
        if not (self._left or self._failed):
            self._left = True
            for outbox in self._outboxes():
                outbox.post(Kind.LEAVE)

    def farewell(self, patience: timedelta) -> None:
        """At the end of the process: wait until the others leave too.

        A process takes with it what it has sent and others have not received, and what others send to it fails. The
        first stage is done long before the last, so it reads on until nobody needs it any more. Failures of others
        are theirs to report.

        Args:
            patience: for each message of the others.
        """
        try:
            self.leave()
            for inbox in [] if self._failed else self._inboxes():
                while inbox.take(*Kind, what="the end of training", patience=patience).kind is not Kind.LEAVE:
                    pass
            for outbox in [] if self._failed else self._outboxes():
                outbox.settle(patience)
        except StageError:
            return

    def tell_failure(self, text: str) -> None:
        """Let the neighbours (from the last stage: all) know that this stage failed; they pass it on."""
        self._failed = True
        for outbox in self._outboxes():
            outbox.post_error(text)

    @property
    def pending(self) -> int:
        """Messages sent and not known to have arrived, and losses not yet taken."""
        return sum(outbox.pending for outbox in self._outboxes()) + len(self._own_losses)

    def _listen(self) -> None:
        """Between a send and the next wait, where it costs no other stage time: be ready for what comes next."""
        if self._activations_in is not None:
            self._activations_in.listen()
        if self._gradients_in is not None:
            self._gradients_in.listen()

    def _outboxes(self) -> list[Outbox]:
        return [box for box in (self._activations_out, self._gradients_out, *self._losses_out) if box is not None]

    def _inboxes(self) -> list[Inbox]:
        return [box for box in (self._activations_in, self._gradients_in, self._losses_in) if box is not None]


def _named(here: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("what", "call", "micro_batches"), here, strict=False))
