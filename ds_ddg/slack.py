"""``"slack": "auto"``: measure the links and the work, then choose the smallest slack that hides the latency, once.

    trial     the first calls run at slack 0: the pipeline fills, then each stage times its own work
    drain     nothing is in flight any more
    ping      each stage and the next one send each other messages of an activation's size, while nobody computes
    agree     all ranks learn the slowest stage and the slowest hop, and so come to the same slack
    go on     from the empty pipeline, under the new plan

The rule is ``DDGPlan.slowdown``: latency c of a hop costs 2c(K-1)/K per tick at slack 0, and slack s hides up to s/2
ticks of it. What is measured differs from run to run, so a run is only repeated exactly with the slack pinned: set it
to the number that was logged, from the start.
"""

from __future__ import annotations

from itertools import count, pairwise
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils.logging import print_dist

from ds_ddg.links import as_tuple
from ds_ddg.report import Reporter
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.watch import Mark

__all__ = ["MOST", "AutoSlack", "smallest_slack", "trial_calls"]

_TOLERATED = 1.03
"""A tick may take so many times what it would without latency: a larger slack would cost staleness for nothing."""
MOST = 8
"""Largest slack that is chosen unasked, since memory and staleness grow with it."""
_MEASURED_TICKS = 8


def smallest_slack(num_stages: int, tick: float, latency: float) -> int:
    """The smallest slack that hides a hop's `latency` behind ticks of so much work, at most `MOST`."""
    fitting = (slack for slack in count() if DDGPlan(num_stages, 1, slack).slowdown(latency / tick) <= _TOLERATED)
    return min(next(fitting), MOST)


def trial_calls(plan: DDGPlan) -> int:
    """Calls before the choice: those that fill the pipeline, one to warm up, at least 3 and 8 ticks to measure."""
    return plan.staleness(0) + 1 + max(3, -(-_MEASURED_TICKS // plan.micro_batches))


class AutoSlack(Reporter):
    """Mixed into a ``PipelineEngine``: the trial and the choice."""

    _marks: list[Mark] | None = None
    """When the calls of the trial began, as far as that is known; None: there is none, or it is over."""
    _tried: int = 0
    """Calls of the trial that have begun."""
    _sample: tuple[tuple[torch.dtype, torch.Size], ...] = ()
    """What an activation is like."""
    _slack: int
    _everyone: Any
    """A group of all ranks."""

    def _start_trial(self, num_stages: int) -> None:
        self._slack = 0 if self.ddg.slack == "auto" else self.ddg.slack
        if self.ddg.slack == "auto" and num_stages > 1:
            self._marks = []

    def _settle_slack(self) -> None:
        """Before a call of the delayed schedule: if the trial is over, choose. Collective then."""
        if self._marks is None or self._schedule != "ddg":
            return
        self._links.mark(self._marks.append)
        self._tried += 1
        if self._tried <= trial_calls(self.plan):
            return
        self._links.clock.read(wait=True)
        filling = self.plan.staleness(0) + 1
        work = [end.time - begin.time - (end.waited - begin.waited) for begin, end in pairwise(self._marks[filling:])]
        self._marks = None
        self.drain()
        latency = self._links.ping([torch.zeros(s, dtype=d, device=self.device) for d, s in self._sample])
        self._agree(median(work) / self.micro_batches, latency)
        self._sample = ()

    def _agree(self, tick: float, latency: float) -> None:
        measured: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(measured, (tick, latency), self._everyone)
        tick, latency = (max(values) for values in zip(*measured, strict=True))
        self._slack = smallest_slack(self.num_stages, tick, latency)
        self._links.expect(self.plan)
        self._ties.expect(self.plan)
        self._new_gauge()
        print_dist(_reason(self.plan, tick, latency), ranks=[0])

    def _check_activation(self, outputs: Any) -> None:
        super()._check_activation(outputs)
        if self._marks is not None and torch.is_grad_enabled():
            self._sample = tuple((t.dtype, t.shape) for t in as_tuple(outputs))


def _reason(plan: DDGPlan, tick: float, latency: float) -> str:
    """What was chosen, why, and how to pin it."""
    without = DDGPlan(plan.num_stages).slowdown(latency / tick) - 1
    rest = plan.slowdown(latency / tick) - 1
    reason = (
        f'"slack": "auto": a hop takes {1e3 * latency:.3f} ms, a tick of the slowest stage {1e3 * tick:.3f} ms, so '
        f"slack 0 would cost {without:.1%}"
    )
    if rest > _TOLERATED - 1:
        return f"{reason}; slack {plan.slack} leaves {rest:.1%}, and more is only taken if it is set as a number"
    return f'{reason}; chosen: slack {plan.slack} (set "slack": {plan.slack} to repeat such a run exactly)'
