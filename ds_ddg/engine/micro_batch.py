"""One micro-batch on one stage: how each instruction is carried out, DeepSpeed's own way wherever it can.

Top to bottom on stage k; each tensor is put once, taken once, and freed by whoever took it:

    LoadMicroBatch   put inputs (first stage), labels (last stage)
    RecvActivation   put inputs                                               from stage k-1
    ForwardPass      remember the weight version; put outputs (with their graph, or without: "recompute")
    SendActivation   post outputs                                             to stage k+1
       ... d_k ticks pass: other micro-batches go forward, the weights are updated ...
    RecvGrad         put grads                                                from stage k+1
    BackwardPass     at the version remembered: take outputs, grads, labels   -> parameter gradients, input gradients
    SendGrad         take inputs, post their gradients                        to stage k-1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, LoadMicroBatch
from torch import Tensor

from ds_ddg.comm.stage_links import Links, as_tuple
from ds_ddg.engine.data_feed import Feed
from ds_ddg.engine.output_checks import FixedShape, refuse_activation, refuse_loss, with_own_memory
from ds_ddg.host import Host
from ds_ddg.stage import Stage
from ds_ddg.telemetry.delay_effects import DelayEffects
from ds_ddg.weights.recompute import (
    ForwardState,
    PastBuffers,
    discard_saved_tensors,
    guard_reentrant_checkpoint,
    with_past_buffers,
)
from ds_ddg.weights.stage_optimizer import StageOptimizer
from ds_ddg.weights.tied import TiedWeights

__all__ = ["MicroBatchRunner"]


class _Join(torch.autograd.Function):
    """Present several outputs as one scalar whose backward starts all of them at once with the gradients received.

    One pass instead of DeepSpeed's one per tensor: cheaper, and sums come out in the order of a plain backward.
    """

    @staticmethod
    def forward(ctx: Any, gradients: tuple[Tensor, ...], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        return (None, *ctx.gradients)


def _without_graph(outputs: Any) -> Any:
    """Return `outputs` cut off their graph; each tensor still says whether it requires a gradient."""
    if isinstance(outputs, tuple):
        return tuple(map(_without_graph, outputs))
    return outputs.detach().requires_grad_(outputs.requires_grad) if torch.is_tensor(outputs) else outputs


class MicroBatchRunner:
    """Takes micro-batches forward and back through one stage.

    Args:
        stage: this stage.
        host: DeepSpeed's engine; micro-batch n lives in one of its pipe buffers.
        links: to the other stages.
        feed: the data of the present call.
        tied_weights: the weights that this stage shares with others.
        updates: knows the weight versions, and scales the loss.
        effects: looks at the gradients of some backward passes.
    """

    def __init__(
        self,
        stage: Stage,
        host: Host,
        links: Links,
        feed: Feed,
        tied_weights: TiedWeights,
        updates: StageOptimizer,
        effects: DelayEffects,
    ) -> None:
        self._stage, self._host, self._links, self._feed = stage, host, links, feed
        self._tied_weights, self._updates, self._effects = tied_weights, updates, effects
        self.fixed_shape = FixedShape(stage.stage_id)
        """The shape to which all activations of this stage are held."""
        self._past_buffers = PastBuffers()
        self._recomputes = stage.config.activations == "recompute" and not stage.is_last
        """Whether the graph is built only when the gradient is here; pointless where it comes in the same tick."""
        self.observe: Callable[[tuple[Tensor, ...]], None] | None = None
        """A function called with the activations that leave this stage in training, while somebody wants them."""
        host.pipe_buffers.update(grads=[], rng=[], past=[])

    @property
    def _checkpoints(self) -> bool:
        """Whether parts of a forward run again within the backward."""
        return bool(self._host.module.activation_checkpoint_interval > 0)

    def load(self, buffer_id: int) -> None:
        """Carry out LoadMicroBatch: put inputs on the first stage, labels on the last."""
        self._host.carry_out(LoadMicroBatch, buffer_id)

    def recv_activation(self, buffer_id: int) -> None:
        """Carry out RecvActivation: wait for the inputs of a micro-batch."""
        self._host.pipe_buffers["inputs"][buffer_id] = self._links.recv_activations()

    def forward(self, buffer_id: int) -> None:
        """Carry out ForwardPass at the newest weights, and remember their version; in evaluation as DeepSpeed does."""
        host = self._host
        if not torch.is_grad_enabled():
            host.carry_out(ForwardPass, buffer_id)
            return
        self._updates.versions.remember(buffer_id)
        if self._recomputes or self._checkpoints:
            host.pipe_buffers["past"][buffer_id] = self._past_buffers.now(host.module)
        if not self._recomputes:
            self._forward(buffer_id)
            return
        host.pipe_buffers["rng"][buffer_id] = ForwardState(host.device), host.module.micro_offset
        with discard_saved_tensors(self._stage.stage_id):
            self._forward(buffer_id)
        host.pipe_buffers["outputs"][buffer_id] = _without_graph(host.pipe_buffers["outputs"][buffer_id])

    def send_activation(self, buffer_id: int) -> None:
        """Carry out SendActivation: post the outputs, a tensor or a tuple of tensors."""
        host = self._host
        outputs = host.pipe_buffers["outputs"][buffer_id]
        refuse_activation(outputs, self._stage.stage_id)
        if torch.is_grad_enabled():
            if not host.dynamic_shape:
                self.fixed_shape.check(as_tuple(outputs))
            if self.observe is not None:
                self.observe(as_tuple(outputs))
        self._links.send_activations(with_own_memory(outputs, host.module))
        if self._recomputes or not torch.is_grad_enabled():
            host.pipe_buffers["outputs"][buffer_id] = None

    def recv_gradient(self, buffer_id: int) -> None:
        """Carry out RecvGrad: wait for the gradients of the outputs."""
        self._host.pipe_buffers["grads"][buffer_id] = self._links.recv_grads()

    def backward(self, buffer_id: int) -> None:
        """Carry out BackwardPass: gradients of parameters and inputs, at the weights that the settings say."""
        host, buffers, updates = self._host, self._host.pipe_buffers, self._updates
        past = buffers["past"][buffer_id] or {}
        with updates.versions.using(buffer_id):
            if self._recomputes:
                self._recompute(buffer_id)
            if self._stage.is_last:
                host.loss = updates.scaled(host.loss)
            past_buffers = with_past_buffers(host.module, past) if self._checkpoints else nullcontext()
            with past_buffers, self._effects.backward():
                if self._stage.is_last or self._join_outputs(buffer_id):
                    host.carry_out(BackwardPass, buffer_id)
        if not updates.trains:
            inputs = as_tuple(buffers["inputs"][buffer_id])
            updates.watch_overflow(
                [*(tensor.grad for tensor in inputs), *(borrowed.grad for borrowed in self._tied_weights.borrowed)]
            )
        self._tied_weights.send_gradients()
        updates.versions.forget(buffer_id)
        host.grad_layer = None
        if self._stage.is_last:
            host.loss = host.loss.detach()
        for column in ("outputs", "labels", "grads", "rng", "past"):
            buffers[column][buffer_id] = None
        if self._stage.is_first:
            buffers["inputs"][buffer_id] = None

    def send_gradient(self, buffer_id: int) -> None:
        """Carry out SendGrad: post the gradients of the inputs, and free the inputs."""
        buffers = self._host.pipe_buffers
        inputs = as_tuple(buffers["inputs"][buffer_id])
        buffers["inputs"][buffer_id] = None
        self._links.send_grads([tensor.grad for tensor in inputs])

    def reset_shape(self) -> None:
        """Allow activations another shape from here on. Each message says its own, so those in flight do not mind."""
        self.fixed_shape.reset()
        self._feed.reset_shape()

    def empty_buffers(self) -> None:
        """Start with new pipe buffers; the pipeline must be empty."""
        host = self._host
        host.pipe_buffers = {column: [None] * host.num_pipe_buffers for column in host.pipe_buffers}
        host.reset_activation_shape()

    @contextmanager
    def own_buffers(self) -> Iterator[None]:
        """Inside this block an evaluation has buffers of its own, and micro-batches in flight keep theirs."""
        host = self._host
        in_flight = host.pipe_buffers, host.num_pipe_buffers
        host.pipe_buffers, host.num_pipe_buffers = {column: [] for column in host.pipe_buffers}, 0
        try:
            yield
        finally:
            host.pipe_buffers, host.num_pipe_buffers = in_flight

    def _forward(self, buffer_id: int) -> None:
        host = self._host
        with guard_reentrant_checkpoint(host.module) if host._reentrant_activation_checkpointing() else nullcontext():
            before = host.loss
            try:
                with self._summing_losses():
                    host.carry_out(ForwardPass, buffer_id)
            except (AttributeError, TypeError) as error:
                if host.loss is not before:  # to DeepSpeed, what is no tensor is a list of them
                    refuse_loss(host.loss, host.module.loss_fn is None, error)
                raise
        if self._stage.is_last:
            refuse_loss(host.loss, host.module.loss_fn is None)

    @contextmanager
    def _summing_losses(self) -> Iterator[None]:
        """Inside this block a forward adds its loss to the total of the call, even if a project's own does not."""
        host = self._host
        before = id(host.total_loss), getattr(host.total_loss, "_version", 0)
        yield
        if self._stage.is_last and before == (id(host.total_loss), getattr(host.total_loss, "_version", 0)):
            loss = host.loss.detach()
            host.total_loss = loss.clone() if host.total_loss is None else host.total_loss + loss

    def _recompute(self, buffer_id: int) -> None:
        """Run the forward again as the first time: same input, random numbers and buffers, and no trace in these."""
        module, buffers = self._host.module, self._host.pipe_buffers
        newest = module.micro_offset
        forward_state, module.micro_offset = buffers["rng"][buffer_id]
        with forward_state.restored(), with_past_buffers(module, buffers["past"][buffer_id]):
            self._forward(buffer_id)
        module.micro_offset = newest

    def _join_outputs(self, buffer_id: int) -> bool:
        """Hand the host one tensor to start from; return False if no gradient reaches this stage's outputs."""
        host, buffers = self._host, self._host.pipe_buffers
        outputs = as_tuple(buffers["outputs"][buffer_id])
        received = buffers["grads"][buffer_id]
        pairs = [(o, g) for o, g in zip(outputs, received, strict=True) if o.requires_grad and g is not None]
        pairs += self._tied_weights.recv_gradients()
        if not pairs:
            return False
        starts, gradients = zip(*pairs, strict=True)
        start, host.grad_layer = starts[0], gradients[0]
        if len(pairs) > 1:
            start = _Join.apply(gradients, *starts)
            host.grad_layer = torch.ones_like(start)
        buffers["outputs"][buffer_id] = start
        return True
