"""Throughput of a ResNet-20 on real cores: one process against two pipeline stages, the same threads per process.

    python benchmarks/real_compute.py                     # about 2 minutes; needs two idle cores
    python benchmarks/real_compute.py --micro-batches 1

One process trains the whole network with DeepSpeed's engine; then two do with DDG, split by measured time
(`ds_ddg.partition`), on the same data with one thread each. The two take turns a few times, so that both see the same
machine; the medians are compared. Prints a markdown table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

from processes import join, run_ranks

MICRO_BATCH = 32


def rank_main(rank: int, num_stages: int, micro_batches: int, calls: int, store: str, results: Any) -> None:
    """Train one stage (or everything, alone) and report samples per second and what the split predicts."""
    import itertools

    import torch

    import ds_ddg
    from ds_ddg.models import cifar_resnet
    from ds_ddg.partition import PipelineModule

    join(rank, num_stages, store)
    torch.manual_seed(0)
    batch = torch.randn(MICRO_BATCH, 3, 32, 32), torch.randint(10, (MICRO_BATCH,))
    loss_fn = torch.nn.functional.cross_entropy
    how = {"sample": batch} if num_stages > 1 else {"partition_method": "uniform"}
    net = PipelineModule(layers=cifar_resnet(20), num_stages=num_stages, loss_fn=loss_fn, **how)
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": micro_batches,
        "steps_per_print": 10**9,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}},
        "ddg": {"enabled": num_stages > 1},
    }
    engine, *_ = ds_ddg.initialize(model=net, config=config, model_parameters=list(net.parameters()))
    data = itertools.repeat(batch)
    for _ in range(2 + engine.plan.staleness(0)):
        engine.train_batch(data)
    start = time.perf_counter()
    for _ in range(calls):
        engine.train_batch(data)
    seconds = time.perf_counter() - start
    engine.drain()
    predicted = None if net.balance is None else net.balance.efficiency
    results.put((calls * micro_batches * MICRO_BATCH / seconds, list(net.parts), predicted))


def run(num_stages: int, micro_batches: int, calls: int) -> tuple[float, list[int], float | None]:
    """Return samples per second of the slowest stage, the split, and its predicted efficiency."""
    return min(run_ranks(rank_main, num_stages, micro_batches, calls))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--calls", type=int, default=20, help="timed calls of a turn")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    os.environ.setdefault("LOG_LEVEL", "ERROR")
    turns = [[run(k, arguments.micro_batches, arguments.calls) for k in (1, 2)] for _ in range(arguments.turns)]
    one, two = ([turn[k][0] for turn in turns] for k in (0, 1))
    ratio = statistics.median(two) / statistics.median(one)
    print("| processes | samples/s, median | lowest, highest | split | predicted efficiency |\n|---|---|---|---|---|")
    for name, index, rates in (("1", 0, one), ("2, DDG", 1, two)):
        _, parts, predicted = turns[-1][index]
        share = "" if predicted is None else f"{predicted:.3f}"
        print(f"| {name} | {statistics.median(rates):.1f} | {min(rates):.1f}, {max(rates):.1f} | {parts} | {share} |")
    print(f"ratio {ratio:.2f}")
    row = {"one": one, "two": two, "ratio": ratio, "splits": [turn[1][1] for turn in turns]}
    print(json.dumps({"benchmark": "real_compute", "micro_batches": arguments.micro_batches, **row}))


if __name__ == "__main__":
    main()
