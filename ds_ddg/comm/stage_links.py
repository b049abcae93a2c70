"""A stage's messages to the others: activations down, gradients up, and losses up with the gradients.

All of it is point-to-point and asynchronous: in steady state no stage waits for another beyond what the plan needs.
The loss of a call rides on the gradient of its last micro-batch. That reaches stage 0 in call t + ceil(d_0 / M), which
is when all ranks report it. What a stage waits for in the same call comes from the last stage directly.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_ddg.comm.channels import Channels
from ds_ddg.comm.message import Kind, Message
from ds_ddg.comm.waits import UNOBSERVED, WaitObserver

__all__ = ["CallPosition", "Links", "as_tuple"]

CallPosition = tuple[str, int, int]
"""The place of a stage in its run: the method, the number of the call, its micro-batches."""


def as_tuple(tensors: Any) -> tuple[Tensor, ...]:
    """Return `tensors`, one tensor or a tuple of them, as a tuple."""
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


class Links(Channels):
    """The links of one rank. Constructing them is collective.

    Args:
        *args: as for `Channels`.
        observer: measures how long this stage waits; default: nobody does.
        **kwargs: as for `Channels`.
    """

    def __init__(self, *args: Any, observer: WaitObserver = UNOBSERVED, **kwargs: Any) -> None:
        self._waits = observer.waits
        self._losses: deque[dict[str, Any]] = deque()
        """Losses that have arrived and have not been taken yet."""
        self._to_forward: list[dict[str, Any]] = []
        """Losses that the next gradient carries to the stage before."""
        self._announce: CallPosition | None = None
        self._first: Message | None = None
        self.riders: dict[str, Any] = {}
        """Small values that came with the first activation of this call; the next activation carries them on."""
        self.loss_scale: Callable[[], float] = lambda: 1.0
        """A function that returns the factor in this stage's gradients now (fp16); each stage has its own factor."""
        super().__init__(*args, **kwargs)

    def begin(self, here: CallPosition, ready: bool, with_data: bool) -> Kind:
        """Start a call on this stage as on the stage before.

        Args:
            here: what this stage is about to do; must be the same on every stage.
            ready: whether this stage has its data (matters on the first).
            with_data: announce the call with its first activation rather than by a message of its own.

        Returns:
            BEGIN, or END if the first stage has no data.

        Raises:
            RuntimeError: the stage before is doing something else.
        """
        kind = Kind.BEGIN if ready else Kind.END
        if self._activations_in is not None:
            with self._waits("activation"):  # the first of a call announces it
                message = self._activations_in.take(
                    Kind.DATA if with_data else Kind.BEGIN, Kind.END, what=f"the start of {here[0]}"
                )
            if (there := tuple(message.info["here"] or ())) != here:
                other = self._activations_in.wire.peer.name
                raise RuntimeError(
                    f"the ranks are out of step: this stage is in {_named(here)}, {other} is in {_named(there)}; "
                    "make the same calls in the same order on every rank"
                )
            self._first = message if message.kind is Kind.DATA else None
            kind = Kind.END if message.kind is Kind.END else Kind.BEGIN
        self._announce = here
        self.riders = {} if self._first is None else self._first.info.get("riders", {})
        if self._activations_out is not None and (kind is Kind.END or not with_data):
            self._activations_out.post(kind, here=here)
        return kind

    def send_activations(self, outputs: Any) -> None:
        """Post `outputs`, a tensor or a tuple of tensors, to the next stage, and with them the `riders`, if any."""
        assert self._activations_out is not None
        here, self._announce = self._announce, None
        tensors = as_tuple(outputs)
        needed = "".join("01"[t.requires_grad] for t in tensors)
        info = {"tuple": isinstance(outputs, tuple), "needed": needed, "here": here}
        if self.riders:
            info["riders"], self.riders = self.riders, {}
        with self._waits("send"):
            self._activations_out.post(Kind.DATA, tensors, recurs=torch.is_grad_enabled(), **info)
            self._listen()

    def recv_activations(self) -> Any:
        """Wait for the outputs of the stage before, a tensor or a tuple of tensors, as it sent them.

        They have memory of their own. A tensor requires a gradient if it did there, as some operations depend on it.
        """
        assert self._activations_in is not None
        message, self._first = self._first, None
        if message is None:
            with self._waits("activation"):
                message = self._activations_in.take(Kind.DATA, what="an activation")
        for tensor, needed in zip(message.tensors, message.info["needed"], strict=True):
            assert tensor is not None
            tensor.requires_grad_(needed == "1")
        return message.tensors if message.info["tuple"] else message.tensors[0]

    def send_grads(self, gradients: Sequence[Tensor | None]) -> None:
        """Post the gradient of each input tensor, None if it has no gradient, to the stage before."""
        assert self._gradients_out is not None
        losses, self._to_forward = self._to_forward, []
        info: dict[str, Any] = {"losses": losses} if losses else {}
        scale = self.loss_scale()
        with self._waits("send"):
            self._gradients_out.post(Kind.DATA, gradients, scale=scale, **info)
            self._listen()

    def recv_grads(self) -> tuple[Tensor | None, ...]:
        """Wait for the gradient of each output tensor, None if it has no gradient."""
        assert self._gradients_in is not None
        with self._waits("gradient"):
            message = self._gradients_in.take(Kind.DATA, what="a gradient")
        losses = message.info.get("losses", ())
        self._losses.extend(losses)
        if self._gradients_out is not None:
            self._to_forward.extend(losses)
        return self.rescaled(message)

    def rescaled(self, message: Message) -> tuple[Tensor | None, ...]:
        """Return the gradients of `message`, with this stage's loss scale in place of their sender's."""
        factor = self.loss_scale() / message.info["scale"]
        if factor == 1.0:
            return message.tensors
        return tuple(None if t is None else (t.float() * factor).to(t.dtype) for t in message.tensors)

    def tell_loss(self, at_once: bool, **values: Any) -> None:
        """Tell every stage the loss of a call; the last stage does so.

        Args:
            at_once: whether to send it now, because the others wait for it, rather than with the next gradient.
            **values: small plain values that `next_loss` will return.
        """
        self._losses.append(values)
        if not at_once:
            self._to_forward.append(values)
            return
        for sender in self._losses_out:
            sender.post(Kind.DATA, **values)

    def meet(self) -> None:
        """Wait until every stage has begun this call, or raise StageError if one could not."""
        self.share(1.0)

    def share(self, value: float) -> float:
        """Return the last stage's `value`; every stage must call it. Losses that arrive first wait for `next_loss`."""
        for sender in self._losses_out:
            sender.post(Kind.DATA, shared=value)
        if self._losses_in is None:
            return value
        with self._waits("loss"):
            while "shared" not in (info := self._losses_in.take(Kind.DATA, what="the last stage").info):
                self._losses.append(info)
        return float(info["shared"])

    def next_loss(self) -> dict[str, Any]:
        """Take the oldest loss that has arrived; if there is none, wait for one that is told at once."""
        if self._losses_in is None or self._losses:
            return self._losses.popleft()
        with self._waits("loss"):
            return self._losses_in.take(Kind.DATA, what="a loss").info

    def ping(self, tensors: Sequence[Tensor], times: int = 5) -> None:
        """Send `tensors` to the next stage and back, while nobody computes; all stages must be drained, and call it.

        First the stage before asks, then this one does, so one message travels at a time. The observer learns how long
        each takes; the first of them takes longer, as no receive is preposted yet.

        Args:
            tensors: what travels; the last stage sends back what it gets.
            times: how often, after the first time.
        """
        if self._activations_in is not None and self._gradients_out is not None:
            for _ in range(times + 1):
                asked = self._activations_in.take(Kind.DATA, what="a measurement of the link")
                self._gradients_out.post(Kind.DATA, asked.tensors)
        if self._activations_out is not None and self._gradients_in is not None:
            for _ in range(times + 1):
                with self._waits("hop"):
                    self._activations_out.post(Kind.DATA, tensors)
                    self._gradients_in.listen()
                    self._gradients_in.take(Kind.DATA, what="a measurement of the link")
        self.flush()

    @property
    def pending(self) -> int:
        """The number of messages not known to have arrived, and of losses not yet taken or passed on."""
        return super().pending + len(self._losses) + len(self._to_forward)

    def _listen(self) -> None:
        """Post the next receives, between a send and the next wait, where that costs no other stage time."""
        if self._activations_in is not None:
            self._activations_in.listen()
        if self._gradients_in is not None:
            self._gradients_in.listen()
        if self._losses_in is not None:
            self._losses_in.listen()


def _named(here: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("what", "call", "micro_batches"), here, strict=False))
