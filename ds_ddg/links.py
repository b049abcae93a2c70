"""A stage's messages to the others: activations down, gradients up, losses from the last stage to all.

Each direction has a process group of its own, so that a receive pending in one never delays a send in the other. All
of it is point-to-point and asynchronous: in steady state no stage waits for another beyond what the plan needs.
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

__all__ = ["Links", "as_tuple"]


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
        self._announce: dict[str, Any] | None = None
        self._first: Message | None = None
        self._failed = False
        for ranks in pipelines:
            if len(ranks) == 1:
                continue
            groups = [dist.new_group(list(ranks), default_pg_timeout, backend="gloo") for _ in range(3)]
            if rank in ranks:
                self._open(list(ranks), list(ranks).index(rank), groups, plan)

    def _open(self, ranks: list[int], stage: int, groups: list[Any], plan: DDGPlan) -> None:
        def ends(group: Any, other: int) -> tuple[Any, int, str]:
            return group, ranks[other], f"stage {other} (rank {ranks[other]})"

        down, up, across = groups
        last = len(ranks) - 1
        # An Outbox waits for its oldest message beyond `depth`, so depth is what may still be unread by the receiver:
        # the gradient of n tells that the activation of n was read; the activation of n, that the stage before has
        # used the gradient that its tick n - 1 needs; being in call t, that every stage has read loss t - L - 1.
        if stage > 0:
            self._activations_in = Inbox(*ends(down, stage - 1))
            self._gradients_out = Outbox(*ends(up, stage - 1), depth=plan.delay(stage - 1) - plan.delay(stage) + 1)
        if stage < last:
            self._activations_out = Outbox(*ends(down, stage + 1), depth=plan.activations(stage))
            self._gradients_in = Inbox(*ends(up, stage + 1))
            self._losses_in = Inbox(*ends(across, last))
        else:
            self._losses_out = [Outbox(*ends(across, k), depth=plan.delay(0) + 1) for k in range(last)]

    def begin(self, here: dict[str, Any], ready: bool, with_data: bool) -> Kind:
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
                Kind.DATA if with_data else Kind.BEGIN, Kind.END, what=f"the start of {here['what']}"
            )
            if message.info["here"] != here:
                raise RuntimeError(
                    f"the ranks are out of step: this stage is in {here}, {self._activations_in.name} is in "
                    f"{message.info['here']}; make the same calls in the same order on every rank"
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
        for outbox in self._outboxes():
            outbox.park()
        for inbox in self._inboxes():
            inbox.take(Kind.PARK, what="the end of a drain")

    def settle(self, patience: timedelta = timedelta(seconds=60)) -> None:
        """Before this stage leaves: give its activations time to arrive, unless something has failed.

        The next stage will read them all. Of the gradients and losses, the last are read by a drain only.
        """
        if self._activations_out is not None and not self._failed:
            self._activations_out.settle(patience)

    def tell_failure(self, text: str) -> None:
        """Let the neighbours (from the last stage: all) know that this stage failed; they pass it on."""
        self._failed = True
        for outbox in self._outboxes():
            outbox.post_error(text)

    @property
    def pending(self) -> int:
        """Messages sent and not known to have arrived, and losses not yet taken."""
        return sum(outbox.pending for outbox in self._outboxes()) + len(self._own_losses)

    def _outboxes(self) -> list[Outbox]:
        return [box for box in (self._activations_out, self._gradients_out, *self._losses_out) if box is not None]

    def _inboxes(self) -> list[Inbox]:
        return [box for box in (self._activations_in, self._gradients_in, self._losses_in) if box is not None]
