"""Emptying the pipeline: the backward passes in flight, and an update whenever M of them have accumulated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ds_ddg.comm.failures import FailureGuard
from ds_ddg.comm.stage_links import Links
from ds_ddg.host import Host
from ds_ddg.instructions import DDGSchedule
from ds_ddg.stage import RunState, Stage
from ds_ddg.telemetry.console import Console
from ds_ddg.telemetry.reporter import Reporter
from ds_ddg.weights.stage_optimizer import StageOptimizer

__all__ = ["Drain"]


@dataclass
class Drain:
    """Finishes every backward pass in flight when it is called; see ``DDGEngine.drain``."""

    stage: Stage
    run: RunState
    host: Host
    links: Links
    updates: StageOptimizer
    reporter: Reporter
    console: Console
    failures: FailureGuard

    def __call__(self) -> None:
        """Drain: afterwards nothing is in flight or retained. Every stage must do it; twice does nothing."""
        self.failures.run(self._drain)

    def _drain(self) -> None:
        run, versions, stage_id = self.run, self.updates.versions, self.stage.stage_id
        if run.drained:
            return
        versions.refuse_changes(self.host.module, stage_id)
        end = run.next_micro_batch
        if run.delayed and end > run.filled_at:
            self.host.module.train()
            ops = run.plan.drain(stage_id, end, run.filled_at)
            with torch.enable_grad(), self.console.host_muted():  # it may be called from evaluation code
                self.host._exec_schedule(DDGSchedule(run.plan, stage_id, ops, draining=True))
                self.updates.share_tied_weights()
            self.reporter.learn_losses(run.call - 1)
            self.reporter.meter.forget()
        self.reporter.complete_steps()
        self.links.flush()
        run.drain()
        versions.assert_empty()
