"""How each instruction of a call is carried out: short methods, one per instruction, DeepSpeed's own wherever it can.

One micro-batch on stage k, top to bottom; each tensor is put once, taken once, and freed by whoever took it:

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

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule as instructions
from torch import Tensor
from torch.nn import Module

from ds_ddg.again import Circumstances, PastBuffers, keeping_nothing, never_detached, with_past_buffers
from ds_ddg.data import Feed
from ds_ddg.host import METHODS
from ds_ddg.links import Links, as_tuple
from ds_ddg.outputs import FixedShape, refuse_activation, refuse_loss, with_checks, with_own_memory
from ds_ddg.schedule import AdvanceClocks, UpdateWeights
from ds_ddg.update import Updater

__all__ = ["Executor"]


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


@functools.cache
def _registered(kind: type) -> bool:
    """Whether a module keeps values of this type in a register; a parameter is a tensor, of a class of its own."""
    return issubclass(kind, Module) or (issubclass(kind, Tensor) and kind is not Tensor)


def _without_graph(outputs: Any) -> Any:
    """Tensors that still say whether they require a gradient."""
    if isinstance(outputs, tuple):
        return tuple(map(_without_graph, outputs))
    return outputs.detach().requires_grad_(outputs.requires_grad) if torch.is_tensor(outputs) else outputs


class Executor(Updater):
    """Mixed into a ``PipelineEngine``: the instructions of a delayed call."""

    _feed: Feed
    _links: Links

    # The host's state that the instructions share with it.
    _INSTRUCTION_MAP: Any
    grad_layer: Any
    loss: Tensor
    num_pipe_buffers: int
    pipe_buffers: dict[str, list[Any]]

    def __setattr__(self, name: str, value: Any) -> None:
        """An engine is a Module, which examines each value for parameters; DeepSpeed sets 40 plain ones a call."""
        if name in self.__dict__ and not _registered(type(value)):  # type: ignore[arg-type]
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def _ddg_instruction_map(self) -> dict[type, Callable[..., None]]:
        """The host's map as it is now, projects' own additions included, with our methods for what differs."""
        # Each tensor slice sends whole activations to its own successor; DeepSpeed's default is a part and a gather.
        self.is_pipe_partitioned = self.is_grad_partitioned = False
        return {
            **type(self)._INSTRUCTION_MAP,
            **{instruction: getattr(type(self), name) for instruction, name in METHODS.items()},
            AdvanceClocks: Executor._exec_advance_clocks,
            UpdateWeights: Executor._exec_update_weights,
        }

    def _choose_instructions(self) -> None:
        """Those of the present schedule."""
        if self.schedule == "ddg":
            self._INSTRUCTION_MAP = self._ddg_instruction_map()
        else:
            tied = {instructions.ReduceTiedGrads: Executor._exec_reduce_tied_grads} if self._ties.tied else {}
            self._INSTRUCTION_MAP = {**with_checks(type(self)._INSTRUCTION_MAP), **tied}

    @property
    def _recomputes(self) -> bool:
        """Whether the graph is built only when the gradient is here; pointless where it comes in the same tick."""
        return self.ddg.activations == "recompute" and not self.is_last_stage()

    @functools.cached_property
    def _fixed_shape(self) -> FixedShape:
        return FixedShape(self.stage_id)

    @functools.cached_property
    def _past_buffers(self) -> PastBuffers:
        return PastBuffers()

    @property
    def _checkpoints(self) -> bool:
        """Whether parts of a forward run again within the backward."""
        return bool(self.module.activation_checkpoint_interval > 0)

    def _exec_load_micro_batch(self, buffer_id: int) -> None:
        self._beneath(instructions.LoadMicroBatch, buffer_id)

    def _exec_recv_activations(self, buffer_id: int) -> None:
        self.pipe_buffers["inputs"][buffer_id] = self._links.recv_activations()

    def _exec_forward_pass(self, buffer_id: int) -> None:
        if not torch.is_grad_enabled():
            self._beneath(instructions.ForwardPass, buffer_id)
            return
        self.versions.remember(buffer_id)
        if self._recomputes or self._checkpoints:
            self.pipe_buffers["past"][buffer_id] = self._past_buffers.now(self.module)
        if not self._recomputes:
            self._forward(buffer_id)
            return
        self.pipe_buffers["rng"][buffer_id] = Circumstances(self.device), self.module.micro_offset
        with keeping_nothing(self.stage_id):
            self._forward(buffer_id)
        self.pipe_buffers["outputs"][buffer_id] = _without_graph(self.pipe_buffers["outputs"][buffer_id])

    def _forward(self, buffer_id: int) -> None:
        with never_detached(self.module) if self._reentrant_activation_checkpointing() else nullcontext():
            before = self.loss
            try:
                with self._summing_losses():
                    self._beneath(instructions.ForwardPass, buffer_id)
            except (AttributeError, TypeError) as error:
                if self.loss is not before:  # to DeepSpeed, what is no tensor is a list of them
                    refuse_loss(self.loss, self.module.loss_fn is None, error)
                raise
        if self.is_last_stage():
            refuse_loss(self.loss, self.module.loss_fn is None)

    def _exec_send_activations(self, buffer_id: int) -> None:
        outputs = self.pipe_buffers["outputs"][buffer_id]
        self._check_activation(outputs)
        self._links.send_activations(with_own_memory(outputs, self.module))
        if self._recomputes or not torch.is_grad_enabled():
            self.pipe_buffers["outputs"][buffer_id] = None

    def _exec_recv_grads(self, buffer_id: int) -> None:
        self.pipe_buffers["grads"][buffer_id] = self._links.recv_grads()

    def _exec_backward_pass(self, buffer_id: int) -> None:
        past = self.pipe_buffers["past"][buffer_id] or {}
        with self.versions.using(buffer_id):
            if self._recomputes:
                self._recompute(buffer_id)
            if self.is_last_stage():
                self.loss = self._scaled(self.loss)
            with with_past_buffers(self.module, past) if self._checkpoints else nullcontext():
                if self.is_last_stage() or self._join_outputs(buffer_id):
                    self._beneath(instructions.BackwardPass, buffer_id)
        if not self._trains:
            inputs = as_tuple(self.pipe_buffers["inputs"][buffer_id])
            self._watch_overflow([*(tensor.grad for tensor in inputs), *(held.grad for held in self._ties.held)])
        self._ties.send_gradients()
        self.versions.forget(buffer_id)
        self.grad_layer = None
        if self.is_last_stage():
            self.loss = self.loss.detach()
        for column in ("outputs", "labels", "grads", "rng", "past"):
            self.pipe_buffers[column][buffer_id] = None
        if self.is_first_stage():
            self.pipe_buffers["inputs"][buffer_id] = None

    def _join_outputs(self, buffer_id: int) -> bool:
        """Hand the host one tensor to start from; False if no gradient reaches this stage's outputs."""
        outputs = as_tuple(self.pipe_buffers["outputs"][buffer_id])
        received = self.pipe_buffers["grads"][buffer_id]
        pairs = [(o, g) for o, g in zip(outputs, received, strict=True) if o.requires_grad and g is not None]
        pairs += self._ties.recv_gradients()
        if not pairs:
            return False
        starts, gradients = zip(*pairs, strict=True)
        start, self.grad_layer = starts[0], gradients[0]
        if len(pairs) > 1:
            start = _Join.apply(gradients, *starts)
            self.grad_layer = torch.ones_like(start)
        self.pipe_buffers["outputs"][buffer_id] = start
        return True

    def _recompute(self, buffer_id: int) -> None:
        """Run the forward again as the first time: same input, random numbers and buffers, and no trace in these."""
        newest = self.module.micro_offset
        circumstances, self.module.micro_offset = self.pipe_buffers["rng"][buffer_id]
        with circumstances.again(), with_past_buffers(self.module, self.pipe_buffers["past"][buffer_id]):
            self._forward(buffer_id)
        self.module.micro_offset = newest

    def _exec_send_grads(self, buffer_id: int) -> None:
        inputs = as_tuple(self.pipe_buffers["inputs"][buffer_id])
        self.pipe_buffers["inputs"][buffer_id] = None
        self._links.send_grads([tensor.grad for tensor in inputs])

    @contextmanager
    def _buffers_of_its_own(self) -> Iterator[None]:
        """For evaluation: micro-batches in flight keep their buffers."""
        mine = self.pipe_buffers, self.num_pipe_buffers
        self.pipe_buffers, self.num_pipe_buffers = {column: [] for column in self.pipe_buffers}, 0
        try:
            yield
        finally:
            self.pipe_buffers, self.num_pipe_buffers = mine

    def reset_activation_shape(self) -> None:
        """DeepSpeed's: from here on another shape. Messages say theirs, so what is in flight does not mind."""
        super().reset_activation_shape()
        self._fixed_shape.reset()
        self._feed.reset_shape()

    def _check_activation(self, outputs: Any) -> None:
        """What leaves a stage is a tensor or a tuple of tensors, in training of one shape unless told otherwise."""
        refuse_activation(outputs, self.stage_id)
        if torch.is_grad_enabled() and not self.dynamic_shape:
            self._fixed_shape.check(as_tuple(outputs))
