"""The memory that each stage takes, measured and predicted.

    python benchmarks/memory.py                          # a few minutes; the machine may do other work
    python benchmarks/memory.py --network wide --micro-batches 1

Pipelines of K = 3 stages: equal blocks (a linear layer and a ReLU) with more weights than activations (``wide``) and
with more activations than weights (``long``), and a ResNet-20 (``resnet``), whose layers are anything but equal. Each
is profiled as ``ds-ddg partition`` does it; `ds_ddg.analysis.memory` predicts from that and the size of the data what
a stage has alive at its fullest moment.

Measured is by how much the process grows from before the first call to its peak in the steady state (the kernel's own
count, VmHWM), plus the weights, which are there before. An engine that is not counted runs first, for what libraries
keep for good. Optimizer: SGD, which has no states. Writes the page OUT; prints it, then one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from benchmarks.processes import join, run_ranks
from benchmarks.report import machine

STAGES = 3
BLOCKS = {"wide": (1024, 512), "long": (512, 2048)}
"""Width and rows of a micro-batch."""
NETWORKS = (*BLOCKS, "resnet")
MODES = [("stash", "keep", 0), ("stash", "recompute", 0), ("current", "keep", 0), ("stash", "keep", 1)]
IMAGES = 128


def network(name: str) -> tuple[list[Any], str, Any]:
    """Return layer specs of the whole pipeline, how they are split, and a loss function."""
    import torch
    from deepspeed.pipe import LayerSpec

    if name == "resnet":
        from ds_ddg.models import cifar_resnet

        return cifar_resnet(20), "type:Stem|Block", torch.nn.functional.cross_entropy

    class Block(torch.nn.Sequential):
        def __init__(self) -> None:
            width, _ = BLOCKS[name]
            super().__init__(torch.nn.Linear(width, width), torch.nn.ReLU())

    def loss_fn(outputs: Any, labels: Any) -> Any:
        return (outputs.mean(dim=1) - labels).square().mean()

    return [LayerSpec(Block) for _ in range(8 * STAGES)], "uniform", loss_fn


def sample(name: str) -> Any:
    """Return one micro-batch."""
    import torch

    if name == "resnet":
        return torch.ones(IMAGES, 3, 32, 32), torch.zeros(IMAGES, dtype=torch.int64)
    width, rows = BLOCKS[name]
    return torch.ones(rows, width), torch.zeros(rows)


def resident(name: str) -> int:
    """Return VmRSS or VmHWM (its peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def settings(names: Sequence[str], grid: Sequence[int]) -> Iterator[tuple[str, int, tuple[str, str, int]]]:
    """Yield network, M, and the engine's settings, in the order of the page."""
    yield from itertools.product(names, grid, MODES)


def rank_main(
    rank: int, num_stages: int, names: list[str], grid: list[int], calls: int, store: str, results: Any
) -> None:
    """Run one stage: put the bytes that it takes for every setting, and how its network is split."""
    from deepspeed.pipe import PipelineModule

    import ds_ddg

    join(rank, num_stages, store)

    def measure(name: str, micro_batches: int, mode: tuple[str, str, int]) -> tuple[int, list[int]]:
        specs, method, loss_fn = network(name)
        net = PipelineModule(specs, num_stages, loss_fn=loss_fn, partition_method=method)
        weights, activations, slack = mode
        data = iter(lambda: sample(name), None)
        config = {
            "train_micro_batch_size_per_gpu": len(next(data)[0]),
            "gradient_accumulation_steps": micro_batches,
            "steps_per_print": 10**9,
            "optimizer": {"type": "SGD", "params": {"lr": 1e-6}},
            "ddg": {"weights": weights, "activations": activations, "slack": slack},
        }
        engine, *_ = ds_ddg.initialize(model=net, config=config, model_parameters=list(net.parameters()))
        there = sum(p.numel() * p.element_size() for p in net.parameters())
        gc.collect()  # of the setting before
        before = resident("VmRSS")
        for _ in range(2 + engine.plan.staleness(0)):
            engine.train_batch(data)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        for _ in range(calls):
            engine.train_batch(data)
        taken = resident("VmHWM") - before + there
        engine.drain()
        engine.destroy()
        return taken, list(net.parts)

    found = []
    for number, setting in enumerate(settings(names, grid)):
        if number % (len(grid) * len(MODES)) == 0:
            measure(*setting)
        found.append(measure(*setting))
    results.put((rank, found))


def predictions(names: Sequence[str], grid: Sequence[int], parts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return bytes by stage for every setting; `parts` are the borders of its stages."""
    from ds_ddg.analysis.recommend import Setup
    from ds_ddg.analysis.stage_costs import Model
    from ds_ddg.profiling.layer_profiler import profile
    from ds_ddg.schedules.ddg import DDGPlan
    from ds_ddg.schedules.simulator import Cost

    profiles = {name: profile(network(name)[0], sample(name), network(name)[2], repetitions=1) for name in names}
    predicted = []
    for (name, micro_batches, (weights, activations, slack)), borders in zip(
        settings(names, grid), parts, strict=True
    ):
        stages = [profiles[name][a:b] for a, b in itertools.pairwise(borders)]
        data = sample(name)[0]
        message = max(stage[-1].output_bytes for stage in stages[:-1])
        model = Model.of_stages(stages, Cost(num_bytes=message), data.numel() * data.element_size())
        memory = Setup(DDGPlan(len(stages), micro_batches, slack), model, weights, activations).memory
        assert memory is not None
        predicted.append(memory)
    return predicted


def page(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the page in Markdown."""
    errors = sorted(abs(row["measured"] / row["predicted"] - 1) for row in rows)
    over = max(row["measured"] / row["predicted"] - 1 for row in rows)
    lines = [
        "# Memory of a stage, predicted and measured",
        "",
        f"Written by `{about['command']}`, whose docstring says what is run and what is counted: {STAGES} stages, on",
        f"CPU, torch {about['torch']}, DeepSpeed {about['deepspeed']}. Predictions are made as by",
        "`ds-ddg simulate --profile`, which does not know the size of the data, while this does;",
        "[memory.py](../ds_ddg/analysis/memory.py) says of which moments of a call they are the fullest. Weights,",
        "gradients, activations and messages are in both. Not predicted is what a layer's backward works with inside,",
        "so a network of large layers takes more. A little less is measured where a receive was posted and nothing",
        "had arrived yet: the kernel counts memory that has been written to.",
        "",
        f"Within 10% in {sum(error <= 0.1 for error in errors)} of {len(rows)}; median difference "
        f"{errors[len(errors) // 2]:.1%}, largest {errors[-1]:.1%}; most above the prediction: {over:+.1%}.",
        "",
        "| network | M | weights | activations | slack | stage | predicted MB | measured MB | difference |",
        "|---" * 9 + "|",
    ]
    lines += [
        f"| {row['network']} | {row['micro_batches']} | {' | '.join(map(str, row['mode']))} | {row['stage']} "
        f"| {row['predicted'] / 1e6:.0f} | {row['measured'] / 1e6:.0f} "
        f"| {100 * (row['measured'] / row['predicted'] - 1):+.1f}% |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--calls", type=int, default=4, help="in steady state")
    parser.add_argument("--out", type=Path, default=Path("docs/memory.md"), help="the page")
    options = parser.parse_args()
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    os.environ.setdefault("LOG_LEVEL", "ERROR")
    # Memory goes back to the system as soon as it is free, or the kernel would count what the allocator keeps.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    names, grid = options.network, options.micro_batches
    measured = dict(run_ranks(rank_main, STAGES, names, grid, options.calls))
    predicted = predictions(names, grid, [parts for _, parts in measured[0]])
    rows = [
        {"network": name, "micro_batches": m, "mode": mode, "stage": stage}
        | {"predicted": predicted[number][stage], "measured": measured[stage][number][0]}
        for number, (name, m, mode) in enumerate(settings(names, grid))
        for stage in range(STAGES)
    ]
    command = shlex.join(["python", "benchmarks/memory.py", *sys.argv[1:]])
    text = page(rows, {"command": command, **machine()})
    options.out.write_text(text, encoding="utf-8")
    print(text)
    print(json.dumps({"benchmark": "memory", "rows": rows}))


if __name__ == "__main__":
    main()
