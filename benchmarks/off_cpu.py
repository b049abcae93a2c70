"""How much of its time a pipeline spends working: DDG against DeepSpeed's 1F1B, stage time off the CPU.

    python benchmarks/off_cpu.py                       # the whole table, about 3 minutes
    python benchmarks/off_cpu.py --stages 4 --micro-batches 1 4
    python benchmarks/off_cpu.py --bf16-zero1          # the same in bf16 with ZeRO-1

A stage "computes" by sleeping (30 ms forward, 60 ms backward), so many stages fit on few cores and everything that is
not sleep is overhead: of the schedule, of the engine, of the messages. Both schedules run in the same processes one
after the other on the same engine (``engine.schedule``). Efficiency = M (forward + backward) / measured time per call,
in steady state, of the slowest stage. Prints a markdown table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

from processes import run_ranks

FORWARD, BACKWARD = 0.030, 0.060


def stage_layer() -> Any:
    """A layer with one weight that takes its time, forward and backward."""
    import torch

    class Sleep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            time.sleep(FORWARD)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            time.sleep(BACKWARD)
            return gradient

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(16))

        def forward(self, x: Any) -> Any:
            return Sleep.apply(x * self.weight)

    return Layer()


def measure(engine: Any, data: Any, schedule: str, calls: int) -> float:
    """Seconds per call of this stage in steady state."""
    engine.schedule = schedule
    for _ in range(2 + engine.plan.staleness(0)):
        engine.train_batch(data)
    start = time.perf_counter()
    for _ in range(calls):
        engine.train_batch(data)
    return (time.perf_counter() - start) / calls


BF16_ZERO_1 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}


def rank_main(
    rank: int, num_stages: int, grid: list[int], seconds: float, more: dict[str, Any], store: str, results: Any
) -> None:
    """One stage: every M of the grid, both schedules."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_stages))
    import itertools

    import deepspeed
    import torch
    from deepspeed.pipe import PipelineModule

    import ds_ddg

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_stages)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for a minute, for inference only
    deepspeed.init_distributed("gloo")
    dtype = torch.bfloat16 if more else torch.float32
    data = itertools.repeat((torch.ones(4, 16, dtype=dtype), torch.zeros(4, 16, dtype=dtype)))
    rows = []
    for micro_batches in grid:
        net = PipelineModule(
            [stage_layer() for _ in range(num_stages)], num_stages, loss_fn=torch.nn.functional.mse_loss,
            partition_method="uniform",
        )  # fmt: skip
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": micro_batches,
            "steps_per_print": 10**9,
            "optimizer": {"type": "SGD", "params": {"lr": 1e-6}},
            **more,
        }
        engine, *_ = ds_ddg.initialize(model=net, config=config, model_parameters=list(net.parameters()))
        ideal = micro_batches * (FORWARD + BACKWARD)
        row = {}
        for schedule in ("ddg", "1f1b"):
            calls = max(3, round(seconds / (ideal if schedule == "ddg" else ideal + (num_stages - 1) * 0.09)))
            row[schedule] = measure(engine, data, schedule, calls)
        rows.append(row)
    results.put(rows)


def run(num_stages: int, grid: list[int], seconds: float, more: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table for one number of stages; time of the slowest stage."""
    measured = run_ranks(rank_main, num_stages, grid, seconds, more)
    rows = []
    for index, micro_batches in enumerate(grid):
        ideal = micro_batches * (FORWARD + BACKWARD)
        seconds_per_call = {s: max(stage[index][s] for stage in measured) for s in ("ddg", "1f1b")}
        rows.append(
            {
                "stages": num_stages,
                "micro_batches": micro_batches,
                "ddg": ideal / seconds_per_call["ddg"],
                "1f1b": ideal / seconds_per_call["1f1b"],
                "ratio": seconds_per_call["1f1b"] / seconds_per_call["ddg"],
                "overhead_ms_per_tick": 1e3 * (seconds_per_call["ddg"] - ideal) / micro_batches,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=4.0, help="time to spend on each cell in steady state")
    parser.add_argument("--bf16-zero1", action="store_true")
    arguments = parser.parse_args()
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    os.environ.setdefault("LOG_LEVEL", "ERROR")
    print(
        "| stages | M | DDG | DeepSpeed 1F1B | ratio | (M+K-1)/M | overhead per tick |\n|---|---|---|---|---|---|---|"
    )
    rows = []
    for num_stages in arguments.stages:
        more = BF16_ZERO_1 if arguments.bf16_zero1 else {}
        for row in run(num_stages, arguments.micro_batches, arguments.seconds, more):
            bound = 1 + (num_stages - 1) / row["micro_batches"]
            print(
                f"| {num_stages} | {row['micro_batches']} | {row['ddg']:.3f} | {row['1f1b']:.3f} | {row['ratio']:.2f} "
                f"| {bound:.2f} | {row['overhead_ms_per_tick']:.2f} ms |",
                flush=True,
            )
            rows.append(row)
    machine = {"cores": os.cpu_count(), "forward_ms": FORWARD * 1e3, "backward_ms": BACKWARD * 1e3}
    print(json.dumps({"benchmark": "off_cpu", "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
