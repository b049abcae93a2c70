"""Time and memory of a set-up under every schedule, the set-up to take for a memory limit, and its rival elsewhere.

Times come from `ds_ddg.schedules.simulator`, counts from the plan, and what the stages of a model cost from a `Model`.
Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import gcd, inf
from typing import Any

from ds_ddg.analysis.memory import Backward, Sizes, fullest
from ds_ddg.analysis.stage_costs import Model
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.schedules.interleaved import InterleavedPlan
from ds_ddg.schedules.plan import Plan
from ds_ddg.schedules.simulator import UNIT_COST, Cost, replay
from ds_ddg.schedules.synchronous import DualPipeVPlan, GPipePlan, OneFOneBPlan
from ds_ddg.schedules.timeline import Timeline
from ds_ddg.schedules.zero_bubble import ZeroBubbleH1Plan, ZeroBubbleVPlan

__all__ = ["Setup", "candidates", "recommend", "rival", "setups", "steady", "title"]

_AS_FAST = 1.01
"""Setups within one per cent of the fastest are as fast: no measurement could tell them apart."""


@dataclass(frozen=True)
class Setup:
    """One way to train `model`: a schedule, and for DDG its two settings."""

    plan: Plan
    model: Model
    weights: str = "stash"
    activations: str = "keep"

    @property
    def time_per_call(self) -> float:
        """The time that one call takes in the steady state, in the unit of the cost."""
        return _period(self.plan, self._cost)

    @property
    def time_per_micro_batch(self) -> float:
        """The time that one micro-batch takes in the steady state, in the unit of the cost."""
        return self.time_per_call / self.plan.micro_batches

    @property
    def one_device(self) -> float:
        """Time of the same call on one device, which does the work of all stages and waits for nobody."""
        cost, plan = self.model.cost, self.plan
        scale = sum(cost.scale) if cost.scale else plan.num_stages
        passes = plan.micro_batches * (scale * (cost.forward + cost.backward) + 2 * cost.overhead)
        return passes + scale * cost.update

    @property
    def speedup(self) -> float:
        """The time on one device, divided by the time in the pipeline."""
        return self.one_device / self.time_per_call

    @property
    def efficiency(self) -> float:
        """Share of the devices' time that is spent on work; the rest is the bubble."""
        return self.speedup / self.plan.num_stages

    @property
    def versions(self) -> list[int]:
        """The largest number of weight versions that are alive at once, for each stage."""
        current = self.weights == "current"
        return [1 if current else self.plan.versions(stage) for stage in range(self.plan.num_stages)]

    @property
    def memory(self) -> list[float] | None:
        """Bytes by stage for weights, gradients, activations and messages; None if the model does not say."""
        if not (self.model.weight_bytes or self.model.activation_bytes):
            return None
        stash = self.weights == "stash"
        stages = range(self.plan.num_stages)
        return [fullest(self.plan, k, self._sizes(k), stash, self._recomputes(k)) for k in stages]

    def _sizes(self, stage: int) -> Sizes:
        model, last = self.model, self.plan.num_stages - 1
        outputs = model.output_bytes or [model.cost.num_bytes] * last
        weights, activations = (
            float(values[stage]) if values else 0.0 for values in (model.weight_bytes, model.activation_bytes)
        )
        received = outputs[stage - 1] if stage > 0 else model.input_bytes
        sent = outputs[stage] if stage < last else 0.0
        equal = Backward.of_equal_layers(weights, activations, model.cost.num_bytes)
        return Sizes(weights, activations, received, sent, model.backward[stage] if model.backward else equal)

    def _recomputes(self, stage: int) -> bool:
        return self.activations == "recompute" and self.plan.delay(stage) > 0

    @property
    def _cost(self) -> Cost:
        """The model's cost plus the second forward of "recompute".

        The last stage runs no second forward, but the others never wait for it.
        """
        cost = self.model.cost
        again = cost.forward + cost.overhead
        return replace(cost, backward=cost.backward + again) if self._recomputes(0) else cost

    def record(self) -> dict[str, Any]:
        """Return the setup and what it costs as plain data, for a table and for programs."""
        plan = self.plan
        memory = self.memory
        row = {
            "stages": plan.num_stages,
            "micro_batches": plan.micro_batches,
            "link": self.model.cost.link,
            "schedule": plan.name,
            "in_deepspeed": not plan.elsewhere,
            "slack": plan.slack if isinstance(plan, DDGPlan) else None,
            "time_per_call": round(self.time_per_call, 6),
            "speedup": round(self.speedup, 4),
            "efficiency": round(self.efficiency, 4),
            "staleness": plan.staleness(0),
            "versions": self.versions[0],
            "activations": plan.activations(0) / plan.num_chunks,
        }
        return row if memory is None else {**row, "memory": [round(stage) for stage in memory]}

    def __str__(self) -> str:
        if not isinstance(self.plan, DDGPlan):
            return title(self.plan)
        return f'{title(self.plan)}, "weights": "{self.weights}", "activations": "{self.activations}"'


def steady(plan: Plan, cost: Cost = UNIT_COST) -> Timeline:
    """Replay `plan` until its state is steady; return the timeline of the first stage, whose pace is everybody's."""
    if not isinstance(plan, DDGPlan):
        calls = 3  # each call but the first starts from the empty pipeline that the last has left
    else:
        loop = plan.delay(0) + 1
        if not (cost.link or cost.transfer or cost.scale):
            calls = 2 + -(-3 * loop // plan.micro_batches)  # full after a way there and back, and then nobody waits
        else:
            # Latency is paid on loops of messages, the longest of d_0 + 1 ticks; calls repeat when both come out even.
            calls = min(6 * (loop // gcd(loop, plan.micro_batches)), -(-24 * loop // plan.micro_batches))
    return replay(plan, max(3, calls), cost, stages=[0])


@cache
def _period(plan: Plan, cost: Cost) -> float:
    return steady(plan, cost).period()


def title(plan: Plan) -> str:
    """Return the title of a picture of `plan`."""
    more = f", slack {plan.slack}" if isinstance(plan, DDGPlan) and plan.slack else ""
    more += f", {plan.num_chunks} chunks a stage" if isinstance(plan, InterleavedPlan) else ""
    return f"{plan.name}, K = {plan.num_stages} stages, M = {plan.micro_batches}{more}"


def setups(num_stages: int, micro_batches: int, slacks: Iterable[int], model: Model, chunks: int = 2) -> list[Setup]:
    """Return every schedule that can run with so many micro-batches.

    They are DeepSpeed's synchronous ones, DDG with each slack, and those that DeepSpeed has not, of which interleaved
    1F1B has so many `chunks` on a stage.

    Raises:
        ValueError: no stage has any work, so that there is nothing to compare, or more than a float can say.
    """
    sizes = num_stages, micro_batches
    plans: list[Plan] = [GPipePlan(*sizes), OneFOneBPlan(*sizes)]
    if not DualPipeVPlan.refusal(*sizes):
        plans.append(DualPipeVPlan(*sizes))
    plans += [DDGPlan(*sizes, slack) for slack in slacks]
    if not InterleavedPlan.refusal(*sizes):
        plans.append(InterleavedPlan(*sizes, chunks))
    plans += [plan(*sizes) for plan in (ZeroBubbleH1Plan, ZeroBubbleVPlan) if not plan.refusal(*sizes)]
    found = [Setup(plan, model) for plan in plans]
    if not found[0].one_device > 0:
        raise ValueError("no stage has any work: a forward and a backward take no time; give one of them some")
    if found[0].one_device == inf:
        raise ValueError("the work of a call takes longer than a float can say; measure in a larger unit of time")
    return found


def candidates(setup: Setup) -> list[Setup]:
    """Return `setup` with every combination of the settings that trade memory for time or for the paper's equation."""
    if not isinstance(setup.plan, DDGPlan):
        return [setup]
    return [
        replace(setup, weights=weights, activations=activations)
        for weights, activations in product(("stash", "current"), ("keep", "recompute"))
    ]


def recommend(choices: Sequence[Setup], limit: float = inf) -> Setup | None:
    """Return the fastest set-up for DeepSpeed that keeps every stage within `limit` bytes; None if none does.

    Among equally fast set-ups it is the least stale (so a synchronous schedule, where it is as fast, and else DDG with
    M >= K - 1, if there is such a choice, for its staleness of one update), then the one that follows the paper's
    equation ("stash"), then the one that keeps its activations, then the smallest memory.
    """
    return _best([choice for choice in choices if not choice.plan.elsewhere], limit)


def rival(choices: Sequence[Setup], best: Setup | None, limit: float = inf) -> Setup | None:
    """Return the best of the schedules that DeepSpeed has not, if it beats `best`, what to take with DeepSpeed.

    All of them are synchronous, so one beats `best` if it is faster, and also if it is as fast where `best` is stale.
    """
    other = _best([choice for choice in choices if choice.plan.elsewhere], limit)
    if other is None or best is None:
        return other
    slack = _AS_FAST if best.plan.staleness(0) else 1 / _AS_FAST
    return other if other.time_per_micro_batch <= slack * best.time_per_micro_batch else None


def _best(choices: Sequence[Setup], limit: float) -> Setup | None:
    """Return the best of `choices` in the order that `recommend` describes."""
    fitting = [choice for choice in choices if max(choice.memory or [0.0]) <= limit]
    if not fitting:
        return None
    fastest = min(choice.time_per_micro_batch for choice in fitting)
    as_fast = [choice for choice in fitting if choice.time_per_micro_batch <= _AS_FAST * fastest]

    def rank(choice: Setup) -> tuple[Any, ...]:
        settings = choice.weights != "stash", choice.activations != "keep"
        return choice.plan.staleness(0), *settings, max(choice.memory or [0.0]), choice.plan.micro_batches

    return min(as_fast, key=rank)
