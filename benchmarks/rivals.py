"""The synchronous schedules that DeepSpeed has not, as torch.distributed.pipelining runs them, beside the replay.

    python benchmarks/rivals.py --stages 4 --micro-batches 4,8

A stage sleeps as long for a forward as for either part of a backward, so that all stages fit on few cores. Prints a
table of efficiency, the share of the stages' time that goes into that work, in the fastest of the calls. The first
stage makes no gradient of its input until its W, as no other stage waits for it.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from itertools import pairwise
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from processes import run_ranks

from ds_ddg.analysis.recommend import Setup, setups
from ds_ddg.analysis.stage_costs import Model
from ds_ddg.schedules.simulator import Cost

CLASSES = {
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zb-h1": "ScheduleInterleavedZeroBubble",
    "zb-v": "ScheduleZBVZeroBubble",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4, metavar="K")
    parser.add_argument("--micro-batches", default="4,8", metavar="M,...")
    parser.add_argument("--unit", type=float, default=0.15, metavar="S", help="seconds of a forward (default 0.15)")
    parser.add_argument("--calls", type=int, default=5, metavar="N", help="calls to measure (default 5)")
    options = parser.parse_args()
    print("| K | M | schedule | measured | predicted | deviation |\n|---|---|---|---|---|---|")
    for m in map(int, options.micro_batches.split(",")):
        predicted = {setup.plan.name: setup for setup in setups(options.stages, m, (), Model(Cost(1, 2)))}
        chosen = [predicted[name] for name in CLASSES if name in predicted]
        ranks = run_ranks(rank, options.stages, chosen, options.unit, options.calls)
        for setup, *calls in zip(chosen, *ranks, strict=True):
            # The slowest rank of each call; the fastest call, as whatever else the machine does only slows one down.
            measured = 3 * m * options.unit / min(map(max, zip(*calls, strict=True)))
            print(
                f"| {options.stages} | {m} | {setup.plan.name} | {measured:.3f} | {setup.efficiency:.3f} "
                f"| {measured / setup.efficiency - 1:+.1%} |",
                flush=True,
            )


def rank(index: int, count: int, chosen: list[Setup], unit: float, calls: int, store: str, results: Any) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed import pipelining

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=count)
    took = []
    for setup in chosen:
        plan = setup.plan
        last = count * plan.num_chunks - 1
        places = [count * chunk + index for chunk in range(plan.num_chunks)]
        if plan.name == "zb-v":
            places[1] = last - index
        parts = [
            pipelining.PipelineStage(
                sleeping_part(unit / plan.num_chunks, place == 0), place, last + 1, torch.device("cpu")
            )
            for place in places
        ]
        schedule = getattr(pipelining.schedules, CLASSES[plan.name])(
            parts[0] if plan.name == "1f1b" else parts, plan.micro_batches, loss_fn=torch.nn.functional.mse_loss
        )
        data = torch.ones(plan.micro_batches, 4)
        inputs = (data,) if 0 in places else ()
        targets = {"target": data} if last in places else {}
        schedule.step(*inputs, **targets)  # fills what may stay filled: no rank waits for the others here
        ends = [time.perf_counter()]
        for _ in range(calls):
            schedule.step(*inputs, **targets)
            ends.append(time.perf_counter())
        took.append([later - earlier for earlier, later in pairwise(ends)])
    results.put(took)
    dist.destroy_process_group()


def sleeping_part(seconds: float, first: bool) -> Any:
    """Make a part of a model that sleeps `seconds` for a forward and for each of its two gradients."""
    import torch

    class OfInput(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            time.sleep(seconds)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            time.sleep(seconds)
            return gradient.clone()

    class OfWeight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Any) -> Any:
            return weight.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            time.sleep(seconds)
            return gradient.clone()

    class Part(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4))
            # Without it, nobody would ask for the gradient of the first part's input.
            self.shift = torch.nn.Parameter(torch.zeros(4)) if first else 0.0

        def forward(self, x: Any) -> Any:
            return OfInput.apply(x + self.shift) + OfWeight.apply(self.weight)

    return Part()


if __name__ == "__main__":
    main()
