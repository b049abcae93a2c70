"""``DDGEngine``: a ``PipelineEngine`` whose ``train_batch`` leaves its last micro-batches in flight.

A call never waits for the stages behind it: it ends when this stage has done its M ticks. What that changes for the
rest of the engine's life is here; how one instruction is carried out is in ``execute.py``; their order in ``plan.py``.

    train_batch   data for the whole call first, then the plan's operations, then the newest loss known without a wait
    drain         the backward passes in flight, an update whenever M have accumulated; nothing is retained
    eval_batch    between two calls, with buffers of its own; what is in flight stays there
    schedule      "ddg" or "1f1b", switched between calls, draining first

Calls count from 0 on every rank alike, and so do the learning rate and ``global_steps``, whatever is in flight.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from ds_ddg.calls import Calls
from ds_ddg.checkpoints import Checkpoints
from ds_ddg.clock import clock_for
from ds_ddg.config import DDGConfig
from ds_ddg.connections import group_of_all, own_group
from ds_ddg.data import Feed
from ds_ddg.experts import create_expert_groups, expert_sizes
from ds_ddg.host import refuse_overrides, warn_of_patches
from ds_ddg.local import StagePeers
from ds_ddg.record import Recorded
from ds_ddg.refusals import refuse_experts, refuse_switch, refuse_unsupported
from ds_ddg.schedule import DDGSchedule
from ds_ddg.slack import AutoSlack
from ds_ddg.staging import staging_for, without_greetings
from ds_ddg.tied import Ties
from ds_ddg.together import OutOfDataError, Together, stay_until_the_others_leave, together, with_its_data
from ds_ddg.watch import WatchedLinks

__all__ = ["DDGEngine", "DDGMixin"]


class DDGMixin(Calls, AutoSlack, Checkpoints, Recorded, Together):
    """The delayed schedule on top of any ``PipelineEngine``; see the module's docstring."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_overrides(cls, DDGMixin)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.ddg = DDGConfig.parse(kwargs["config_class"]._param_dict.get("ddg"))
        if self.ddg.enabled:
            refuse_overrides(type(self), DDGMixin)  # maps may have changed since
            warn_of_patches()
        refuse_unsupported(kwargs["config_class"], kwargs["model"], self.ddg.enabled)
        sizes = expert_sizes(kwargs["model"])
        if self.ddg.enabled:
            refuse_experts(kwargs["config_class"], kwargs["model"], sizes)
        create_expert_groups(sizes, kwargs["config_class"], kwargs["model"])
        self._schedule = "1f1b"
        self._start_trial(kwargs["model"].num_stages)
        self._ties = Ties(kwargs["model"], self.ddg.enabled)
        with without_greetings() if self.ddg.enabled else nullcontext():
            super().__init__(*args, **kwargs)
        self._calls = 0
        self._filled_at = 0
        self._parked = True
        self._new_versions()
        self.pipe_buffers.update(grads=[], rng=[], past=[])
        staging = staging_for(self.device)
        self._peers = StagePeers(self._peers_of_stage())
        self._feed = Feed(self.is_first_stage(), self.is_last_stage(), self._peers, staging)
        pipelines = self.grid.topology().get_axis_comm_lists("pipe")
        clock = clock_for(self.device) if self.ddg.timed else None
        self._links = WatchedLinks(pipelines, self.global_rank, self.plan, staging, clock=clock)
        stay_until_the_others_leave(self._links)
        self._set_out()

    @together
    def _set_out(self) -> None:
        """The rest of the construction: here the other stages hear if it fails."""
        if self.ddg.timed:
            self._everyone = group_of_all(self.global_rank)
        self._start_reports()
        self._start_recording()
        if self.fp16_enabled():
            engine: Any = weakref.ref(self)  # the links live longer
            self._links.loss_scale = lambda: float(engine().optimizer.loss_scale)
        self._ties.connect(self._links, self.stage_id, self.plan)
        self._choose_instructions()
        self._ddg_from = self.ddg.sync_steps if self.ddg.enabled else None
        if self._ddg_from == 0:
            self.schedule = "ddg"

    # -- life of a call ---------------------------------------------------------------------------------------------

    @together
    def train_batch(self, data_iter: Iterator[Any] | None = None, **more: Any) -> torch.Tensor:
        """One call: M ticks and at most one update. DeepSpeed's signature and, but for its age, its result.

        Args:
            data_iter: yields micro-batches ``(inputs, labels)``; exactly M are pulled on the first and last stage.
            **more: for a project's own ``train_batch``, if it takes more; its result is what this returns.

        Returns:
            0-dim tensor, the same on every rank: the mean loss of call number ``loss_step``.

        Raises:
            StopIteration: on every rank, if the data ends inside this call; nothing of the call has been trained on.
            StageError: another stage failed, left or was lost.
        """
        self._refuse_torn()
        self.versions.refuse_changes(self.module, self.stage_id)
        if self._ddg_from is not None and self.global_steps >= self._ddg_from:
            self.schedule = "ddg"
        self._settle_slack()
        given = () if data_iter is None else (data_iter,)
        with self._calling("train_batch") as call:
            try:
                loss: torch.Tensor = with_its_data(super().train_batch, *given, **more)
            except OutOfDataError:
                self._forget_time()
                raise
            finally:
                self._speak()
        self.versions.leave()
        if call.executed:  # a project's own may have nothing to do
            self._close_call()
        return loss

    def _close_call(self) -> None:
        if self._schedule == "ddg":
            self._report_call()
            return
        if self._losses.newest.call < self._calls - 1:  # a project's own train_batch does without DeepSpeed's loss
            self._losses.restart(self._calls, None)
        if self.ddg.enabled:
            self._share_tied_weights()

    def eval_batch(
        self,
        data_iter: Iterator[Any],
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """Evaluate the weights of the current call on all stages. DeepSpeed's signature and result.

        Raises:
            StopIteration: on every rank, if the data ends before `num_micro_batches` (default: M).
            ValueError, NotImplementedError: on every rank, if these arguments have no result.
        """
        if reduce_output is not None and reduce_output.lower() != "avg":
            raise NotImplementedError(f'reduce_output must be "avg" or None, got {reduce_output!r}')
        if reduce_output is None and compute_loss and bcast_loss:
            raise ValueError("reduce_output=None gives a list, and only a mean is sent to all: pass bcast_loss=False")
        # A project's own eval_batch may know no other arguments than it is given.
        defaults = {"return_logits": False, "compute_loss": True, "reduce_output": "avg", "bcast_loss": True}
        values = return_logits, compute_loss, reduce_output, bcast_loss
        asked: dict[str, Any] = {
            name: value for (name, usual), value in zip(defaults.items(), values, strict=True) if value != usual
        }
        if num_micro_batches is not None:
            asked["num_micro_batches"] = num_micro_batches
        return self._evaluate(data_iter, asked, compute_loss, compute_loss and reduce_output is not None)

    @together
    def drain(self) -> None:
        """Finish every backward pass in flight. Nothing is left in flight or retained; twice does nothing.

        Steps the optimizer whenever M gradients have accumulated and once for the rest, at the present learning rate.

        To be called before a script writes into weights, replaces or freezes them: with micro-batches in flight the
        next call refuses that, but for writes through ``.data``, which ``WeightVersions.refuse_changes`` says more of.
        """
        if self._parked:
            return
        self.versions.refuse_changes(self.module, self.stage_id)
        end = self._calls * self.micro_batches
        if self._schedule == "ddg" and end > self._filled_at:
            self.module.train()
            ops = self.plan.drain(self.stage_id, end, self._filled_at)
            with torch.enable_grad(), self._in_silence():  # it may be called from evaluation code
                self._exec_schedule(DDGSchedule(self.plan, self.stage_id, ops, draining=True))
                self._share_tied_weights()
            self._learn_loss(self._calls - 1)
            self._gauge.forget()
        self._complete_steps()
        self._links.park()
        self._parked = True
        self._filled_at = end
        self.versions.assert_empty()

    @property
    def schedule(self) -> str:
        """``"ddg"`` or ``"1f1b"`` (DeepSpeed's own); assign between calls, on every rank, to switch."""
        return self._schedule

    @schedule.setter
    def schedule(self, name: str) -> None:
        if name not in ("ddg", "1f1b"):
            raise ValueError(f'schedule must be "ddg" or "1f1b", got {name!r}')
        self._ddg_from = None  # whoever assigns it decides from here on
        if name == self._schedule:
            return
        if name == "ddg" and not self.ddg.enabled:
            refuse_unsupported(self._config, self.module)
        refuse_switch(name, self.ddg.enabled, self._config, self.module)
        self.drain()
        self._forget_updates()
        self._schedule = name
        self._choose_instructions()
        self.pipe_buffers = {column: [None] * self.num_pipe_buffers for column in self.pipe_buffers}
        self.reset_activation_shape()

    # -- what DeepSpeed calls ---------------------------------------------------------------------------------------

    def destroy(self) -> None:
        """DeepSpeed's; the other stages learn that this one has left."""
        links = self.__dict__.get("_links")  # DeepSpeed also calls this for an engine whose construction failed
        if links is not None:
            links.leave()
        super().destroy()

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """DeepSpeed's, after a drain: another number of micro-batches per call is another plan."""
        self.drain()
        super().set_train_batch_size(train_batch_size)
        self._filled_at = self._calls * self.micro_batches

    # -- between the stages -----------------------------------------------------------------------------------------

    @together
    def _evaluate(self, data_iter: Any, asked: dict[str, Any], labelled: bool, has_mean: bool) -> Any:
        self._refuse_torn()
        iterator = self.data_iterator
        with self._calling("eval_batch"), self._buffers_of_its_own(), self._evaluating(has_mean):
            try:
                if self._only_deepspeed:
                    self._begin_evaluation(data_iter, asked.get("num_micro_batches", self.micro_batches), labelled)
                return with_its_data(super().eval_batch, data_iter, **asked)
            finally:
                self.data_iterator = iterator  # if it ended early, DeepSpeed has not put it back

    def _peers_of_stage(self) -> list[Any]:
        """Groups that together join all ranks of this stage, for tensors on the CPU. Collective."""
        if self.device.type != "cpu":
            axes = map(self.grid.topology().get_axis_comm_lists, ("data", "model"))
            return [group for lists in axes if (group := own_group(lists, self.global_rank)) is not None]
        return [
            *([self.mpu.get_data_parallel_group()] if self.is_data_parallel else []),
            *([self.mpu.get_slice_parallel_group()] if self.is_model_parallel else []),
        ]


class DDGEngine(DDGMixin, PipelineEngine):
    """DeepSpeed's pipeline engine with the delayed schedule; ``ds_ddg.initialize`` creates it."""
