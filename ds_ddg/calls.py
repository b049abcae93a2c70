"""The life of a call, whoever's ``train_batch`` or ``eval_batch`` it is: DeepSpeed's, or a project's own.

Both make a schedule and have it executed, so that is where a call begins: its data is fetched, the other stages hear
of it, and DeepSpeed's ``TrainSchedule`` gives way to the delayed one. It ends when that has been executed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule as instructions

from ds_ddg.message import Kind
from ds_ddg.report import Reporter
from ds_ddg.schedule import DDGSchedule
from ds_ddg.together import OutOfDataError, Together

__all__ = ["Calls"]


@dataclass
class _Call:
    """How far the present call of the script has come."""

    what: str
    """The method."""
    begun: bool = False
    executed: bool = False


class Calls(Together, Reporter):
    """Mixed into a ``PipelineEngine``: how calls begin and end."""

    _parked: bool
    _call: _Call | None = None

    # The host's state that calls are about.
    _compute_loss: bool
    batch_fn: Any
    data_iterator: Any
    dynamic_shape: bool

    @contextmanager
    def _calling(self, what: str) -> Iterator[_Call]:
        """Inside, a schedule may be executed: one."""
        before, self._call = self._call, _Call(what)
        try:
            yield self._call
        finally:
            self._call = before

    def _exec_schedule(self, pipe_schedule: Any) -> None:
        if isinstance(pipe_schedule, DDGSchedule):  # a drain, which belongs to no call
            super()._exec_schedule(pipe_schedule)
            return
        call = self._call
        what = "train_batch" if torch.is_grad_enabled() else "eval_batch"
        if call is None or call.what != what or call.executed:
            raise RuntimeError(
                f"{type(self).__name__} executes a {type(pipe_schedule).__name__}, with gradients "
                f"{'on' if torch.is_grad_enabled() else 'off'}, "
                + ("outside a call" if call is None else f"in {call.what}" + " once more" * call.executed)
                + "; a training schedule is executed once in each train_batch, an inference schedule in each "
                "eval_batch (an engine that derives from DDG's own has to call their super())"
            )
        if what == "train_batch":
            self._train(pipe_schedule)
        else:
            if not call.begun:  # an eval_batch of a project that does not call DeepSpeed's
                self._begin_evaluation(self.data_iterator, pipe_schedule.micro_batches, self._compute_loss)
            super()._exec_schedule(pipe_schedule)
            self._feed.settle()
        call.executed = True

    def _train(self, asked: Any) -> None:
        """Execute what was `asked` for, or the delayed schedule in its place."""
        delayed = self._schedule == "ddg"
        if delayed:
            self._refuse_schedule(asked)
        self._begin("train_batch", self.data_iterator, self.micro_batches)
        self.total_loss = self.total_additional_losses = None
        if delayed:
            self._begin_report()
            ops = self.plan.call(self.stage_id, self._calls, self._filled_at)
            asked = DDGSchedule(self.plan, self.stage_id, ops)
        super()._exec_schedule(asked)
        self._feed.settle()
        number, self._calls = self._calls, self._calls + 1
        if delayed:
            with torch.no_grad():
                self._end_call(number)

    def _refuse_schedule(self, asked: Any) -> None:
        if type(asked) is not instructions.TrainSchedule:
            raise RuntimeError(
                f"{type(self).__name__} executes a {type(asked).__name__}; the delayed schedule takes the place of "
                'DeepSpeed\'s TrainSchedule alone ("ddg": {"enabled": false} runs others)'
            )
        if asked.micro_batches != self.micro_batches:
            raise RuntimeError(
                f"{type(self).__name__} trains on {asked.micro_batches} micro-batches, and "
                f"gradient_accumulation_steps is {self.micro_batches}; call set_train_batch_size on every rank before"
            )

    def _next_batch(self) -> Any:
        try:
            return self._feed.take()
        except IndexError:
            raise RuntimeError(
                f"{type(self).__name__} loads more micro-batches than it has; load one in each LoadMicroBatch"
            ) from None

    def _aggregate_total_loss(self) -> torch.Tensor:
        training = self._call is not None and self._call.what == "train_batch"
        if training and self._schedule == "ddg":
            assert self.agg_train_loss is not None, "the call has ended"
            return self.agg_train_loss
        loss: torch.Tensor = super()._aggregate_total_loss()
        if training:
            self._note_loss(self._calls - 1, loss)
        return loss

    def _begin_evaluation(self, data_iter: Any, micro_batches: int, labelled: bool) -> None:
        """Before DeepSpeed's own barrier, where no stage could hear that another failed."""
        assert self._call is not None
        self._begin("eval_batch", data_iter, micro_batches, labelled)
        self._links.meet()
        self._call.begun = True

    def _begin(self, what: str, data_iter: Iterator[Any] | None, micro_batches: int, labelled: bool = True) -> None:
        """Fetch the data of a call, then start it on every stage, or stop on every stage."""
        self._parked = False
        self._feed.labels = labelled and self.module.loss_fn is not None
        self._feed.fixed_shape = self.num_stages > 1 and what == "train_batch" and not self.dynamic_shape
        self._feed.as_deepspeed = self._schedule == "1f1b" and not self.ddg.enabled
        ready = self._feed.fetch(data_iter, micro_batches, self.batch_fn)
        here = (what, self._calls, micro_batches)
        # Evaluation has a barrier before its first activation, and DeepSpeed's schedule sends its own.
        with_data = what == "train_batch" and self._schedule == "ddg"
        kind = self._links.begin(here, ready, with_data)
        if kind is Kind.END:
            self._feed.clear()
            raise OutOfDataError
        if not ready:
            raise RuntimeError(
                f"the data of the last stage ended in call {self._calls}, that of the first stage did not; "
                "give both the same number of micro-batches"
            )
