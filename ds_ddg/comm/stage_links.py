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

from ds_ddg.comm.channels import Connections
from ds_ddg.comm.message import Kind, Message

__all__ = ["Here", "Links", "as_tuple"]

Here = tuple[str, int, int]
"""What a stage is about to do: the method, the number of the call, its micro-batches."""


def as_tuple(tensors: Any) -> tuple[Tensor, ...]:
    """What travels between stages, a tensor or a tuple of tensors, as a tuple."""
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


class Links(Connections):
    """The links of one rank; arguments as for `Connections`. Constructing them is collective."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._losses: deque[dict[str, Any]] = deque()
        """Told, and not taken yet."""
        self._rising: list[dict[str, Any]] = []
        """To go on with the next gradient."""
        self._announce: Here | None = None
        self._first: Message | None = None
        self.loss_scale: Callable[[], float] = lambda: 1.0
        """What this stage's gradients are multiplied with now (fp16); each stage has a scale of its own."""
        super().__init__(*args, **kwargs)

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
                other = self._activations_in.wire.peer.name
                raise RuntimeError(
                    f"the ranks are out of step: this stage is in {_named(here)}, {other} is in {_named(there)}; "
                    "make the same calls in the same order on every rank"
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
        losses, self._rising = self._rising, []
        riders: dict[str, Any] = {"losses": losses} if losses else {}
        self._gradients_out.post(Kind.DATA, gradients, scale=self.loss_scale(), **riders)
        self._listen()

    def recv_grads(self) -> tuple[Tensor | None, ...]:
        """Wait for the gradient of each output tensor, None where there is none."""
        assert self._gradients_in is not None
        message = self._gradients_in.take(Kind.DATA, what="a gradient")
        losses = message.info.get("losses", ())
        self._losses.extend(losses)
        if self._gradients_out is not None:
            self._rising.extend(losses)
        return self.rescaled(message)

    def rescaled(self, message: Message) -> tuple[Tensor | None, ...]:
        """Gradients with this stage's loss scale in place of that of their sender."""
        factor = self.loss_scale() / message.info["scale"]
        if factor == 1.0:
            return message.tensors
        return tuple(None if t is None else (t.float() * factor).to(t.dtype) for t in message.tensors)

    def tell_loss(self, at_once: bool, **values: Any) -> None:
        """On the last stage: let every stage know what a call's loss is; small plain values.

        Args:
            at_once: the others wait for it, rather than for the gradient that it would ride on.
            **values: what `next_loss` will give.
        """
        self._losses.append(values)
        if not at_once:
            self._rising.append(values)
            return
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
            self._losses.append(info)
        return float(info["shared"])

    def next_loss(self) -> dict[str, Any]:
        """The oldest loss that has come and is not taken; if there is none, waits for one that is told at once."""
        if self._losses_in is None or self._losses:
            return self._losses.popleft()
        return self._losses_in.take(Kind.DATA, what="a loss").info

    @property
    def pending(self) -> int:
        """Messages sent and not known to have arrived, and losses not yet taken or passed on."""
        return super().pending + len(self._losses) + len(self._rising)

    def _listen(self) -> None:
        """Between a send and the next wait, where it costs no other stage time: be ready for what comes next."""
        if self._activations_in is not None:
            self._activations_in.listen()
        if self._gradients_in is not None:
            self._gradients_in.listen()
        if self._losses_in is not None:
            self._losses_in.listen()


def _named(here: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("what", "call", "micro_batches"), here, strict=False))
