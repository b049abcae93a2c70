"""The update of a stage's weights: DeepSpeed's optimizer path, kept inside the stage.

One call ends with ReduceGrads and OptimizerStep, or with AdvanceClocks while no gradient has come back yet; a drain
ends with UpdateWeights. Learning rate and step counts go by calls, on every stage alike, whatever its optimizer does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer, ZeROOptimizer
from deepspeed.runtime.pipe.schedule import OptimizerStep, ReduceGrads
from torch import Tensor

from ds_ddg.comm.loss_exchange import Update
from ds_ddg.host import Host
from ds_ddg.stage import RunState, Stage
from ds_ddg.staleness.apply import DELAYED
from ds_ddg.weights.muon_step import from_config, stepping, with_both_kinds
from ds_ddg.weights.optimizer_wrappers import (
    anything_to_train,
    clipping_by,
    clocks_stopped,
    fill_groups,
    idle_optimizer,
    norm_unscaled,
    refuse_closure,
    with_a_parameter,
)
from ds_ddg.weights.single_rank import local_if_single_rank
from ds_ddg.weights.stage_groups import StageLocalGrid, StagePeers, clip_stage_gradients
from ds_ddg.weights.stage_rules import StageRules
from ds_ddg.weights.tied import TiedWeights
from ds_ddg.weights.versions import WeightVersions

__all__ = ["StageOptimizer"]

_Method = Callable[..., Any]
"""DeepSpeed's own method, or a project's, beneath the delayed engine's."""


class StageOptimizer:
    """The way from the gradients of a stage to its next weights.

    Args:
        stage: this stage.
        run: the place of the stage in its run.
        host: DeepSpeed's engine.
        tied_weights: the weights that this stage shares with others.
    """

    def __init__(self, stage: Stage, run: RunState, host: Host, tied_weights: TiedWeights) -> None:
        self._stage, self._run, self._host, self._tied_weights = stage, run, host, tied_weights
        self._peers = StagePeers([])
        self.rules = StageRules(stage, run, host)
        """What is done about stale gradients."""
        self.versions: WeightVersions
        """The versions of the weights that micro-batches saw; set by the first `configure`."""
        self.pipeline_norm: float | None = None
        """The norm of the gradients of all stages, in the newest call for which all stages know it."""
        self.last = Update()
        """The result of this stage's update in the call before, with the overflows of a drain since."""
        self.trains = True
        """Whether this stage has something of its own to train."""
        self._overflowed = False
        self._forwarded_overflow: Any = 0.0
        """Zero if all gradients that a stage with nothing to train has forwarded since its last step were finite."""

    # -- construction -----------------------------------------------------------------------------------------------

    def connect(self, peers: StagePeers) -> None:
        """Take the `peers` over which the ranks of this stage can agree on a number from here on."""
        self._peers = peers

    def configure(self, configure: _Method, client_optimizer: Any, model_parameters: Any) -> None:
        """Have DeepSpeed `configure` its optimizer inside the stage: without collectives that cross its border."""
        host, grid, replicas = self._host, self._host.mpu, self._host.seq_data_parallel_group
        muon = client_optimizer is None and from_config(host)
        host.mpu = None if muon and host.bfloat16_enabled() else StageLocalGrid(grid)  # its wrapper takes no other
        host.seq_data_parallel_group = local_if_single_rank(replicas)
        try:
            configure(client_optimizer, (with_both_kinds if muon else list)(with_a_parameter(model_parameters)))
        finally:
            host.mpu, host.seq_data_parallel_group = grid, replicas
        self.rules.attach(host.optimizer)
        self.new_versions()  # some projects configure the optimizer only now

    def adopt(self, optimizer: Any) -> None:
        """Prepare an `optimizer` that DeepSpeed has not wrapped yet, whoever made it."""
        host = self._host
        refuse_closure(optimizer)
        self.rules.choose(optimizer)
        self._tied_weights.remove_from(optimizer)
        self.trains = anything_to_train(optimizer)
        if host.fp16_enabled() or host.bfloat16_enabled() or host.zero_optimization():
            fill_groups(optimizer, host.param_names, host.get_data_types()[0], host.device)

    def new_versions(self) -> None:
        """Remember weights as suits the optimizer: DeepSpeed's wrappers write into buffers of their own."""
        delayed = not self._stage.is_last and self._stage.config.weights == "stash"
        pinned = delayed and isinstance(self._host.optimizer, DeepSpeedOptimizer)
        self.versions = WeightVersions(self._host.module.parameters(), stash=delayed, pinned=pinned)

    # -- instructions -----------------------------------------------------------------------------------------------

    def reduce_gradients(self) -> None:
        """Average the gradients over the replicas of this stage, all but those of borrowed weights."""
        with self._tied_weights.hidden() if self._tied_weights.owners else nullcontext():
            self._host.carry_out(ReduceGrads)

    def step(self, lr_kwargs: Any = None) -> None:
        """End a call: one update, and the tied weights of the next call."""
        with self.versions.updating():
            self._step(lr_kwargs)
            run = self._run
            updated = {k for k in self._tied_weights.owners if run.plan.updates(k, run.call, run.filled_at)}
            self._tied_weights.recv_weights(updated)
        self._tied_weights.send_weights()

    def advance_clocks(self) -> None:
        """End a call in which no gradient has come back: learning rate and step counts move on, the weights stay."""
        self._host._global_grad_norm, self._overflowed = None, False
        with idle_optimizer(self._host):
            self._host.carry_out(OptimizerStep)

    def update_weights(self) -> None:
        """Update within a drain: the weights move on, learning rate and step counts stay."""
        with clocks_stopped(self._host), self.versions.updating():
            self._step()
        self.last = self.last.plus(Update(0.0, int(self._overflowed)))

    def reduce_tied_gradients(self) -> None:
        """Sum tied gradients as DeepSpeed does, on its own schedule."""
        self._tied_weights.reduce_by_deepspeed(self._host)

    def share_tied_weights(self) -> None:
        """Copy owners' weights to their holders, between two calls of DeepSpeed's schedule or in a drain."""
        self._tied_weights.send_weights()
        self._tied_weights.recv_weights()

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss from which its backward starts, with the loss scale where DeepSpeed forgets it.

        DeepSpeed 0.19.8 unscales the gradients of every fp16 optimizer, but scales the loss for those of ZeRO alone;
        without ZeRO its learning rate is too small by that factor.
        """
        optimizer = self._host.optimizer
        if not self._host.fp16_enabled() or isinstance(optimizer, ZeROOptimizer):
            return loss
        return loss.float() * float(optimizer.loss_scale)

    def watch_overflow(self, gradients: Iterable[Tensor | None]) -> None:
        """Note overflows in what a stage with nothing to train forwards: its loss scale follows them."""
        if not self.trains and self._host.fp16_enabled():
            for gradient in gradients:
                if gradient is not None:
                    self._forwarded_overflow = self._forwarded_overflow + (gradient * 0.0).sum()

    # -- beneath DeepSpeed's step -----------------------------------------------------------------------------------

    def allreduce(self, allreduce: _Method, *args: Any, **kwargs: Any) -> None:
        """Run DeepSpeed's `allreduce`, which also puts zeros in place of missing gradients, where either is needed."""
        host = self._host
        shared = host.is_data_parallel or host.is_model_parallel or isinstance(host.optimizer, DeepSpeedOptimizer)
        needed = shared or not self._run.delayed
        # Under `ds_ddg.delayed` a missing gradient is one that is not due yet, and its parameter is to stay as it is.
        filled = DELAYED not in vars(host.optimizer)
        if needed or (filled and any(p.grad is None and p.requires_grad for p in self.versions.parameters)):
            allreduce(*args, **kwargs)

    def reduce_non_experts(self, reduce: _Method, *args: Any) -> None:
        """Run DeepSpeed's `reduce` if this stage has replicas; it would all-reduce with itself, 2 ms a call."""
        if self._host.is_data_parallel or not self._run.delayed:
            reduce(*args)

    def clip(self) -> None:
        """Clip fp32 gradients by the norm of this stage, or by the newest known norm of all stages."""
        host = self._host
        known = self.pipeline_norm if self._stage.config.clip == "global" else None
        host._global_grad_norm = clip_stage_gradients(
            self.versions.parameters,
            self.rules.max_norm or math.inf,  # the last stage may only measure
            StageLocalGrid(host.mpu),
            known,
            host.device,
            host.has_moe_layers,
        )

    def take_model_step(self, take_step: _Method, *args: Any, **kwargs: Any) -> None:
        """Run DeepSpeed's `take_step` on either schedule, although its wrappers fail on a stage without a gradient."""
        host = self._host
        if self.rules.clips_alone and not isinstance(host.optimizer, DeepSpeedOptimizer):
            self.clip()
        idle = not self.trains and isinstance(host.optimizer, DeepSpeedOptimizer)
        with idle_optimizer(host) if idle else stepping(host.optimizer):
            take_step(*args, **kwargs)
        if idle and host.fp16_enabled():
            # Each replica has forwarded other gradients.
            overflow = self._peers.largest(int(not math.isfinite(float(self._forwarded_overflow))))
            host.optimizer._update_scale(overflow > 0)
            self._forwarded_overflow = 0.0

    def _step(self, lr_kwargs: Any = None) -> None:
        """Run DeepSpeed's step; if it skips the weights for an overflow of this stage, step counts still go on."""
        host = self._host
        known = host.skipped_steps, host._step_applied
        with norm_unscaled(host, self._stage.num_stages), self._clipped_as_asked():
            host.carry_out(OptimizerStep, lr_kwargs)
        self._overflowed = host.skipped_steps > known[0]
        if self.trains and not self._overflowed:
            self.rules.check()
        if self._stage.num_stages > 1:
            host.skipped_steps, host._step_applied = known  # until all stages know more
            if self._overflowed and host.lr_scheduler is not None:
                host.lr_scheduler.step()

    def _clipped_as_asked(self) -> AbstractContextManager[None]:
        """Have DeepSpeed's optimizer clip by the newest norm of all stages, or by that of this stage."""
        optimizer = self._host.optimizer
        if not isinstance(optimizer, DeepSpeedOptimizer) or not self._run.delayed:
            return nullcontext()
        known = self.pipeline_norm if self._stage.config.clip == "global" else None
        if known is None or self._host.gradient_clipping() <= 0:
            return self.rules.clipping(optimizer)
        return clipping_by(known, optimizer)

    # -- results of updates -----------------------------------------------------------------------------------------

    def end_call(self) -> None:
        """Note the result of this stage's update in the call that ends here.

        With clipping, the norm is the one value that a stage reads back from its device in a call.
        """
        norm = self._host._global_grad_norm
        self.last = Update(0.0 if norm is None or self._overflowed else float(norm) ** 2, int(self._overflowed))

    def learn(self, update: Update) -> None:
        """Take over the result of the updates of all stages, at the same call on every rank."""
        if self._stage.num_stages > 1:
            if not update.skipped:  # a stage that overflowed has no norm, so that of the pipeline stays unknown
                self.pipeline_norm = math.sqrt(update.square) if update.square > 0 else None
            self._host.skipped_steps += update.skipped > 0
            self._host._step_applied = update.skipped == 0

    def restart(self, norm: float | None = None, last: Sequence[Any] = ()) -> None:
        """Forget the results of updates, or take them from a checkpoint.

        Args:
            norm: the norm of the gradients of all stages, if known.
            last: the fields of the last `Update` of this stage.
        """
        self.pipeline_norm, self.last = norm, Update(*last)
