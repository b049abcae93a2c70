"""Reports each call under its own number: its loss, and what its stages measured.

DeepSpeed takes the loss that a call returns for the loss of that call, and records it as such. Under the delayed
schedule it is that of an earlier call, so here each loss is recorded once, with the samples of its own call. All else
DeepSpeed goes on recording itself; what is printed is in ``console.py``.
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

from ds_ddg.comm.loss_exchange import Loss, Losses, Row, Update
from ds_ddg.comm.stage_links import Links
from ds_ddg.host import Host
from ds_ddg.stage import RunState, Stage
from ds_ddg.staleness.choose import remedies
from ds_ddg.telemetry.console import Console
from ds_ddg.telemetry.delay_effects import DelayEffects
from ds_ddg.telemetry.loss_watch import LossWatch
from ds_ddg.telemetry.observer import Observer
from ds_ddg.telemetry.stage_metrics import MEASURED, StageMeter
from ds_ddg.telemetry.wandb import InOrder
from ds_ddg.weights.stage_optimizer import StageOptimizer

__all__ = ["Reporter"]


class Reporter:
    """Learns losses and measurements, and has them recorded and printed.

    Args:
        stage: this stage.
        run: the place of the stage in its run.
        host: DeepSpeed's engine.
        links: the links to the other stages; losses and measurements travel with their messages.
        observer: knows how long this stage waits.
        effects: samples what delay does to it.
        updates: this stage's optimizer; the results of its updates travel with the losses.
        console: prints the lines.
    """

    def __init__(
        self,
        stage: Stage,
        run: RunState,
        host: Host,
        links: Links,
        observer: Observer,
        effects: DelayEffects,
        updates: StageOptimizer,
        console: Console,
    ) -> None:
        self._stage, self._run, self._host, self._links = stage, run, host, links
        self._observer, self._effects, self._updates, self._console = observer, effects, updates, console
        self.losses = Losses(links)
        self._watch = LossWatch()
        self._rows: tuple[Row, ...] = ()
        """The rows of the stages above, then that of this stage, as far as a period ended in the call before."""
        self._update = Update()
        """The result of the updates of the call before, on the stages above and this one."""
        self._samples: dict[int, int] = {}
        """The samples at the end of a call, by its number, until its loss has been recorded."""
        self.new_meter()
        monitor = host.monitor
        if getattr(monitor, "wandb_monitor", None) is not None:
            monitor.wandb_monitor = InOrder(monitor.wandb_monitor)
        if not stage.is_last:
            # There DeepSpeed 0.19.8 starts these timers twice, in the pipeline's backward and in hooks, and fails.
            host.engine_timers.backward_timers = []
            host.engine_timers.backward_inner_timers = []

    def new_meter(self) -> None:
        """Measure anew; the pipeline must be empty."""
        stage, calls = self._stage, self._stage.num_stages * (1 + self._run.slack) + 1
        self.meter = StageMeter(stage.stage_id, self._observer, self._effects, calls)

    @property
    def loss_step(self) -> int:
        """The call (0-based, as ``global_steps`` counts them) that the loss last returned belongs to."""
        return self.losses.newest.call + self._host.global_steps - self._run.call

    def stats(self) -> dict[str, Any]:
        """Return what this stage measures, as of now; see ``DDGEngine.ddg_stats``."""
        row = self.meter.now(self._updates.versions, self._run.micro_batches)
        return dict(zip(("stage", *MEASURED), row, strict=True))

    # -- losses -----------------------------------------------------------------------------------------------------

    def note_loss(self, call: int, loss: Tensor) -> None:
        """Take over the loss of `call`, which DeepSpeed's own schedule has told every stage, and reports itself."""
        self.losses.note(Loss(call, float(loss), self._additional()))

    def end_call(self, call: int) -> None:
        """Learn the newest loss known without a wait, and keep DeepSpeed from taking it for that of `call`."""
        self._samples[call] = self._host.global_samples
        self.learn_losses(self._known_in(call))
        # What the stages measured in a call comes with the loss of the next.
        self.complete_steps(self._samples.get(self.losses.newest.call, 0) - 1)
        if self._console.only_deepspeed:
            self._console.mute_host()

    def tell_loss(self) -> None:
        """Tell every stage the loss of the call; the last stage does so once all micro-batches have gone forward."""
        # Read back from the device once a call, here and for additional losses; other stages never do.
        with torch.no_grad():
            mean = float(self._host.mean_loss())
        call = self._run.call
        if not math.isfinite(mean) and math.isfinite(self.losses.newest.mean):
            logger.error(f"stage {self._stage.stage_id}: the loss of call {call} is {mean}; training goes on")
        loss = Loss(call, mean, self._additional(), self._rows, self._update)
        self.losses.tell(loss, self._known_in(call))

    def learn_losses(self, call: int) -> None:
        """Take and record the losses up to that of `call`; this waits only if it has not arrived."""
        for loss in self.losses.learn(call):
            self._record(loss)
            self._updates.learn(loss.update)
        self._publish_loss()

    def restart(self, known: dict[str, Any] | None) -> None:
        """Start again from a checkpoint, with the loss that it knows, if any; calls count on from the saved number."""
        self._samples.clear()
        self._watch.forget()
        self.losses.restart(self._run.call, known)
        if known is not None:
            self._publish_loss()

    def broadcast(self, broadcast: Callable[..., Any], data: Any, src_rank: int | None, dtype: torch.dtype) -> Any:
        """Send a number of the last stage to all, as DeepSpeed's `broadcast` does, but hear it if another stage fails.

        Args:
            broadcast: DeepSpeed's, for what comes from another stage.
            data: the number, on the last stage.
            src_rank: the global rank that has it; None: that of the last stage.
            dtype: the type of the tensor returned.
        """
        if src_rank not in (None, self._host._loss_stage_global_rank()):
            return broadcast(data, src_rank, dtype)
        value = self._links.share(float(data) if self._stage.is_last else 0.0)
        return torch.tensor(value, dtype=dtype, device=self._host.device)

    @contextmanager
    def evaluating(self, has_mean: bool) -> Iterator[None]:
        """Inside this block DeepSpeed evaluates; `has_mean`: its result is a mean loss, which is recorded.

        DeepSpeed adds what it computes, of any shape, to the totals of the last training call.
        """
        host = self._host
        totals = host.total_loss, host.total_additional_losses
        host.total_loss = host.total_additional_losses = None
        try:
            with nullcontext() if has_mean else self._console.host_muted():
                yield
        finally:
            host.total_loss, host.total_additional_losses = totals

    def _known_in(self, call: int) -> int:
        """Return the number of the call whose loss `call` returns; if negative, it returns the first one it can."""
        return call - (0 if self._stage.config.loss == "exact" else self._run.plan.staleness(0))

    def _publish_loss(self) -> None:
        """Put the newest loss where DeepSpeed has it."""
        newest, host = self.losses.newest, self._host
        # Filled there: a tensor made on the host would wait for all work of the device on its way.
        named = [(name, torch.full((), value, device=host.device)) for name, value in newest.additional or ()]
        host.agg_additional_losses = None if newest.additional is None else OrderedDict(named)
        host.agg_train_loss = torch.full((), newest.mean, device=host.device)

    def _additional(self) -> tuple[tuple[str, float], ...] | None:
        losses = self._host.agg_additional_losses
        return None if losses is None else tuple((name, float(loss)) for name, loss in losses.items())

    # -- reports ----------------------------------------------------------------------------------------------------

    def begin_call(self) -> None:
        """Add what this stage measured to what came with the first message of a delayed call, which has begun.

        It travels on with the first activation, and from the last stage to all with the loss. These messages exist
        anyway, and nobody waits for a measurement.
        """
        came = self._links.riders
        self._rows = (*came.get("rows", ()), *self.meter.begin_call(self._updates.versions.version))
        self._update = Update(*came.get("update", ())).plus(self._updates.last)
        update = tuple(self._update) if any(self._update) else ()
        self._links.riders = {name: what for name, what in (("rows", self._rows), ("update", update)) if what}

    def report_call(self) -> None:
        """Print and measure after a delayed call, every ``steps_per_print``; for a monitor alone after each call."""
        self._updates.end_call()
        self.meter.end_call()
        period = self._host.steps_per_print()
        if self._host.global_steps % (period or 1):
            return
        if period is not None:
            self._console.print_call(self.losses.newest, self.loss_step, self._observer.seconds)
        if self._host.monitor.enabled:
            self.meter.end_period(self._updates.versions, self._run.micro_batches)

    def complete_steps(self, samples: float = math.inf) -> None:
        """Declare that no value of a step up to `samples` is still to come; by default: nothing is in flight."""
        ordered = getattr(self._host.monitor, "wandb_monitor", None)
        if isinstance(ordered, InOrder):
            ordered.complete(samples)

    def _record(self, loss: Loss) -> None:
        """Send a loss and what came with it to the monitor, with the samples of its own call; warn if it rises."""
        monitor = self._host.monitor
        if self._stage.rank == 0:
            self._warn(self._watch.add(loss.mean), loss.call)
        if self._stage.rank == 0 and monitor.enabled:
            events = [("Train/Samples/train_loss", loss.mean, self._samples[loss.call])]
            for stage, *values in loss.rows:
                samples = self._samples[loss.call - 1]
                known = [pair for pair in zip(MEASURED, values, strict=True) if pair[1] is not None]
                events += [(f"Train/DDG/stage{stage}/{name}", value, samples) for name, value in known]
            monitor.write_events(events)
        self._samples.pop(loss.call - 1, None)

    def _warn(self, wrong: str | None, call: int) -> None:
        plan = self._run.plan
        if wrong is not None and plan.delay(0) > 0:
            age = plan.delay(0) / plan.micro_batches
            logger.warning(
                f"call {call}: {wrong}; with gradients up to {age:g} update(s) old this training may diverge. What "
                f"helps: {'; '.join(remedies(self._stage.config.staleness_settings, plan))}. This is said once"
            )
