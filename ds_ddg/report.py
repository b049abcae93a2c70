"""What is said about a call, by name: its number, its loss, what its stages measured.

DeepSpeed takes the loss that a call returns for the loss of that call, and records it as such. Under the delayed
schedule it is that of an earlier call, so here each loss is recorded once, with the samples of its own call. All else
DeepSpeed goes on recording itself; what is printed is in ``printing.py``.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from deepspeed.utils import logger
from torch import Tensor

from ds_ddg.losses import Loss, Losses
from ds_ddg.ordered import InOrder
from ds_ddg.printing import Printer
from ds_ddg.schedule import TellLoss
from ds_ddg.watch import MEASURED, Gauge

__all__ = ["Reporter"]


class Reporter(Printer):
    """Mixed into a ``PipelineEngine``: losses, measurements, and what is recorded of them."""

    _calls: int
    _schedule: str

    # The host's state that reports are about.
    agg_additional_losses: dict[str, Tensor] | None
    agg_train_loss: Tensor | None
    engine_timers: Any
    is_pipe_parallel: bool
    total_additional_losses: Any

    def _start_reports(self) -> None:
        self._losses = Losses(self._links)
        self._samples: dict[int, int] = {}
        self._new_gauge()
        self._put_in_order()
        if not self.is_last_stage():
            # There DeepSpeed 0.19.8 starts these timers twice, in the pipeline's backward and in hooks, and fails.
            self.engine_timers.backward_timers = []
            self.engine_timers.backward_inner_timers = []

    def _new_gauge(self) -> None:
        self._gauge = Gauge(self.stage_id, self._links, self.num_stages * (1 + self.plan.slack) + 1)

    @property
    def loss_step(self) -> int:
        """The call (0-based, as ``global_steps`` counts them) that the loss last returned belongs to."""
        return self._losses.newest.call + self.global_steps - self._calls

    def ddg_stats(self) -> dict[str, Any]:
        """What this stage measures: the values that a monitor gets as ``Train/DDG/stage{k}/...``, as of now.

        Returns:
            `stage`; `staleness`, the updates made since the oldest micro-batch in flight went forward, which is how
            old the next gradient will be; `busy`, the share of the last call's time not spent waiting for other
            stages (on a GPU that of the host, or with "slack": "auto" or "trace" that of the device, of the last call
            it is known to have done); `micro_batches_in_flight`; `weight_versions`, how many are in memory.
        """
        return dict(zip(("stage", *MEASURED), self._gauge.now(self.versions, self.micro_batches), strict=True))

    def _ddg_instruction_map(self) -> dict[type, Callable[..., None]]:
        return {**super()._ddg_instruction_map(), TellLoss: Reporter._exec_tell_loss}

    # -- losses -----------------------------------------------------------------------------------------------------

    def _note_loss(self, call: int, loss: Tensor) -> None:
        """DeepSpeed's own schedule has told every stage, and reports it."""
        self._losses.note(Loss(call, float(loss), self._additional()))

    def _end_call(self, call: int) -> Tensor:
        """Learn the newest loss known without a wait, and keep DeepSpeed from taking it for that of `call`."""
        self._samples[call] = self.global_samples
        loss = self._learn_loss(self._known_in(call))
        # What the stages measured in a call comes with the loss of the next.
        self._complete_steps(self._samples.get(self._losses.newest.call, 0) - 1)
        if self._only_deepspeed:
            self._silence()
        return loss

    def _known_in(self, call: int) -> int:
        """The call whose loss `call` returns; negative: that of the first one it can."""
        return call - (0 if self.ddg.loss == "exact" else self.plan.staleness(0))

    def _exec_tell_loss(self) -> None:
        # Read back from the device once a call, here and for additional losses; other stages never do.
        with torch.no_grad():
            mean = float(self._mean_loss())
        call = self._calls
        if not math.isfinite(mean) and math.isfinite(self._losses.newest.mean):
            logger.error(f"stage {self.stage_id}: the loss of call {call} is {mean}; training goes on")
        loss = Loss(call, mean, self._additional(), self._links.rows, self._links.update)
        self._losses.tell(loss, self._known_in(call))

    def _learn_loss(self, call: int) -> Tensor:
        """Take and record the losses up to that of `call`; the newest, which waits only if it has not arrived."""
        for loss in self._losses.learn(call):
            self._record(loss)
            self._learn_update(loss.update)
        return self._publish_loss()

    def _publish_loss(self) -> Tensor:
        """Put the newest loss where DeepSpeed has it."""
        newest = self._losses.newest
        # Filled there: a tensor made on the host would wait for all work of the device on its way.
        named = [(name, torch.full((), value, device=self.device)) for name, value in newest.additional or ()]
        self.agg_additional_losses = None if newest.additional is None else OrderedDict(named)
        self.agg_train_loss = loss = torch.full((), newest.mean, device=self.device)
        return loss

    def _mean_loss(self) -> Tensor:
        """DeepSpeed's mean over micro-batches and replicas, on the last stage, without its broadcast to the others."""
        pipe_parallel, self.is_pipe_parallel = self.is_pipe_parallel, False
        try:
            return super()._aggregate_total_loss()
        finally:
            self.is_pipe_parallel = pipe_parallel

    def _additional(self) -> tuple[tuple[str, float], ...] | None:
        losses = self.agg_additional_losses
        return None if losses is None else tuple((name, float(loss)) for name, loss in losses.items())

    def _bcast_pipe_scalar(self, data: Any, src_rank: int | None = None, dtype: torch.dtype = torch.float32) -> Any:
        """DeepSpeed's waits in a broadcast, where a stage could not hear that another failed."""
        if src_rank not in (None, self._loss_stage_global_rank()):
            return super()._bcast_pipe_scalar(data, src_rank, dtype)
        value = self._links.share(float(data) if self.is_last_stage() else 0.0)
        return torch.tensor(value, dtype=dtype, device=self.device)

    def _restart_losses(self, known: dict[str, Any] | None) -> None:
        """After a checkpoint, and with the loss that it knows, if any; calls count on from where it was saved."""
        self._calls = self.global_steps
        self._filled_at = self._calls * self.micro_batches
        self._samples.clear()
        self._losses.restart(self._calls, known)
        if known is not None:
            self._publish_loss()

    @contextmanager
    def _evaluating(self, has_mean: bool) -> Iterator[None]:
        """Around DeepSpeed's part of an evaluation; `has_mean`: its result is a mean loss, which is recorded.

        DeepSpeed adds what it computes, of any shape, to the totals of the last training call.
        """
        totals = self.total_loss, self.total_additional_losses
        self.total_loss = self.total_additional_losses = None
        try:
            with nullcontext() if has_mean else self._in_silence():
                yield
        finally:
            self.total_loss, self.total_additional_losses = totals

    # -- reports ----------------------------------------------------------------------------------------------------

    def _begin_report(self) -> None:
        """A delayed call has begun."""
        self._gauge.begin_call(self.versions.version)
        self._links.update = self._links.update.plus(self._last_update)

    def _report_call(self) -> None:
        """It is over: print and measure once every ``steps_per_print``; a monitor without it gets every call."""
        self._last_update = self._own_update()
        self._gauge.end_call()
        period = self.steps_per_print()
        if self.global_steps % (period or 1):
            return
        if period is not None:
            self._print(self._losses.newest, self.loss_step)
        if self.monitor.enabled:
            self._gauge.end_period(self.versions, self.micro_batches)

    def _record(self, loss: Loss) -> None:
        """Send a loss and what came with it to the monitor, each with the samples of its own call."""
        if self.global_rank == 0 and self.monitor.enabled:
            events = [("Train/Samples/train_loss", loss.mean, self._samples[loss.call])]
            for stage, *values in loss.rows:
                samples = self._samples[loss.call - 1]
                events += [(f"Train/DDG/stage{stage}/{n}", v, samples) for n, v in zip(MEASURED, values, strict=True)]
            self.monitor.write_events(events)
        self._samples.pop(loss.call - 1, None)

    def _put_in_order(self) -> None:
        """What goes to W&B, if anything does."""
        if getattr(self.monitor, "wandb_monitor", None) is not None:
            self.monitor.wandb_monitor = InOrder(self.monitor.wandb_monitor)

    def _complete_steps(self, samples: float = math.inf) -> None:
        """No value of a step up to `samples` is still to come; by default: nothing is in flight."""
        ordered = getattr(self.monitor, "wandb_monitor", None)
        if isinstance(ordered, InOrder):
            ordered.complete(samples)
