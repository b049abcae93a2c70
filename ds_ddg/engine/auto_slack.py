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

from collections.abc import Callable, Sequence
from itertools import count, pairwise
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils.logging import print_dist

from ds_ddg.comm.stage_links import Links
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.stage import RunState, Stage
from ds_ddg.telemetry.observer import Observer, Timestamp

__all__ = ["MOST", "SlackTuner", "smallest_slack", "trial_calls"]

_TOLERATED = 1.03
"""A tick may take so many times what it would without latency: a larger slack would cost staleness for nothing."""
MOST = 8
"""The largest slack that is chosen unasked, since memory and staleness grow with it."""
_MEASURED_TICKS = 8


def smallest_slack(num_stages: int, tick: float, latency: float) -> int:
    """Return the smallest slack that hides a hop's `latency` behind a `tick` (both in seconds), at most `MOST`."""
    fitting = (slack for slack in count() if DDGPlan(num_stages, 1, slack).slowdown(latency / tick) <= _TOLERATED)
    return min(next(fitting), MOST)


def trial_calls(plan: DDGPlan) -> int:
    """Return the calls before the choice: to fill the pipeline, one to warm up, at least 3 and 8 ticks to measure."""
    return plan.staleness(0) + 1 + max(3, -(-_MEASURED_TICKS // plan.micro_batches))


class SlackTuner:
    """Makes the trial and the choice; it does nothing where the slack is a number.

    Args:
        stage: this stage.
        run: the place of the stage in its run.
        links: the links to the other stages.
        observer: times this stage and its messages.
        device: where the stage computes.
        everyone: a group of all ranks; None: the default one.
        drain: empties the pipeline.
    """

    def __init__(
        self,
        stage: Stage,
        run: RunState,
        links: Links,
        observer: Observer,
        device: torch.device,
        everyone: Any,
        drain: Callable[[], None],
    ) -> None:
        self._stage, self._run, self._links, self._observer = stage, run, links, observer
        self._device, self._everyone, self._drain = device, everyone, drain
        self._timestamps: list[Timestamp] | None = (
            [] if stage.config.slack == "auto" and stage.num_stages > 1 else None
        )
        """The moments at which calls of the trial began, as far as known; None: there is no trial, or it is over."""
        self._tried = 0
        """The number of calls of the trial that have begun."""
        self._sample: tuple[tuple[torch.dtype, torch.Size], ...] = ()
        """The type and shape of each tensor of an activation."""

    @property
    def trying(self) -> bool:
        """Whether the trial is still going on."""
        return self._timestamps is not None

    def observe(self, outputs: Sequence[torch.Tensor]) -> None:
        """Take what leaves this stage as a sample of its activations."""
        self._sample = tuple((t.dtype, t.shape) for t in outputs)

    def settle(self) -> bool:
        """Choose the slack before a call of the delayed schedule, if the trial is over. Collective then.

        Returns:
            Whether a slack has been chosen, so that the plan is another one.
        """
        if self._timestamps is None or not self._run.delayed:
            return False
        self._observer.timestamp(self._timestamps.append)
        self._tried += 1
        plan = self._run.plan
        if self._tried <= trial_calls(plan):
            return False
        self._observer.clock.read(wait=True)
        filling = plan.staleness(0) + 1
        work = [
            end.time - begin.time - (end.waited - begin.waited) for begin, end in pairwise(self._timestamps[filling:])
        ]
        self._timestamps = None
        self._drain()
        latency = self.latency([torch.zeros(s, dtype=d, device=self._device) for d, s in self._sample])
        self._agree(median(work) / self._run.micro_batches, latency)
        return True

    def latency(self, tensors: Sequence[torch.Tensor], times: int = 5) -> float:
        """Measure how long `tensors` take to the next stage; all stages must be drained, and must call it.

        Args:
            tensors: what travels there and back.
            times: how often.

        Returns:
            Seconds: half of the median time there and back; 0 on the last stage.
        """
        hops: list[float] = []
        self._observer.subscribe(lambda _, sent, back: hops.append((back - sent) / 2), "hop")
        self._links.ping(tensors, times)
        self._observer.clock.read(wait=True)
        return median(hops[1:]) if hops else 0.0

    def _agree(self, tick: float, latency: float) -> None:
        measured: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(measured, (tick, latency), self._everyone)
        tick, latency = (max(values) for values in zip(*measured, strict=True))
        self._run.choose_slack(smallest_slack(self._stage.num_stages, tick, latency))
        print_dist(_reason(self._run.plan, tick, latency), ranks=[0])


def _reason(plan: DDGPlan, tick: float, latency: float) -> str:
    """Return a sentence that says which slack was chosen, why, and how to pin it."""
    without = DDGPlan(plan.num_stages).slowdown(latency / tick) - 1
    rest = plan.slowdown(latency / tick) - 1
    reason = (
        f'"slack": "auto": a hop takes {1e3 * latency:.3f} ms, a tick of the slowest stage {1e3 * tick:.3f} ms, so '
        f"slack 0 would cost {without:.1%}"
    )
    if rest > _TOLERATED - 1:
        return f"{reason}; slack {plan.slack} leaves {rest:.1%}, and more is only taken if it is set as a number"
    return f'{reason}; chosen: slack {plan.slack} (set "slack": {plan.slack} to repeat such a run exactly)'
