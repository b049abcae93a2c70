"""How much memory each stage takes, measured and predicted.

    python benchmarks/memory.py                          # about a minute
    python benchmarks/memory.py --stages 4 --micro-batches 1 4

A pipeline of equal blocks (a linear layer and a ReLU, wide enough that nothing else counts) is profiled as
``ds-ddg partition`` does it; ``ds-ddg simulate`` predicts from that what a stage keeps alive. Measured is by how much
the process grows from before the first call to its peak in the steady state (the kernel's own count, VmHWM). The
weights, which are there before, and their gradients are added on the other side, as no schedule changes them.
Prints a markdown table, then one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
from pathlib import Path
from typing import Any

from processes import run_ranks

WIDTH, ROWS, BLOCKS = 1024, 1024, 8
MODES = [("stash", "keep", 0), ("stash", "recompute", 0), ("current", "keep", 0), ("stash", "keep", 1)]


def blocks(num_stages: int) -> list[Any]:
    """Layer specs of the whole pipeline."""
    import torch
    from deepspeed.pipe import LayerSpec

    class Block(torch.nn.Sequential):
        def __init__(self) -> None:
            super().__init__(torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU())

    return [LayerSpec(Block) for _ in range(BLOCKS * num_stages)]


def resident(name: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def sample() -> Any:
    """A micro-batch."""
    import torch

    return torch.ones(ROWS, WIDTH), torch.zeros(ROWS)


def loss_fn(outputs: Any, labels: Any) -> Any:
    """Small labels, as in training."""
    return (outputs.mean(dim=1) - labels).square().mean()


def rank_main(rank: int, num_stages: int, grid: list[int], calls: int, store: str, results: Any) -> None:
    """One stage: bytes that every setting takes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_stages))
    import deepspeed
    import torch
    from deepspeed.pipe import PipelineModule

    import ds_ddg

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_stages)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for a minute, for inference only
    deepspeed.init_distributed("gloo")
    taken = []
    for micro_batches, (weights, activations, slack) in itertools.product(grid, MODES):
        net = PipelineModule(blocks(num_stages), num_stages, loss_fn=loss_fn, partition_method="uniform")
        config = {
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": micro_batches,
            "steps_per_print": 10**9,
            "optimizer": {"type": "SGD", "params": {"lr": 1e-6}},
            "ddg": {"weights": weights, "activations": activations, "slack": slack},
        }
        engine, *_ = ds_ddg.initialize(model=net, config=config, model_parameters=list(net.parameters()))
        data = iter(sample, None)
        weights_bytes = sum(p.numel() * p.element_size() for p in net.parameters())
        gc.collect()  # of the setting before
        before = resident("VmRSS")
        for _ in range(2 + engine.plan.staleness(0)):
            engine.train_batch(data)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        for _ in range(calls):
            engine.train_batch(data)
        taken.append(resident("VmHWM") - before + weights_bytes)
        engine.drain()
        engine.destroy()
        del engine, net
    results.put((rank, taken))


def predictions(num_stages: int, grid: list[int]) -> list[list[float]]:
    """For every setting, bytes by stage."""
    from ds_ddg.advise import Model, Setup
    from ds_ddg.measure import profile
    from ds_ddg.plan import DDGPlan
    from ds_ddg.simulate import Cost

    layers = profile(blocks(num_stages), sample(), repetitions=1)
    message = layers[0].output_bytes
    model = Model(
        Cost(num_bytes=message),
        weight_bytes=[BLOCKS * layers[0].parameter_bytes] * num_stages,
        activation_bytes=[sum(layer.activation_bytes for layer in layers[k::num_stages]) for k in range(num_stages)],
        input_bytes=message,
    )
    predicted = []
    for micro_batches, (weights, activations, slack) in itertools.product(grid, MODES):
        setup = Setup(DDGPlan(num_stages, micro_batches, slack), model, weights, activations)
        memory = setup.memory
        assert memory is not None
        predicted.append([kept + gradients for kept, gradients in zip(memory, model.weight_bytes, strict=True)])
    return predicted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1])
    parser.add_argument("--calls", type=int, default=4, help="in steady state")
    options = parser.parse_args()
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    os.environ.setdefault("LOG_LEVEL", "ERROR")
    # Memory goes back to the system as soon as it is free, or the kernel would count what the allocator keeps.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    measured = dict(run_ranks(rank_main, options.stages, options.micro_batches, options.calls))
    rows = []
    print(
        "| M | weights | activations | slack | stage | predicted MB | measured MB | difference |\n" + "|---" * 8 + "|"
    )
    settings = list(itertools.product(options.micro_batches, MODES))
    for index, ((m, mode), predicted) in enumerate(
        zip(settings, predictions(options.stages, options.micro_batches), strict=True)
    ):
        for stage, bytes_predicted in enumerate(predicted):
            taken = measured[stage][index]
            rows.append(
                {"micro_batches": m, "mode": mode, "stage": stage, "predicted": bytes_predicted, "measured": taken}
            )
            print(
                f"| {m} | {mode[0]} | {mode[1]} | {mode[2]} | {stage} | {bytes_predicted / 1e6:.0f} "
                f"| {taken / 1e6:.0f} | {100 * (taken / bytes_predicted - 1):+.0f}% |",
                flush=True,
            )
    print(json.dumps({"benchmark": "memory", "rows": rows}))


if __name__ == "__main__":
    main()
