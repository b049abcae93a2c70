"""``DDGEngine``: a ``PipelineEngine`` whose ``train_batch`` leaves its last micro-batches in flight.

Every override of DeepSpeed's methods stands here, and does nothing but hand over to a collaborator; where DeepSpeed's
own method (or a project's) still has a part, it is handed over too, as ``super()``'s. What else we use of DeepSpeed's
engine is in ``host.py``.

A call never waits for the stages behind it: it ends when this stage has done its M ticks. Calls count from 0 on every
rank alike, and so do the learning rate and ``global_steps``, whatever is in flight.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from typing_extensions import override

from ds_ddg.checkpoint.save_load import CheckpointPart
from ds_ddg.comm.failures import FailureGuard, register_shutdown
from ds_ddg.comm.host_staging import staging_for
from ds_ddg.comm.stage_links import Links
from ds_ddg.config import DDGConfig
from ds_ddg.engine.assembly import assemble, groups_of_stage
from ds_ddg.engine.calls import Calls
from ds_ddg.engine.compatibility import refuse_experts, refuse_unsupported
from ds_ddg.engine.data_feed import Feed
from ds_ddg.engine.micro_batch import MicroBatchRunner
from ds_ddg.engine.output_checks import with_checks
from ds_ddg.engine.overrides import METHODS, is_deepspeeds, refuse_overrides, warn_of_patches
from ds_ddg.engine.schedule_switch import refuse_switch
from ds_ddg.host import EngineHost, Host, without_greetings
from ds_ddg.instructions import AdvanceClocks, TellLoss, UpdateWeights
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.stage import RunState, Stage
from ds_ddg.telemetry.clock import clock_for
from ds_ddg.telemetry.console import Console
from ds_ddg.telemetry.observer import Observer
from ds_ddg.telemetry.reporter import Reporter
from ds_ddg.telemetry.trace_writer import TraceWriter
from ds_ddg.weights.experts import create_expert_groups, expert_sizes
from ds_ddg.weights.muon import choose_for
from ds_ddg.weights.stage_groups import StagePeers
from ds_ddg.weights.stage_optimizer import StageOptimizer
from ds_ddg.weights.tied import TiedWeights
from ds_ddg.weights.versions import WeightVersions

__all__ = ["Beneath", "DDGEngine"]


class DDGEngine(PipelineEngine):
    """DeepSpeed's pipeline engine with the delayed schedule; ``ds_ddg.initialize`` creates it.

    Attributes:
        ddg: the settings, a ``DDGConfig``.
        schedule: "ddg" or "1f1b" (DeepSpeed's own); assign between calls, on every rank, to switch.
        loss_step: the call (0-based) that the loss last returned belongs to.
        plan: delays, staleness and more of every stage, a ``DDGPlan``.
        versions: ``alive`` is how many versions of the weights this stage has in memory.
    """

    ddg: DDGConfig
    _INSTRUCTION_MAP: Any
    _calls: Calls
    _checkpoint: CheckpointPart
    _console: Console
    _failures: FailureGuard
    _host: Host
    _links: Links
    _reporter: Reporter
    _run: RunState
    _runner: MicroBatchRunner
    _stage: Stage
    _tied_weights: TiedWeights
    _tracer: TraceWriter
    _updates: StageOptimizer

    # -- construction -----------------------------------------------------------------------------------------------

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_overrides(cls, DDGEngine)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config, module = kwargs["config_class"], kwargs["model"]
        self.ddg = DDGConfig.parse(config._param_dict.get("ddg"))
        if self.ddg.enabled:
            refuse_overrides(type(self), DDGEngine)  # maps may have changed since
            warn_of_patches()
        refuse_unsupported(config, module, self.ddg.enabled)
        sizes = expert_sizes(module)
        if self.ddg.enabled:
            refuse_experts(config, module, sizes)
        create_expert_groups(sizes, config, module)
        choose_for(config, module, kwargs.get("optimizer"))
        self._host = cast(Host, EngineHost(self))
        self._stage = Stage(module.stage_id, module.num_stages, dist.get_rank(), self.ddg)
        self._run = RunState(module.num_stages, 1, 0 if self.ddg.slack == "auto" else self.ddg.slack)
        self._tied_weights = TiedWeights(module, self.ddg.enabled)
        self._updates = StageOptimizer(self._stage, self._run, self._host, self._tied_weights)
        self._console = Console(self._stage, self._host)
        with without_greetings() if self.ddg.enabled else nullcontext():
            super().__init__(*args, **kwargs)
        self._run.resize(self.micro_batches)
        self._updates.new_versions()
        pipelines = self.grid.topology().get_axis_comm_lists("pipe")
        observer = Observer(clock_for(self.device) if self.ddg.timed else None)
        peers, staging = StagePeers(groups_of_stage(self._host)), staging_for(self.device)
        self._updates.connect(peers)
        self._links = Links(pipelines, self.global_rank, self._run.plan, staging, observer=observer)
        register_shutdown(self._links)
        self._failures = FailureGuard(self._stage, self._run, self._links, weakref.ref(self))
        feed = Feed(self._stage.is_first, self._stage.is_last, peers, staging, observer)
        self._failures.run(self._finish_init, feed, observer)  # from here on the other stages hear if it fails

    def _finish_init(self, feed: Feed, observer: Observer) -> None:
        self._calls, self._checkpoint, self._reporter, self._runner, self._tracer = assemble(
            self._stage,
            self._run,
            self._host,
            self._links,
            feed,
            observer,
            self._tied_weights,
            self._updates,
            self._console,
            self._failures,
            type(self).__name__,
        )
        self._choose_instructions()
        if self._calls.delayed_from == 0:
            self.schedule = "ddg"

    def _choose_instructions(self) -> None:
        """Carry out instructions as the present schedule wants it, a project's own additions included."""
        known: Any = type(self)._INSTRUCTION_MAP
        if not self._run.delayed:
            tied = {
                m: getattr(type(self), METHODS[m]) for m in METHODS if "Tied" in m.__name__ and self._tied_weights.tied
            }
            self._INSTRUCTION_MAP = {**with_checks(known, self._runner.fixed_shape), **tied}
            return
        # Each tensor slice sends whole activations to its own successor; DeepSpeed's default is a part and a gather.
        self.is_pipe_partitioned = self.is_grad_partitioned = False
        self._INSTRUCTION_MAP = {
            **known,
            **{instruction: getattr(type(self), name) for instruction, name in METHODS.items()},
            AdvanceClocks: DDGEngine._exec_advance_clocks,
            TellLoss: DDGEngine._exec_tell_loss,
            UpdateWeights: DDGEngine._exec_update_weights,
        }

    def _carry_out(self, instruction: type, *args: Any) -> None:
        """Carry out an instruction as the engine beneath would."""
        run = super()._INSTRUCTION_MAP[instruction]
        if is_deepspeeds(run):  # then a project's method counts, in the map or not
            getattr(super(), METHODS[instruction])(*args)
        else:
            run(self, *args)

    # -- what scripts use -------------------------------------------------------------------------------------------

    @override
    def train_batch(self, data_iter: Iterator[Any] | None = None, **more: Any) -> torch.Tensor:
        """Run one call: M ticks and at most one update. DeepSpeed's signature and, but for its age, its result.

        Args:
            data_iter: yields micro-batches ``(inputs, labels)``; exactly M are pulled on the first and last stage.
            **more: for a project's own ``train_batch``, if it takes more; its result is what this returns.

        Returns:
            0-dim tensor, the same on every rank: the mean loss of call number ``loss_step``.

        Raises:
            StopIteration: on every rank, if the data ends inside this call; nothing of the call has been trained on.
            StageError: another stage failed, left or was lost.
        """
        given = () if data_iter is None else (data_iter,)
        return self._failures.run(self._calls.train, super().train_batch, *given, **more)

    @override
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

        Args:
            data_iter: yields micro-batches; all are fetched on the first and last stage before the first goes forward.
            return_logits: also return what the last layer put out.
            compute_loss: apply ``loss_fn``, which needs labels.
            reduce_output: "avg" for the mean over the micro-batches, None for a list of what each came to.
            bcast_loss: every rank returns the mean; else the last stage alone.
            num_micro_batches: how many to evaluate; default: M.

        Raises:
            StopIteration: on every rank, if the data ends before `num_micro_batches`.
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
        has_mean = compute_loss and reduce_output is not None
        return self._failures.run(self._calls.evaluate, super().eval_batch, data_iter, asked, compute_loss, has_mean)

    def drain(self) -> None:
        """Finish every backward pass in flight. Nothing is left in flight or retained; twice does nothing.

        Steps the optimizer whenever M gradients have accumulated and once for the rest, at the present learning rate.

        To be called before a script writes into weights, replaces or freezes them: with micro-batches in flight the
        next call refuses that, but for writes through ``.data``, which ``WeightVersions.refuse_changes`` says more of.
        """
        self._calls.drain()

    @property
    def schedule(self) -> str:
        """``"ddg"`` or ``"1f1b"`` (DeepSpeed's own); assign between calls, on every rank, to switch."""
        return self._run.schedule

    @schedule.setter
    def schedule(self, name: str) -> None:
        if name not in ("ddg", "1f1b"):
            raise ValueError(f'schedule must be "ddg" or "1f1b", got {name!r}')
        if name != self._run.schedule:
            if name == "ddg" and not self.ddg.enabled:
                refuse_unsupported(self._config, self.module)
            refuse_switch(name, self.ddg.enabled, self._config, self.module)
        self._calls.switch(name)

    @property
    def loss_step(self) -> int:
        """The call (0-based, as ``global_steps`` counts them) that the loss last returned belongs to."""
        return self._reporter.loss_step

    @property
    def plan(self) -> DDGPlan:
        """The plan of the delayed schedule at the present number of micro-batches."""
        return self._run.plan

    @property
    def versions(self) -> WeightVersions:
        """The versions of the weights that micro-batches in flight saw."""
        return self._updates.versions

    def ddg_stats(self) -> dict[str, Any]:
        """Return what this stage measures: the values that a monitor gets as ``Train/DDG/stage{k}/...``, as of now.

        Returns:
            `stage`; `staleness`, the updates made since the oldest micro-batch in flight went forward, which is how
            old the next gradient will be; `busy`, the share of the last call's time not spent waiting for other
            stages (on a GPU that of the host, or with "slack": "auto" or "trace" that of the device, of the last call
            it is known to have done); `micro_batches_in_flight`; `weight_versions`, how many are in memory; and,
            sampled every tenth call, None before and on the last stage, `weight_drift`, `gradient_cosine` and
            `gradient_cosine_next`: what delay does to the stage, see docs/monitoring.md.
        """
        return self._reporter.stats()

    @override
    def get_global_grad_norm(self) -> Any:
        """Return the norm of all stages' gradients in call ``loss_step - 1``, equal on every rank; None if unknown.

        In fp16, if a stage overflowed in that call, in the newest one before it without an overflow.
        """
        if self.num_stages == 1 or not self._run.delayed:
            return super().get_global_grad_norm()
        return self._updates.pipeline_norm

    @override
    def save_checkpoint(
        self,
        save_dir: str,
        tag: Any = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Drain, then save as DeepSpeed does: what is in flight belongs to no checkpoint.

        Raises:
            Exception: what went wrong on this rank; training can go on, on all of them.
            StageError: the same, or worse, on another rank.
        """
        given = save_dir, tag, client_state, save_latest, *args
        return self._failures.run(self._checkpoint.save, super().save_checkpoint, *given, **kwargs)

    @override
    def load_checkpoint(
        self,
        load_dir: str,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Drain, then load as DeepSpeed does: gradients in flight belong to the weights that are given up.

        Raises:
            OSError, ValueError: files of this rank are missing or damaged; nothing has been changed anywhere.
            StageError: so are another's; or a load has failed halfway, and all that can be done is another.
        """
        which = load_module_strict, load_optimizer_states, load_lr_scheduler_states, load_module_only
        given = load_dir, tag, *which, *args
        return self._failures.run(self._checkpoint.load, super().load_checkpoint, *given, **kwargs)

    @override
    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Drain, then do as DeepSpeed does: another number of micro-batches per call is another plan."""
        self._calls.resize(super().set_train_batch_size, train_batch_size)

    @override
    def reset_activation_shape(self) -> None:
        """Allow activations another shape from here on. Each message says its own, so those in flight do not mind."""
        super().reset_activation_shape()
        self._runner.reset_shape()

    @override
    def steps_per_print(self) -> int | None:
        """Return DeepSpeed's number of calls between two lines; a huge one while DeepSpeed must not print."""
        return self._console.period(super().steps_per_print())

    @override
    def destroy(self) -> None:
        """Destroy the engine as DeepSpeed does, tell the other stages, and write what was recorded to the disk."""
        links = self.__dict__.get("_links")  # DeepSpeed also calls this for an engine whose construction failed
        if links is not None:
            links.leave()
        try:
            if "_tracer" in self.__dict__:
                self._tracer.close()
        finally:
            super().destroy()  # a device that failed has no times to tell

    # -- what DeepSpeed calls ---------------------------------------------------------------------------------------

    @override
    def _exec_schedule(self, pipe_schedule: Any) -> None:
        execute = super()._exec_schedule
        self._calls.execute(lambda schedule: self._tracer.execute(execute, schedule), pipe_schedule)

    @override
    def _next_batch(self) -> Any:
        return self._calls.next_batch()

    @override
    def _aggregate_total_loss(self) -> torch.Tensor:
        return self._calls.total_loss(super()._aggregate_total_loss)

    def _beneath_aggregate_total_loss(self) -> torch.Tensor:
        """Return the mean loss as the engine beneath computes it."""
        return super()._aggregate_total_loss()

    @override
    def _bcast_pipe_scalar(self, data: Any, src_rank: int | None = None, dtype: torch.dtype = torch.float32) -> Any:
        return self._reporter.broadcast(super()._bcast_pipe_scalar, data, src_rank, dtype)

    @override
    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        configure = super()._configure_optimizer
        if not self.ddg.enabled:
            configure(client_optimizer, model_parameters)
            self._updates.rules.attach(self.optimizer)  # none: the optimizer may have been another engine's
            return
        if "_calls" in self.__dict__:
            self.drain()  # what is in flight belongs to the optimizer before
        self._updates.configure(configure, client_optimizer, model_parameters)

    @override
    def _check_for_duplicates(self, optimizer: Any) -> None:
        if self.ddg.enabled:  # DeepSpeed shows every optimizer here before it wraps it
            self._updates.adopt(optimizer)
        super()._check_for_duplicates(optimizer)

    @override
    def _take_model_step(self, *args: Any, **kwargs: Any) -> None:
        self._updates.take_model_step(super()._take_model_step, *args, **kwargs)

    @override
    def clip_fp32_gradients(self) -> None:
        """Clip by the norm of this stage, or by the newest known norm of all; under 1F1B as DeepSpeed does."""
        if self._run.delayed:
            self._updates.clip()
        else:
            super().clip_fp32_gradients()

    @override
    def allreduce_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Average gradients as DeepSpeed does, where there is something to do."""
        self._updates.allreduce(super().allreduce_gradients, *args, **kwargs)

    @override
    def _reduce_non_expert_gradients(self, gradients: Any, elements_per_buffer: int) -> None:
        self._updates.reduce_non_experts(super()._reduce_non_expert_gradients, gradients, elements_per_buffer)

    # -- instructions -----------------------------------------------------------------------------------------------

    @override
    def _exec_load_micro_batch(self, buffer_id: int) -> None:
        self._runner.load(buffer_id)

    @override
    def _exec_recv_activations(self, buffer_id: int) -> None:
        self._runner.recv_activation(buffer_id)

    @override
    def _exec_forward_pass(self, buffer_id: int) -> None:
        self._runner.forward(buffer_id)

    @override
    def _exec_send_activations(self, buffer_id: int) -> None:
        self._runner.send_activation(buffer_id)

    @override
    def _exec_recv_grads(self, buffer_id: int) -> None:
        self._runner.recv_gradient(buffer_id)

    @override
    def _exec_backward_pass(self, buffer_id: int) -> None:
        self._runner.backward(buffer_id)

    @override
    def _exec_send_grads(self, buffer_id: int) -> None:
        self._runner.send_gradient(buffer_id)

    @override
    def _exec_reduce_grads(self) -> None:
        self._updates.reduce_gradients()

    @override
    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        self._updates.step(lr_kwargs)

    @override
    def _exec_reduce_tied_grads(self) -> None:
        self._updates.reduce_tied_gradients()

    def _exec_advance_clocks(self) -> None:
        self._updates.advance_clocks()

    def _exec_tell_loss(self) -> None:
        self._reporter.tell_loss()

    def _exec_update_weights(self) -> None:
        self._updates.update_weights()


class Beneath(PipelineEngine):
    """The class right above DeepSpeed's engine and below a project's own: DeepSpeed's part of a call begins here.

    What DeepSpeed says of a loss is muted, as it takes it for that of another call; what a project says is not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._console.only_deepspeed = False

    def train_batch(self, data_iter: Any = None) -> Any:
        """Run DeepSpeed's own ``train_batch``, muted."""
        self._console.only_deepspeed = True
        try:
            return super().train_batch(data_iter)
        finally:
            self._console.only_deepspeed = False
            self._console.unmute_host()

    def eval_batch(
        self,
        data_iter: Any,
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """Run DeepSpeed's own ``eval_batch`` on the data that a project gives it."""
        count = self.micro_batches if num_micro_batches is None else num_micro_batches
        self._calls.begin_evaluation(data_iter, count, compute_loss)
        return super().eval_batch(data_iter, return_logits, compute_loss, reduce_output, bcast_loss, num_micro_batches)
