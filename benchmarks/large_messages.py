"""The cost of large activations between stages: how much of its time a stage works, by the size of a message.

    python benchmarks/large_messages.py
    python benchmarks/large_messages.py --stages 4 --megabytes 16 --slack 1

A stage sleeps (30 ms forward, 60 ms backward) and hands its input on untouched, so that nothing but the journey of
the messages takes processor time: from one process into another, through gloo, 2 (K - 1) of them for each
micro-batch. On the links of a real network they also share its bandwidth, which this does not show. M = 1.

*Changing* shapes: each micro-batch has between half of the rows and all of them. One process without a pipeline makes
a gradient of that size as well, and fetches such data, so its share is below that of `off_cpu.py`. In a turn DDG and
DeepSpeed's 1F1B run in the same processes; medians of the turns, of the slowest stage. Prints a table, writes OUT.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from processes import join, run_ranks
from report import machine, table
from sleeping import TICK, per_call, sleeping_layer
from tqdm import tqdm

COLUMNS = 1024
OUT = Path(__file__).parents[1] / "docs" / "benchmarks" / "large_messages.md"


class Cell(NamedTuple):
    """One setting that is measured."""

    stages: int
    megabytes: float
    changing: bool
    slack: int | None
    """Number of stages; None for one process."""


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    for megabytes, changing in itertools.product(options.megabytes, (False, True)):
        yield Cell(1, megabytes, changing, None)
        for stages, slack in itertools.product(options.stages, options.slack):
            yield Cell(stages, megabytes, changing, slack)


def rank_main(rank: int, count: int, cell: Cell, calls: int, turns: int, store: str, results: Any) -> None:
    """Put what a call took, by schedule: the seconds of each turn."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    import ds_ddg

    join(rank, count, store)
    net = PipelineModule(
        [sleeping_layer(touches=False) for _ in range(count)],
        num_stages=count,
        loss_fn=lambda outputs, labels: outputs[:1].mean(),
        partition_method="uniform",
        dynamic_shape=cell.changing,
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "SGD", "params": {"lr": 1e-6}},
        "ddg": {"slack": cell.slack or 0},
    }
    build = ds_ddg.initialize if count > 1 else deepspeed.initialize
    engine, *_ = build(model=net, config=config, model_parameters=list(net.parameters()))
    took: dict[str, list[float]] = {}
    rows = max(2, round(cell.megabytes * 2**18 / COLUMNS))
    data = micro_batches(rows, cell.changing)
    for _, name in itertools.product(range(turns), ("ddg", "1f1b") if count > 1 else ("alone",)):
        if count > 1:
            engine.schedule = name
            engine.drain()
        took.setdefault(name, []).append(per_call(engine, data, 4 + 2 * count, calls).seconds)
    if count > 1:
        engine.schedule = "ddg"  # drained; a process ends when all have left
    results.put(took)


def micro_batches(rows: int, changing: bool) -> Iterator[Any]:
    """Yield micro-batches without end, the same on every rank."""
    import torch

    x, numbers = torch.ones(rows, COLUMNS), random.Random(3)
    while True:
        yield x[: numbers.randint(rows // 2, rows) if changing else rows], torch.zeros(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 4, 16], help="of an activation, at most")
    parser.add_argument("--slack", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--calls", type=int, default=20, help="timed calls of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    os.environ.setdefault("LOG_LEVEL", "ERROR")
    lines = []
    for cell in tqdm(list(cells(options)), unit=" settings"):
        by_rank = run_ranks(rank_main, cell.stages, cell, options.calls, options.turns)
        shape = "changing" if cell.changing else "fixed"
        for name in by_rank[0]:
            turns = [TICK / max(turn) for turn in zip(*(took[name] for took in by_rank), strict=True)]
            slack = str(cell.slack) if name == "ddg" else ""
            start = [f"{cell.megabytes:g}", shape, str(cell.stages), name, slack]
            lines.append([*start, f"{median(turns):.3f}", f"{min(turns):.3f}, {max(turns):.3f}"])
    about = machine()
    page = (
        "# Large messages\n\n"
        f"Written by `{shlex.join(['python', *sys.argv])}`, whose docstring says what is measured, on\n"
        f"{about['cores']} cores, {about['platform']}, torch {about['torch']}, DeepSpeed {about['deepspeed']}.\n"
        f"Turns: {options.turns}.\n\n"
        + table(["MB", "shapes", "K", "schedule", "slack", "efficiency", "lowest, highest"], lines)
        + "\n"
    )
    options.out.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
