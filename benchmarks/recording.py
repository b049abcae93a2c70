"""The cost of ``"ddg": {"trace": DIR}`` for a whole training: the same ResNet-20 with and without, in turns.

    python benchmarks/recording.py                      # about 11 minutes; needs two idle cores
    python benchmarks/recording.py --pairs 20

Two engines live in the same two processes, one thread each, with network, split, batch and M of the digits recipe; one
of them records. They take turns of some calls each, every other pair in the opposite order; a turn ends with a drain,
so that neither works while the other is timed, and writes its records to the disk within its time.

Each pair gives one difference in time (of the slower stage) and one in processor time (of both). Of all pairs counts
the median, with its 95% confidence interval; also said is how many pairs would bring that to +-1%. The times of real
layers differ by several percent from turn to turn, so the same is measured with layers of next to nothing: what a
micro-batch costs there in microseconds is what it costs anywhere, as records do not depend on the size of layers.
Prints markdown tables, then one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from math import ceil, comb, inf, pi, sqrt
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from benchmarks.processes import join, run_ranks
from benchmarks.report import machine

STAGES, MICRO_BATCH, MICRO_BATCHES = 2, 16, 2
LIMIT = 0.01
MODES = ("without", "with")


def rank_main(
    rank: int, num_stages: int, pairs: int, calls: int, small: bool, folder: str, store: str, results: Any
) -> None:
    """Run a stage of a ResNet-20 or (`small`) two linear layers: put both times of every turn by mode, in seconds."""
    import torch
    from deepspeed.pipe import PipelineModule

    import ds_ddg
    from ds_ddg.models import cifar_resnet

    join(rank, num_stages, store)
    torch.manual_seed(0)
    shape = (4,) if small else (3, 32, 32)
    batch = torch.randn(MICRO_BATCH, *shape), torch.randint(4, (MICRO_BATCH,))
    engines = {}
    for mode in MODES:
        net = PipelineModule(
            [torch.nn.Linear(4, 4) for _ in range(2 * num_stages)] if small else cifar_resnet(20),
            num_stages=num_stages,
            loss_fn=torch.nn.functional.cross_entropy,
            partition_method="uniform" if small else "type:Stem|Block",
        )
        config = {
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "steps_per_print": 10**9,
            "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}},
            "ddg": {"trace": folder if mode == "with" else None},
        }
        engines[mode], *_ = ds_ddg.initialize(model=net, config=config, model_parameters=list(net.parameters()))
    data = itertools.repeat(batch)

    def turn(engine: Any) -> tuple[float, float]:
        for _ in range(1 + engine.plan.staleness(0)):
            engine.train_batch(data)
        start, processor = time.perf_counter(), time.process_time()
        for _ in range(calls):
            engine.train_batch(data)
        engine.drain()
        return time.perf_counter() - start, time.process_time() - processor

    for engine in engines.values():
        turn(engine)
    found: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    for number in range(pairs):
        for mode in MODES if number % 2 == 0 else reversed(MODES):
            found[mode].append(turn(engines[mode]))
    results.put(found)


def differences(stages: Sequence[dict[str, Any]], what: int, over: Any) -> list[float]:
    """Return with by without less 1 for each pair; `what`: 0 for time, 1 for processor time; `over` joins stages."""
    turns = {
        mode: [over(turn[what] for turn in same) for same in zip(*(s[mode] for s in stages), strict=True)]
        for mode in MODES
    }
    return [recorded / plain - 1 for recorded, plain in zip(turns["with"], turns["without"], strict=True)]


def microseconds(stages: Sequence[dict[str, Any]], calls: int) -> list[float]:
    """Return, for each pair, the processor time that recording a micro-batch costs a stage, in microseconds."""
    spent = [[sum(turn[1] for turn in same) for same in zip(*(s[m] for s in stages), strict=True)] for m in MODES]
    count = len(stages) * calls * MICRO_BATCHES
    return [1e6 * (recorded - plain) / count for plain, recorded in zip(*spent, strict=True)]


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return an interval of the median for any distribution, from order statistics; infinite if there are too few."""
    ordered, n = sorted(values), len(values)
    place, outside = -1, 0.0
    # The median lies below the value of rank `place`, counted from 0, with a chance of `outside`.
    while 2 * (outside + comb(n, place + 1) / 2**n) <= 1 - confidence:
        place += 1
        outside += comb(n, place) / 2**n
    return (-inf, inf) if place < 0 else (ordered[place], ordered[n - 1 - place])


def pairs_needed(values: Sequence[float], half_width: float = LIMIT) -> int:
    """Return the number of pairs for a 95% interval of the median of this half width, as if they were normal."""
    middle = median(values)
    deviation = 1.4826 * median(abs(value - middle) for value in values)
    return max(1, ceil((1.96 * sqrt(pi / 2) * deviation / half_width) ** 2))


def verdict(low: float, high: float) -> str:
    """Put into words what an interval says about the limit."""
    if high < LIMIT:
        return f"below {LIMIT:.0%}"
    return f"above {LIMIT:.0%}" if low > LIMIT else f"cannot tell whether below {LIMIT:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--calls", type=int, default=20, help="of a turn")
    options = parser.parse_args()
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    os.environ.setdefault("LOG_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder:
        small = run_ranks(rank_main, STAGES, options.pairs, 10 * options.calls, True, f"{folder}/small")
        stages = run_ranks(rank_main, STAGES, options.pairs, options.calls, False, f"{folder}/resnet")
        num_bytes = sum(path.stat().st_size for path in Path(folder, "resnet").iterdir())
    rows = {"time": differences(stages, 0, max), "processor time": differences(stages, 1, sum)}
    plain = median(max(turn[0] for turn in same) for same in zip(*(s["without"] for s in stages), strict=True))
    print(f"{1e3 * plain / options.calls:.1f} ms a call without; {num_bytes} bytes of records of both stages")
    print("| of | median | 95% interval | lowest, highest | limit | pairs | pairs for +-1% |\n" + "|---" * 7 + "|")
    for name, values in rows.items():
        low, high = interval(values)
        print(
            f"| {name} | {median(values):+.2%} | {low:+.2%} to {high:+.2%} | {min(values):+.1%}, {max(values):+.1%} "
            f"| {verdict(low, high)} | {len(values)} | {pairs_needed(values)} |"
        )
    costs = microseconds(small, 10 * options.calls)
    tick = 1e6 * plain / options.calls / MICRO_BATCHES
    low, high = interval(costs)
    print(
        "\n| of a micro-batch, on a stage | median | 95% interval | of one of the ResNet | limit |\n"
        + "|---" * 5
        + "|"
    )
    print(
        f"| processor time | {median(costs):.1f} us | {low:.1f} to {high:.1f} us | {median(costs) / tick:.3%} "
        f"({low / tick:.3%} to {high / tick:.3%}) | {verdict(low / tick, high / tick)} |"
    )
    found = {"differences": rows, "microseconds": costs}
    print(json.dumps({"benchmark": "recording", "calls": options.calls, **found, **machine()}))


if __name__ == "__main__":
    main()
