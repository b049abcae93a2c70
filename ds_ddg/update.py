"""How a stage updates its weights: DeepSpeed's optimizer path, kept inside the stage.

One call ends with ReduceGrads and OptimizerStep, or with AdvanceClocks while no gradient has come back yet; a drain
ends with UpdateWeights. Learning rate and step counts go by calls, on every stage alike, whatever its optimizer does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer, ZeROOptimizer
from deepspeed.runtime.pipe.schedule import OptimizerStep, ReduceGrads, ReduceTiedGrads
from torch import Tensor

from ds_ddg.alone import alone_if_one
from ds_ddg.config import DDGConfig
from ds_ddg.host import Host
from ds_ddg.local import StageLocalGrid, StagePeers, clip_stage_gradients
from ds_ddg.losses import Update
from ds_ddg.optimizers import (
    add_no_gradient,
    anything_to_train,
    clipping_by,
    clocks_stopped,
    fill_groups,
    idle_optimizer,
    norm_unscaled,
    refuse_closure,
    with_a_parameter,
)
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.tied import Ties
from ds_ddg.versions import WeightVersions

__all__ = ["Updater"]


class Updater(Host):
    """Mixed into a ``PipelineEngine``: everything between a stage's gradients and its next weights."""

    ddg: DDGConfig
    versions: WeightVersions
    drain: Callable[[], None]
    _peers: StagePeers
    _ties: Ties
    _calls: int
    _filled_at: int
    _slack: int

    # The host's state that updates share with it.
    device: torch.device
    has_moe_layers: bool
    micro_batches: int
    mpu: Any
    seq_data_parallel_group: Any
    lr_scheduler: Any
    num_stages: int
    optimizer: Any
    param_names: dict[Any, str]
    skipped_steps: int
    using_bf16_optimizer: bool
    _step_applied: bool
    _global_grad_norm: Any

    _pipeline_norm: float | None = None
    """Of the gradients of all stages, of the newest call for which all stages know it."""
    _overflowed = False
    _trains = True
    """Whether this stage has something of its own to train."""
    _passed_on: Any = 0.0
    """0 if the gradients that a stage without such has passed on since its last step were finite, else NaN."""
    _last_update = Update()
    """Of this stage in the call before, and overflows of a drain since."""

    @property
    def plan(self) -> DDGPlan:
        """The plan of the delayed schedule at the present number of micro-batches."""
        return DDGPlan(self.num_stages, self.micro_batches, self._slack)

    def _exec_reduce_grads(self) -> None:
        with self._ties.hidden() if self._ties.owners else nullcontext():
            self._beneath(ReduceGrads)

    def allreduce_gradients(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's, which also puts zeros where there is no gradient; often neither is needed."""
        shared = self.is_data_parallel or self.is_model_parallel or isinstance(self.optimizer, DeepSpeedOptimizer)
        needed = shared or self.schedule == "1f1b"
        if needed or any(p.grad is None and p.requires_grad for p in self.versions.parameters):
            super().allreduce_gradients(*args, **kwargs)

    def _exec_reduce_tied_grads(self) -> None:
        """DeepSpeed's, on its own schedule; its wrappers neither sum up nor clear gradients that are not theirs."""
        for parameter in self._ties.tied:
            if parameter.grad is None:  # a stage that does not use it; DeepSpeed would let the others wait for it
                add_no_gradient(parameter, self.optimizer)
        wrapped: list[Any] = self._ties.held if isinstance(self.optimizer, DeepSpeedOptimizer) else []
        for held in wrapped:
            if self.using_bf16_optimizer and held.grad is not None:
                held._hp_grad = held.grad.to(self.optimizer.grad_acc_dtype)
        self._beneath(ReduceTiedGrads)
        for held in wrapped:
            held.grad = held._hp_grad = None

    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        with self.versions.updating():
            self._step(lr_kwargs)
            updated = {k for k in self._ties.owners if self.plan.updates(k, self._calls, self._filled_at)}
            self._ties.recv_weights(updated)
        self._ties.send_weights()

    def _share_tied_weights(self) -> None:
        self._ties.send_weights()
        self._ties.recv_weights()

    def _scaled(self, loss: Tensor) -> Tensor:
        """The loss as its backward starts from it.

        DeepSpeed 0.19.8 unscales the gradients of every fp16 optimizer, but scales the loss for those of ZeRO alone;
        without ZeRO its learning rate is too small by that factor.
        """
        if not self.fp16_enabled() or isinstance(self.optimizer, ZeROOptimizer):
            return loss
        return loss.float() * float(self.optimizer.loss_scale)

    def _step(self, lr_kwargs: Any = None) -> None:
        """DeepSpeed's; if it skips the weights for an overflow of this stage, the clocks go on with the others'."""
        known = self.skipped_steps, self._step_applied
        with norm_unscaled(self), self._clipped_as_asked():
            self._beneath(OptimizerStep, lr_kwargs)
        self._overflowed = self.skipped_steps > known[0]
        if self.num_stages > 1:
            self.skipped_steps, self._step_applied = known  # until all stages know more
            if self._overflowed and self.lr_scheduler is not None:
                self.lr_scheduler.step()

    def _clipped_as_asked(self) -> AbstractContextManager[None]:
        """By the newest norm known of all, where DeepSpeed's optimizer clips; by its own while there is none."""
        known = self._pipeline_norm if self.ddg.clip == "global" and self.schedule == "ddg" else None
        if known is None or self.gradient_clipping() <= 0 or not isinstance(self.optimizer, DeepSpeedOptimizer):
            return nullcontext()
        return clipping_by(known, self.optimizer)

    def _own_update(self) -> Update:
        """What this stage's update of the call that ends here came to.

        With clipping, the one value that a stage reads back from its device in a call.
        """
        norm = 0.0 if self._global_grad_norm is None or self._overflowed else float(self._global_grad_norm)
        return Update(norm**2, int(self._overflowed))

    def _learn_update(self, update: Update) -> None:
        """What those of all stages came to, at the same call on every rank."""
        if self.num_stages > 1:
            if not update.skipped:  # a stage that overflowed has no norm, so that of the pipeline stays unknown
                self._pipeline_norm = math.sqrt(update.square) if update.square > 0 else None
            self.skipped_steps += update.skipped > 0
            self._step_applied = update.skipped == 0

    def _forget_updates(self, norm: float | None = None, last: Sequence[Any] = ()) -> None:
        """What is known of updates is over, or is that of a checkpoint."""
        self._pipeline_norm, self._last_update = norm, Update(*last)

    def get_global_grad_norm(self) -> Any:
        """Norm of all stages' gradients in call ``loss_step - 1``, equal on every rank; None if not known yet.

        In fp16, if a stage overflowed in that call, in the newest one before it without an overflow.
        """
        if self.num_stages == 1 or self.schedule == "1f1b":
            return super().get_global_grad_norm()
        return self._pipeline_norm

    def _reduce_non_expert_gradients(self, gradients: Any, elements_per_buffer: int) -> None:
        """A stage without replicas has nothing to reduce; DeepSpeed would all-reduce with itself, 2 ms a call."""
        if self.is_data_parallel or self.schedule == "1f1b":
            super()._reduce_non_expert_gradients(gradients, elements_per_buffer)

    def clip_fp32_gradients(self) -> None:
        """By the norm of this stage, or the newest one known of all; DeepSpeed's own clip under 1F1B."""
        if self.schedule == "1f1b":
            super().clip_fp32_gradients()
            return
        known = self._pipeline_norm if self.ddg.clip == "global" else None
        slices = StageLocalGrid(self.mpu)
        self._global_grad_norm = clip_stage_gradients(
            self.versions.parameters, self.gradient_clipping(), slices, known, self.device, self.has_moe_layers
        )

    def _exec_advance_clocks(self) -> None:
        self._global_grad_norm, self._overflowed = None, False
        with idle_optimizer(self):
            self._beneath(OptimizerStep)

    def _take_model_step(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's, on either schedule; its wrappers fail on a stage without a gradient."""
        if self._trains or not isinstance(self.optimizer, DeepSpeedOptimizer):
            super()._take_model_step(*args, **kwargs)
            return
        with idle_optimizer(self):
            super()._take_model_step(*args, **kwargs)
        if self.fp16_enabled():
            # Each replica has passed on other gradients.
            overflow = self._peers.largest(int(not math.isfinite(float(self._passed_on))))
            self.optimizer._update_scale(overflow > 0)
            self._passed_on = 0.0

    def _watch_overflow(self, gradients: Iterable[Tensor | None]) -> None:
        """The scale of a stage that trains nothing goes by the gradients that it passes on, having none of its own."""
        if not self._trains and self.fp16_enabled():
            for gradient in gradients:
                if gradient is not None:
                    self._passed_on = self._passed_on + (gradient * 0.0).sum()

    def _exec_update_weights(self) -> None:
        with clocks_stopped(self), self.versions.updating():
            self._step()
        self._last_update = self._last_update.plus(Update(0.0, int(self._overflowed)))

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        if not self.ddg.enabled:
            super()._configure_optimizer(client_optimizer, model_parameters)
            return
        if "_links" in self.__dict__:
            self.drain()  # what is in flight belongs to the optimizer before
        grid, replicas = self.mpu, self.seq_data_parallel_group
        self.mpu, self.seq_data_parallel_group = StageLocalGrid(grid), alone_if_one(replicas)
        try:
            super()._configure_optimizer(client_optimizer, with_a_parameter(model_parameters))
        finally:
            self.mpu, self.seq_data_parallel_group = grid, replicas
        self._new_versions()  # some projects configure the optimizer only now

    def _check_for_duplicates(self, optimizer: Any) -> None:
        """DeepSpeed's, which sees every optimizer before it is wrapped, whoever made it."""
        if self.ddg.enabled:
            refuse_closure(optimizer)
            self._ties.remove_from(optimizer)
            self._trains = anything_to_train(optimizer)
            if self.fp16_enabled() or self.bfloat16_enabled() or self.zero_optimization():
                fill_groups(optimizer, self.param_names, self.get_data_types()[0], self.device)
        super()._check_for_duplicates(optimizer)

    def _new_versions(self) -> None:
        """Remember weights as suits the optimizer: DeepSpeed's wrappers write into buffers of their own."""
        # Asked of the module, since DeepSpeed configures its optimizer before the engine knows its stage.
        delayed = self.module.stage_id < self.module.num_stages - 1 and self.ddg.weights == "stash"
        pinned = delayed and isinstance(self.optimizer, DeepSpeedOptimizer)
        self.versions = WeightVersions(self.module.parameters(), stash=delayed, pinned=pinned)
