"""A stage's messages to the others: activations down, gradients up, losses from the last stage to all.

Each direction has a lane of its own, so that a receive pending in one never delays a send in the other. All of it is
point-to-point and asynchronous: in steady state no stage waits for another beyond what the plan needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
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
        self._more: list[tuple[Outbox, Inbox]] = []
        self._own_losses: deque[dict[str, Any]] = deque()
        self._announce: Here | None = None
        self._first: Message | None = None
        self.loss_scale: Callable[[], float] = lambda: 1.0
        """What this stage's gradients are multiplied with now (fp16); each stage has a scale of its own."""
        self._group: Any = None
        self._failed = False
        self._left = False
        for ranks in pipelines:
            if len(ranks) == 1:
                continue
            group = dist.new_group(list(ranks), default_pg_timeout, backend="gloo")
            if rank in ranks:
                self._group = group
                self._open(list(ranks), list(ranks).index(rank), group, plan)

    def _open(self, ranks: list[int], stage: int, group: Any, plan: DDGPlan) -> None:
        def wire(lane: int, other: int) -> Wire:
            return Wire(group, ranks[other], f"stage {other} (rank {ranks[other]})", lane)

        self._wire = wire
        self._stage = stage
        down, up, across = range(3)
        last = len(ranks) - 1
        if stage > 0:
            self._activations_in = Inbox(wire(down, stage - 1))
            self._gradients_out = Outbox(wire(up, stage - 1), depth=0)
        if stage < last:
            self._activations_out = Outbox(wire(down, stage + 1), depth=0)
            self._gradients_in = Inbox(wire(up, stage + 1))
            self._losses_in = Inbox(wire(across, last))
        else:
            self._losses_out = [Outbox(wire(across, k), depth=0) for k in range(last)]
        self.expect(plan)

    def expect(self, plan: DDGPlan) -> None:
        """With nothing in flight: from here on `plan` says how many messages can be on their way."""
        # An Outbox waits for its oldest message beyond `depth`, so depth is what may still be unread by the receiver:
        # the gradient of n tells that the activation of n was read; the activation of n, that the stage before has
        # used the gradient that its tick n - 1 needs; being in call t, that every stage has read loss t - L - 1.
        if self._gradients_out is not None:
            self._gradients_out.depth = plan.delay(self._stage - 1) - plan.delay(self._stage) + 1
        if self._activations_out is not None:
            self._activations_out.depth = plan.activations(self._stage)
        for outbox in self._losses_out:
            outbox.depth = plan.delay(0) + 1

    def open(self, stage: int, lane_out: int, lane_in: int, depth: int) -> tuple[Outbox, Inbox]:
        """Another pair of channels to `stage`, which opens it with the lanes exchanged; lanes below 3 are taken."""
        self._more.append((Outbox(self._wire(lane_out, stage), depth), Inbox(self._wire(lane_in, stage))))
        return self._more[-1]

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

    def send_activations(self, outputs: Any, more: dict[str, Any] | None = None) -> None:
        """Post what this stage put out, a tensor or a tuple of tensors, to the next stage; `more` rides along."""
        assert self._activations_out is not None
        here, self._announce = self._announce, None
        tensors = as_tuple(outputs)
        needed = "".join("01"[t.requires_grad] for t in tensors)
        info = {"tuple": isinstance(outputs, tuple), "needed": needed, "here": here, **(more or {})}
        self._activations_out.post(Kind.DATA, tensors, recurs=torch.is_grad_enabled(), **info)
        self._listen()

    def recv_activations(self) -> Any:
        """Wait for what the stage before put out; container and tensors as it sent them, in memory of their own.

        A tensor requires a gradient where it did there: some operations take another path, or none, if one does.
        """
        assert self._activations_in is not None
        message, self._first = self._first, None
        if message is None:
            message = self._activations_in.take(Kind.DATA, what="an activation")
        for tensor, needed in zip(message.tensors, message.info["needed"], strict=True):
            assert tensor is not None
            tensor.requires_grad_(needed == "1")
        return message.tensors if message.info["tuple"] else message.tensors[0]

    def send_grads(self, gradients: Sequence[Tensor | None]) -> None:
        """Post the gradient of each input tensor (None: it has none) to the stage before."""
        assert self._gradients_out is not None
        self._gradients_out.post(Kind.DATA, gradients, scale=self.loss_scale())
        self._listen()

    def recv_grads(self) -> tuple[Tensor | None, ...]:
        """Wait for the gradient of each output tensor, None where there is none."""
        assert self._gradients_in is not None
        return self.rescaled(self._gradients_in.take(Kind.DATA, what="a gradient"))

    def rescaled(self, message: Message) -> tuple[Tensor | None, ...]:
        """Gradients with this stage's loss scale in place of that of their sender."""
        factor = self.loss_scale() / message.info["scale"]
        if factor == 1.0:
            return message.tensors
        return tuple(None if t is None else (t.float() * factor).to(t.dtype) for t in message.tensors)

    def tell_loss(self, **values: Any) -> None:
        """On the last stage: let every stage know what a call's loss is; hashable values that JSON can hold."""
        self._own_losses.append(values)
        for outbox in self._losses_out:
            outbox.post(Kind.DATA, **values)

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
            self._own_losses.append(info)
        return float(info["shared"])

    def next_loss(self) -> dict[str, Any]:
        """What the last stage told first of what is not taken yet, tuples as lists; waits for it."""
        if self._losses_in is None or self._own_losses:
            return self._own_losses.popleft()
        return self._losses_in.take(Kind.DATA, what="a loss").info

    def park(self) -> None:
        """With all stages drained: wait until everything sent has arrived, and release the posted receives."""
        for inbox in self._inboxes():
            inbox.listen()
        for outbox in self._outboxes():
            outbox.park()
        for inbox in self._inboxes():
            inbox.take(Kind.PARK, what="the end of a drain")

    @property
    def usable(self) -> bool:
        """Whether there is anybody to talk to: another stage, over a process group that has not been destroyed."""
        try:
            return self._group is not None and bool(dist.get_process_group_ranks(self._group))
        except (KeyError, ValueError):
            return False

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
        boxes = self._activations_out, self._gradients_out, *self._losses_out, *(outbox for outbox, _ in self._more)
        return [box for box in boxes if box is not None]

    def _inboxes(self) -> list[Inbox]:
        boxes = self._activations_in, self._gradients_in, self._losses_in, *(inbox for _, inbox in self._more)
        return [box for box in boxes if box is not None]


def _named(here: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("what", "call", "micro_batches"), here, strict=False))
