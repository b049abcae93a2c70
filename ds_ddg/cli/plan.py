"""``ds-ddg plan``: one schedule, as text or picture, and what it keeps on each stage."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from ds_ddg.analysis.format import table
from ds_ddg.analysis.recommend import Setup, title
from ds_ddg.analysis.stage_costs import Model
from ds_ddg.analysis.timeline_plot import clock, save, text
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.schedules.interleaved import InterleavedPlan
from ds_ddg.schedules.plan import Plan
from ds_ddg.schedules.simulator import UNIT_COST, num_operations, replay
from ds_ddg.schedules.synchronous import DualPipeVPlan, GPipePlan, OneFOneBPlan
from ds_ddg.schedules.zero_bubble import ZeroBubbleH1Plan, ZeroBubbleVPlan

from .options import add_output, check_output

__all__ = ["HELP", "add_arguments", "shown"]

HELP = "show one schedule: what each stage does, keeps and waits for"
_MANY = 100_000
"""Number of operations above which the user is told that a replay takes a while."""
_SYNCHRONOUS: dict[str, Callable[[int, int], Plan]] = {
    plan.name: plan
    for plan in (OneFOneBPlan, GPipePlan, DualPipeVPlan, InterleavedPlan, ZeroBubbleH1Plan, ZeroBubbleVPlan)
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ds-ddg plan`` to `parser`."""
    parser.set_defaults(run=_run)
    parser.add_argument("--stages", type=int, required=True, metavar="K", help="pipeline stages")
    parser.add_argument("--micro-batches", type=int, default=1, metavar="M", help="micro-batches per call (default 1)")
    parser.add_argument(
        "--slack", type=int, default=0, metavar="S", help="more micro-batches in flight per hop, of ddg (default 0)"
    )
    parser.add_argument(
        "--schedule",
        choices=["ddg", *_SYNCHRONOUS],
        default="ddg",
        help="default ddg; the others end calls in a flush, and DeepSpeed has not all of them",
    )
    parser.add_argument(
        "--chunks", type=int, metavar="V", help="parts of the model a stage, of interleaved (default 2)"
    )
    parser.add_argument("--calls", type=int, metavar="N", help="calls to show (default: up to the steady state)")
    parser.add_argument("--clock", action="store_true", help="on a common clock, so that the bubble shows")
    add_output(parser)


def shown(plan: Plan) -> int:
    """Return how many calls show the pipeline filling, some ticks of its steady state and a gap between calls."""
    return max(2, -(-(plan.delay(0) + 3) // plan.micro_batches))


def _run(options: argparse.Namespace) -> str:
    check_output(options.out)
    plan = _chosen(options)
    calls = shown(plan) if options.calls is None else options.calls
    if calls < 1:
        raise ValueError(f"--calls must be 1 or more, got {calls}")
    if (operations := num_operations(plan, calls)) > _MANY and sys.stderr.isatty():
        print(f"replaying {operations:,} operations, and more for the steady state ...", file=sys.stderr)
    timeline = replay(plan, calls, drain=True)
    if options.out:
        save({title(plan): timeline}, options.out)
    stages = [
        {
            "stage": stage,
            "delay": plan.delay(stage),
            "staleness": plan.staleness(stage),
            "versions": plan.versions(stage),
            "activations": plan.activations(stage) / plan.num_chunks,
        }
        for stage in range(plan.num_stages)
    ]
    bubble = 1 - Setup(plan, Model(UNIT_COST)).efficiency
    if options.json:
        streams = [[str(op) for op in plan.stream(stage, calls, drain=True)] for stage in range(plan.num_stages)]
        record = {"schedule": plan.name, "stages": plan.num_stages, "micro_batches": plan.micro_batches}
        return json.dumps({**record, "bubble": round(bubble, 6), "per_stage": stages, "operations": streams})
    picture = clock(timeline) if options.clock else text(timeline, updates=plan.micro_batches > 1)
    legend = "F forward, B backward, with the number of the micro-batch"
    legend = f"{legend}; W gradients of the weights, B those of the input" if plan.splits_backward else legend
    legend += ", ' of the stage's second chunk" if plan.num_chunks > 1 else ""
    legend += ", '2 of its third" if plan.num_chunks > 2 else ""
    legend += "; one column per forward time" if options.clock else "; * update" if plan.micro_batches > 1 else ""
    if plan.delay(0):
        legend += "\nat the end engine.drain() finishes what is in flight, which no call of train_batch does"
    if plan.elsewhere:
        legend += f"\nnot in DeepSpeed: {plan.name} runs in {plan.elsewhere}"
    return "\n".join(
        [title(plan), "", picture, legend, "", table(stages), "", f"bubble in steady state: {bubble:.1%}"]
    )


def _chosen(options: argparse.Namespace) -> Plan:
    if options.chunks is not None and options.schedule != InterleavedPlan.name:
        raise ValueError(f"--chunks {options.chunks} has no meaning for {options.schedule}; leave it out")
    if options.schedule == "ddg":
        return DDGPlan(options.stages, options.micro_batches, options.slack)
    if options.slack:
        raise ValueError(
            f"--slack {options.slack} has no meaning for {options.schedule}, where no gradient is delayed; "
            "leave it out"
        )
    if options.chunks is not None:
        return InterleavedPlan(options.stages, options.micro_batches, options.chunks)
    return _SYNCHRONOUS[options.schedule](options.stages, options.micro_batches)
