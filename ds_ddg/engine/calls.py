"""The life of a call, whoever's ``train_batch`` or ``eval_batch`` it is: DeepSpeed's, or a project's own.

    train         data for the whole call first, then the plan's operations, then the newest loss known without a wait
    evaluate      between two calls, with buffers of its own; what is in flight stays there
    switch        to the other schedule, draining first

DeepSpeed's methods and a project's make a schedule and have it executed, so that is where a call begins: its data is
fetched, the other stages hear of it, and DeepSpeed's ``TrainSchedule`` gives way to the delayed one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_ddg.checkpoint.save_load import CheckpointPart
from ds_ddg.comm.failures import OutOfDataError, guard_stop_iteration
from ds_ddg.comm.message import Kind
from ds_ddg.comm.stage_links import Links
from ds_ddg.engine.auto_slack import SlackTuner
from ds_ddg.engine.data_feed import Feed
from ds_ddg.engine.drain import Drain
from ds_ddg.engine.micro_batch import MicroBatchRunner
from ds_ddg.engine.schedule_checks import Call, refuse_other_schedule, refuse_outside_call
from ds_ddg.host import Host
from ds_ddg.instructions import DDGSchedule
from ds_ddg.stage import RunState, Stage
from ds_ddg.telemetry.console import Console
from ds_ddg.telemetry.reporter import Reporter
from ds_ddg.weights.stage_optimizer import StageOptimizer
from ds_ddg.weights.tied import TiedWeights

__all__ = ["Calls"]

_Method = Callable[..., Any]
"""DeepSpeed's own method, or a project's, beneath the delayed engine's."""


@dataclass
class Calls:
    """Begins and ends the calls of a script on one stage."""

    stage: Stage
    run: RunState
    host: Host
    links: Links
    feed: Feed
    tied_weights: TiedWeights
    updates: StageOptimizer
    runner: MicroBatchRunner
    reporter: Reporter
    console: Console
    drain: Drain
    slack: SlackTuner
    checkpoint: CheckpointPart
    engine_name: str
    """The name that errors give to the engine."""
    delayed_from: int | None
    """The step from which on the schedule is DDG; None: the script decides."""
    _call: Call | None = None

    # -- what a script calls ----------------------------------------------------------------------------------------

    def train(self, train_batch: _Method, *args: Any, **kwargs: Any) -> Tensor:
        """Run a training call through `train_batch`; see ``DDGEngine.train_batch``."""
        self.checkpoint.refuse_torn()
        self.updates.versions.refuse_changes(self.host.module, self.stage.stage_id)
        if self.delayed_from is not None and self.host.global_steps >= self.delayed_from:
            self.switch("ddg")
        if self.slack.settle():
            self._adopt_plan()
        with self._calling("train_batch") as call:
            try:
                loss: Tensor = guard_stop_iteration(train_batch, *args, **kwargs)
            except OutOfDataError:
                self.console.forget_time()
                raise
            finally:
                self.console.unmute_host()
        self.updates.versions.leave()
        if call.executed:  # a project's own may have nothing to do
            self._close_call()
        return loss

    def evaluate(
        self, eval_batch: _Method, data_iter: Any, asked: dict[str, Any], labelled: bool, has_mean: bool
    ) -> Any:
        """Run an evaluation through `eval_batch`.

        Args:
            eval_batch: DeepSpeed's, or a project's.
            data_iter: yields micro-batches.
            asked: arguments that are not the defaults.
            labelled: whether labels are needed.
            has_mean: whether the result is a mean loss.
        """
        self.checkpoint.refuse_torn()
        host = self.host
        iterator = host.data_iterator
        with self._calling("eval_batch"), self.runner.own_buffers(), self.reporter.evaluating(has_mean):
            try:
                if self.console.only_deepspeed:
                    self.begin_evaluation(data_iter, asked.get("num_micro_batches", host.micro_batches), labelled)
                return guard_stop_iteration(eval_batch, data_iter, **asked)
            finally:
                host.data_iterator = iterator  # if it ended early, DeepSpeed has not put it back

    def switch(self, name: str) -> None:
        """Drain, and run schedule `name` from the next call on."""
        self.delayed_from = None  # whoever assigns it decides from here on
        if name == self.run.schedule:
            return
        self.drain()
        self.updates.restart()
        self.run.switch(name)
        self.host.choose_instructions()
        self.runner.empty_buffers()

    def resize(self, set_train_batch_size: _Method, train_batch_size: int) -> None:
        """Drain, then have DeepSpeed take another number of micro-batches per call, which is another plan."""
        self.drain()
        set_train_batch_size(train_batch_size)
        self.run.resize(self.host.micro_batches)

    # -- what DeepSpeed, or a project, calls within -----------------------------------------------------------------

    def execute(self, execute: _Method, pipe_schedule: Any) -> None:
        """Have DeepSpeed `execute` a schedule, or the delayed one in place of a training schedule."""
        if isinstance(pipe_schedule, DDGSchedule):  # a drain, which belongs to no call
            execute(pipe_schedule)
            return
        call = refuse_outside_call(self.engine_name, pipe_schedule, self._call)
        if call.what == "train_batch":
            self._train(execute, pipe_schedule)
        else:
            if not call.begun:  # an eval_batch of a project that does not call DeepSpeed's
                self.begin_evaluation(self.host.data_iterator, pipe_schedule.micro_batches, self.host._compute_loss)
            execute(pipe_schedule)
            self.feed.settle()
        call.executed = True

    def begin_evaluation(self, data_iter: Any, micro_batches: int, labelled: bool) -> None:
        """Begin an evaluation before DeepSpeed's own barrier, in which no stage could hear that another failed."""
        assert self._call is not None
        self._begin("eval_batch", data_iter, micro_batches, labelled)
        self.links.meet()
        self._call.begun = True

    def next_batch(self) -> Any:
        """Return the next micro-batch of the call, ``(inputs, labels)``."""
        try:
            return self.feed.take()
        except IndexError:
            raise RuntimeError(
                f"{self.engine_name} loads more micro-batches than it has; load one in each LoadMicroBatch"
            ) from None

    def total_loss(self, aggregate: _Method) -> Tensor:
        """Return the loss for DeepSpeed's ``train_batch`` or ``eval_batch``; `aggregate` is DeepSpeed's method."""
        training = self._call is not None and self._call.what == "train_batch"
        if training and self.run.delayed:
            loss: Tensor = self.host.agg_train_loss
            assert loss is not None, "the call has ended"
            return loss
        loss = aggregate()
        if training:
            self.reporter.note_loss(self.run.call - 1, loss)
        return loss

    # -- inside -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _calling(self, what: str) -> Iterator[Call]:
        """Inside this block one schedule may be executed."""
        before, self._call = self._call, Call(what)
        try:
            yield self._call
        finally:
            self._call = before

    def _train(self, execute: _Method, asked: Any) -> None:
        """Execute the schedule that was `asked` for, or the delayed one in its place."""
        run, host = self.run, self.host
        if run.delayed:
            refuse_other_schedule(self.engine_name, asked, host.micro_batches)
        self._begin("train_batch", host.data_iterator, host.micro_batches)
        host.total_loss = host.total_additional_losses = None
        if run.delayed:
            self.reporter.begin_call()
            ops = run.plan.call(self.stage.stage_id, run.call, run.filled_at)
            asked = DDGSchedule(run.plan, self.stage.stage_id, ops)
        execute(asked)
        self.feed.settle()
        number = run.end_call()
        if run.delayed:
            with torch.no_grad():
                self.reporter.end_call(number)

    def _close_call(self) -> None:
        losses, run = self.reporter.losses, self.run
        if run.delayed:
            self.reporter.report_call()
            return
        if losses.newest.call < run.call - 1:  # a project's own train_batch does without DeepSpeed's loss
            losses.restart(run.call, None)
        if self.stage.config.enabled:
            self.updates.share_tied_weights()

    def _adopt_plan(self) -> None:
        """Go over to the plan of another slack, with the pipeline empty."""
        self.links.expect(self.run.plan)
        self.tied_weights.expect(self.run.plan)
        self.reporter.new_meter()
        self.runner.observe = None

    def _begin(self, what: str, data_iter: Iterator[Any] | None, micro_batches: int, labelled: bool = True) -> None:
        """Fetch the data of a call, then start it on every stage, or stop on every stage."""
        run, feed, host, training = self.run, self.feed, self.host, what == "train_batch"
        run.begin()
        feed.labels = labelled and host.module.loss_fn is not None
        feed.fixed_shape = self.stage.num_stages > 1 and training and not host.dynamic_shape
        feed.as_deepspeed = not run.delayed and not self.stage.config.enabled
        ready = feed.fetch(data_iter, micro_batches, host.batch_fn)
        # Evaluation has a barrier before its first activation, and DeepSpeed's schedule sends its own.
        kind = self.links.begin((what, run.call, micro_batches), ready, with_data=training and run.delayed)
        if kind is Kind.END:
            feed.clear()
            raise OutOfDataError
        if not ready:
            raise RuntimeError(
                f"the data of the last stage ended in call {run.call}, that of the first stage did not; "
                "give both the same number of micro-batches"
            )
