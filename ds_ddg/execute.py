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

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from deepspeed.runtime.pipe import schedule as instructions
from torch import Tensor

from ds_ddg.config import DDGConfig
from ds_ddg.links import Links, as_tuple
from ds_ddg.local import IdleOptimizer, StageLocalGrid, clip_stage_gradients, fold_buffers_back
from ds_ddg.schedule import AdvanceClocks, UpdateWeights
from ds_ddg.versions import WeightVersions

if TYPE_CHECKING:
    from typing import Any as _Host  # DeepSpeed's engine, untyped; it comes next in the MRO of DDGEngine
else:
    _Host = object

__all__ = ["Executor"]


_PLAIN = {type(None), bool, int, float, list, dict, MethodType, Tensor}


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


class Executor(_Host):
    """Mixed into a ``PipelineEngine``: the instructions of a delayed call."""

    ddg: DDGConfig
    versions: WeightVersions
    _links: Links

    # The host's state that the instructions share with it.
    _INSTRUCTION_MAP: Any
    grad_layer: Any
    loss: Tensor
    mpu: Any
    num_pipe_buffers: int
    optimizer: Any
    pipe_buffers: dict[str, list[Any]]

    _activation_spec: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        """An engine is a Module, which examines each value for parameters; DeepSpeed sets 40 plain ones a call."""
        if type(value) in _PLAIN and name in self.__dict__:
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def _ddg_instruction_map(self) -> dict[type, Callable[..., None]]:
        """The host's map as it is now, projects' own additions included, with our methods for what differs."""
        return {
            **type(self)._INSTRUCTION_MAP,
            instructions.ForwardPass: Executor._exec_forward_pass,
            instructions.BackwardPass: Executor._exec_backward_pass,
            instructions.SendActivation: Executor._exec_send_activations,
            instructions.RecvActivation: Executor._exec_recv_activations,
            instructions.SendGrad: Executor._exec_send_grads,
            instructions.RecvGrad: Executor._exec_recv_grads,
            instructions.OptimizerStep: Executor._exec_optimizer_step,
            AdvanceClocks: Executor._exec_advance_clocks,
            UpdateWeights: Executor._exec_update_weights,
        }

    @property
    def _recomputes(self) -> bool:
        """Whether the graph is built only when the gradient is here; pointless where it comes in the same tick."""
        return self.ddg.activations == "recompute" and not self.is_last_stage()

    def _exec_recv_activations(self, buffer_id: int) -> None:
        inputs = self._links.recv_activations()
        for tensor in as_tuple(inputs):
            tensor.requires_grad_(tensor.is_floating_point())
        self.pipe_buffers["inputs"][buffer_id] = inputs

    def _exec_forward_pass(self, buffer_id: int) -> None:
        if not torch.is_grad_enabled():
            super()._exec_forward_pass(buffer_id)
            return
        self.versions.remember(buffer_id)
        if self._recomputes:
            self.pipe_buffers["rng"][buffer_id] = torch.get_rng_state()
        with torch.set_grad_enabled(not self._recomputes):
            super()._exec_forward_pass(buffer_id)

    def _exec_send_activations(self, buffer_id: int) -> None:
        outputs = self.pipe_buffers["outputs"][buffer_id]
        self._check_activation(outputs)
        self._links.send_activations(outputs)
        if self._recomputes or not torch.is_grad_enabled():
            self.pipe_buffers["outputs"][buffer_id] = None

    def _exec_recv_grads(self, buffer_id: int) -> None:
        self.pipe_buffers["grads"][buffer_id] = self._links.recv_grads()

    def _exec_backward_pass(self, buffer_id: int) -> None:
        with self.versions.using(buffer_id):
            if self._recomputes:
                self._recompute(buffer_id)
            if self.is_last_stage() or self._join_outputs(buffer_id):
                super()._exec_backward_pass(buffer_id)
        self.versions.forget(buffer_id)
        self.grad_layer = None
        self.loss = self.loss.detach()
        for column in ("outputs", "labels", "grads", "rng"):
            self.pipe_buffers[column][buffer_id] = None
        if self.is_first_stage():
            self.pipe_buffers["inputs"][buffer_id] = None

    def _join_outputs(self, buffer_id: int) -> bool:
        """Hand the host one tensor to start from; False if no gradient reaches this stage's outputs."""
        outputs = as_tuple(self.pipe_buffers["outputs"][buffer_id])
        received = self.pipe_buffers["grads"][buffer_id]
        pairs = [(o, g) for o, g in zip(outputs, received, strict=True) if o.requires_grad and g is not None]
        if not pairs:
            return False
        starts, gradients = zip(*pairs, strict=True)
        self.pipe_buffers["outputs"][buffer_id] = _Join.apply(gradients, *starts)
        self.grad_layer = torch.ones_like(self.pipe_buffers["outputs"][buffer_id])
        return True

    def _recompute(self, buffer_id: int) -> None:
        """Run the forward again as it ran the first time: same input, same random numbers, no trace in the buffers."""
        with torch.random.fork_rng(devices=[]), fold_buffers_back(self.module):
            torch.set_rng_state(self.pipe_buffers["rng"][buffer_id])
            super()._exec_forward_pass(buffer_id)

    def _exec_send_grads(self, buffer_id: int) -> None:
        inputs = as_tuple(self.pipe_buffers["inputs"][buffer_id])
        self.pipe_buffers["inputs"][buffer_id] = None
        self._links.send_grads([tensor.grad for tensor in inputs])

    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        with self.versions.updating():
            super()._exec_optimizer_step(lr_kwargs)

    def _reduce_non_expert_gradients(self, gradients: Any, elements_per_buffer: int) -> None:
        """A stage without replicas has nothing to reduce; DeepSpeed would all-reduce with itself, 2 ms a call."""
        if self.is_data_parallel or self.schedule == "1f1b":
            super()._reduce_non_expert_gradients(gradients, elements_per_buffer)

    def clip_fp32_gradients(self) -> None:
        """By the norm of this stage under DDG; DeepSpeed's own clip under 1F1B."""
        if self.schedule == "1f1b":
            super().clip_fp32_gradients()
        else:
            norm = clip_stage_gradients(self.module.parameters(), self.gradient_clipping())
            self._global_grad_norm = norm

    def _exec_advance_clocks(self) -> None:
        self.optimizer, optimizer = IdleOptimizer(self.optimizer), self.optimizer
        try:
            with warnings.catch_warnings():
                # torch warns when a scheduler steps before its optimizer; here that is the meaning of a warm-up call.
                warnings.filterwarnings("ignore", message=r".*lr_scheduler\.step\(\).*before.*optimizer\.step\(\)")
                super()._exec_optimizer_step()
        finally:
            self.optimizer = optimizer

    def _exec_update_weights(self) -> None:
        with self._clocks_stopped():
            self._exec_optimizer_step()

    def _configure_optimizer(self, *args: Any, **kwargs: Any) -> None:
        if not self.ddg.enabled:
            super()._configure_optimizer(*args, **kwargs)
            return
        grid, self.mpu = self.mpu, StageLocalGrid(self.mpu)
        try:
            super()._configure_optimizer(*args, **kwargs)
        finally:
            self.mpu = grid
        self._new_versions()  # some projects configure the optimizer only now

    def _new_versions(self) -> None:
        """Remember weights as suits the optimizer: DeepSpeed's wrappers write into buffers of their own."""
        # Asked of the module, since DeepSpeed configures its optimizer before the engine knows its stage.
        delayed = self.module.stage_id < self.module.num_stages - 1 and self.ddg.weights == "stash"
        pinned = delayed and isinstance(self.optimizer, DeepSpeedOptimizer)
        self.versions = WeightVersions(self.module.parameters(), stash=delayed, pinned=pinned)

    @contextmanager
    def _buffers_of_its_own(self) -> Iterator[None]:
        """For evaluation: micro-batches in flight keep their buffers."""
        mine = self.pipe_buffers, self.num_pipe_buffers
        self.pipe_buffers, self.num_pipe_buffers = {column: [] for column in self.pipe_buffers}, 0
        try:
            yield
        finally:
            self.pipe_buffers, self.num_pipe_buffers = mine

    @contextmanager
    def _clocks_stopped(self) -> Iterator[None]:
        clocks = ("global_steps", "global_samples", "lr_scheduler")
        saved = {name: getattr(self, name) for name in clocks}
        self.lr_scheduler = None
        try:
            yield
        finally:
            for name, value in saved.items():
                setattr(self, name, value)

    def _check_activation(self, outputs: Any) -> None:
        """What leaves a stage is a tensor or a tuple of tensors, in training always of one shape."""
        if not torch.is_tensor(outputs) and not (isinstance(outputs, tuple) and all(map(torch.is_tensor, outputs))):
            raise TypeError(
                f"the last layer of stage {self.stage_id} returned {type(outputs).__name__}; "
                "what goes to the next stage must be a tensor or a tuple of tensors"
            )
        if not torch.is_grad_enabled():
            return
        spec = [(t.dtype, tuple(t.shape)) for t in as_tuple(outputs)]
        if self._activation_spec not in (None, spec):
            raise ValueError(
                f"the activations of stage {self.stage_id} changed from {self._activation_spec} to {spec}; "
                "make every micro-batch the same shape (drop_last=True, padding)"
            )
        self._activation_spec = spec
