"""The share of its time that a pipeline works, measured and predicted: DDG, DeepSpeed's schedules, one device.

    python benchmarks/off_cpu.py                                      # the whole grid, about half an hour
    python benchmarks/off_cpu.py --stages 4 --micro-batches 1 4K --latency 0 --turns 1
    python benchmarks/off_cpu.py --bf16-zero1                         # the same in bf16 with ZeRO-1
    python benchmarks/off_cpu.py --from docs/benchmarks/off_cpu.json  # only predict and write the page again

A stage "computes" by sleeping (30 ms forward, 60 ms backward), so many stages fit on few cores and everything that is
not sleep is overhead: of the schedule, of the engine, of the messages, of having fewer cores than stages. The
schedules take turns in the same processes, which each setting has of its own; the median of the turns counts, of the
slowest stage, in steady state. Efficiency is the share of the devices' time that goes into forward and backward.

Predictions are those of ``ds-ddg simulate``, given what one stage alone takes for a micro-batch and for an update, and
what a message takes between two idle stages. Latency is added to the links of DDG alone (`latency.py`). Writes
``OUT/off_cpu.json``, pictures, and a page ``OUT.md``; prints the tables.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from predictions import predict, uneven
from processes import join, run_ranks
from report import machine, write
from sleeping import BACKWARD, FORWARD, TICK, Took, per_call, sleeping_layer
from tqdm import tqdm

BF16_ZERO_1 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}


class Cell(NamedTuple):
    """One setting of the grid."""

    stages: int
    micro_batches: int
    slack: int | str = 0
    latency: float = 0.0
    """Latency added to each hop, in ticks."""
    scale: tuple[float, ...] = ()
    """Relative time of each stage; empty: all equal."""
    schedules: tuple[str, ...] = ("ddg",)


def cells(options: argparse.Namespace) -> Iterable[Cell]:
    """Yield the grid: every M without latency, every latency and slack for a few M, and stages of uneven time."""
    for k in options.stages:
        numbers = sorted({_number(text, k) for text in options.micro_batches})
        if 0 in options.latency:
            for m in numbers:
                yield Cell(k, m, schedules=("ddg", "1f1b", *(["dualpipev"] if m >= 2 * k else [])))
            yield Cell(k, numbers[0], scale=uneven(k), schedules=("ddg", "1f1b"))
        for latency, slack, m in itertools.product(options.latency, options.slack, options.latency_micro_batches):
            if latency or slack != 0:
                yield Cell(k, m, slack, latency)


def _number(text: str, num_stages: int) -> int:
    """Read a number; ``4K`` is four times the number of stages."""
    return int(text.removesuffix("K")) * (num_stages if text.endswith("K") else 1)


class Bench:
    """Measures cells on one rank."""

    def __init__(
        self, rank: int, num_stages: int, seconds: float, turns: int, more: dict[str, Any], store: str
    ) -> None:
        import torch

        join(rank, num_stages, store)
        self.seconds, self.turns, self.more = seconds, turns, more
        dtype = torch.bfloat16 if more else torch.float32
        self.data = itertools.repeat((torch.ones(4, 16, dtype=dtype), torch.zeros(4, 16, dtype=dtype)))

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Return the time of a call by schedule, one entry for each turn; the slack; seconds that a message takes."""
        from latency import added_latency

        with added_latency(cell.latency * TICK):
            engine = self._engine(cell, {"slack": cell.slack})
            if cell.slack == "auto":
                from ds_ddg.engine.auto_slack import trial_calls

                per_call(engine, self.data, trial_calls(engine.plan) + 1, 1)
            engine.drain()
            hop = engine._calls.slack.latency([next(self.data)[0]], times=20)
            engines = dict.fromkeys(cell.schedules, engine)
            if "dualpipev" in engines:
                engines["dualpipev"] = self._engine(cell, {}, chunks=2)
            found: dict[str, list[Took]] = {name: [] for name in engines}
            for _, (name, trained) in itertools.product(range(self.turns), engines.items()):
                if trained is engine:
                    engine.schedule = name
                    engine.drain()
                longest = TICK * (cell.micro_batches + (cell.stages - 1) * (name != "ddg"))
                warm_up = 2 + engine.plan.staleness(0) if name == "ddg" else 1
                calls = max(3, round(self.seconds / longest))
                found[name].append(per_call(trained, self.data, warm_up, calls))
            engine.schedule = "ddg"  # drained; a process ends when all have left
            return {"took": found, "slack": engine.plan.slack, "hop": hop}

    def _engine(self, cell: Cell, ddg: dict[str, Any], chunks: int = 1) -> Any:
        import deepspeed
        import torch
        from deepspeed.pipe import PipelineModule
        from deepspeed.runtime.pipe.dualpipev import DualPipeVModule

        import ds_ddg

        scale = cell.scale or (1.0,) * cell.stages
        order = [*range(cell.stages), *reversed(range(cell.stages))][: chunks * cell.stages]
        net = (DualPipeVModule if chunks == 2 else PipelineModule)(
            [sleeping_layer(scale[stage] / chunks) for stage in order],
            num_stages=cell.stages,
            loss_fn=torch.nn.functional.mse_loss,
            partition_method="uniform",
        )
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": cell.micro_batches,
            "steps_per_print": 10**9,
            "optimizer": {"type": "SGD", "params": {"lr": 1e-6}},
            **({"ddg": ddg} if chunks == 1 else {}),
            **self.more,
        }
        build = deepspeed.initialize if chunks == 2 else ds_ddg.initialize
        engine, *_ = build(model=net, config=config, model_parameters=list(net.parameters()))
        return engine


def rank_main(rank: int, num_stages: int, cell: Cell, *arguments: Any) -> None:
    """Measure one stage of one cell."""
    *settings, store, results = arguments
    results.put((rank, Bench(rank, num_stages, *settings, store).measure(cell)))


def measured(cell: Cell, *settings: Any) -> list[dict[str, Any]]:
    """Return what `Bench.measure` found on each stage.

    It runs in processes of its own: a process group lasts as long as its process, and gloo wakes a thread for each a
    hundred times a second. With eight stages in processes that had held ten engines before, .949 became .902.
    """
    return [found for _, found in sorted(run_ranks(rank_main, cell.stages, cell, *settings), key=itemgetter(0))]


def one_stage(seconds: float, turns: int, more: dict[str, Any]) -> dict[str, float]:
    """Return the seconds that a stage alone takes for a micro-batch, and for what comes once a call."""
    few, many = 1, 8
    (a,), (b,) = (measured(Cell(1, m), seconds, turns, more) for m in (few, many))
    small, large = (median(took.seconds for took in found["took"]["ddg"]) for found in (a, b))
    tick = (large - small) / (many - few)
    return {"tick": tick, "update": max(0.0, small - few * tick)}


def rows(cell: Cell, by_stage: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Yield a row for each schedule of a cell, as measured."""
    work = TICK * (sum(cell.scale) / cell.stages if cell.scale else 1) * cell.micro_batches
    for name in cell.schedules:
        took = [stage["took"][name] for stage in by_stage]
        turns = [max(stage.seconds for stage in turn) for turn in zip(*took, strict=True)]
        queued = [turn.queued for stage in took for turn in stage if turn.queued is not None]
        yield {
            "stages": cell.stages,
            "micro_batches": cell.micro_batches,
            "link": cell.latency,
            "uneven": bool(cell.scale),
            "schedule": name,
            "slack": cell.slack if name == "ddg" else None,
            "chosen": by_stage[0]["slack"] if name == "ddg" else None,
            "seconds_per_call": median(turns),
            "turns": turns,
            "measured": work / median(turns),
            "queued_ms": 1e3 * mean(queued) / cell.micro_batches if queued else None,
            "hop_ms": 1e3 * max(stage["hop"] for stage in by_stage),
        }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the grid."""
    more = BF16_ZERO_1 if options.bf16_zero1 else {}
    settings = options.seconds, options.turns, more
    alone = one_stage(*settings)
    found: list[dict[str, Any]] = []
    for cell in tqdm(list(cells(options)), unit=" settings"):
        found += rows(cell, measured(cell, *settings))
    command = shlex.join(["python", "benchmarks/off_cpu.py", *sys.argv[1:]])
    about = {
        "command": command,
        "forward_ms": 1e3 * FORWARD,
        "backward_ms": 1e3 * BACKWARD,
        "turns": options.turns,
        **machine(),
    }
    return {"benchmark": "off_cpu", "bf16_zero1": options.bf16_zero1, "about": about, "alone": alone, "rows": found}


def _slack(text: str) -> int | str:
    return text if text == "auto" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument(
        "--micro-batches", nargs="+", default=["1", "2", "4", "8", "4K", "8K"], help="4K: four a stage"
    )
    parser.add_argument("--latency", type=float, nargs="+", default=[0, 0.1, 0.5, 1], help="added to a hop, in ticks")
    parser.add_argument("--latency-micro-batches", type=int, nargs="+", default=[1], help="M of those")
    parser.add_argument("--slack", type=_slack, nargs="+", default=[0, 1, "auto"])
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn in steady state")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--bf16-zero1", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder; the page lies beside it")
    parser.add_argument(
        "--from", dest="source", type=Path, help="results to predict and write the page from, instead of measuring"
    )
    options = parser.parse_args()
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    os.environ.setdefault("LOG_LEVEL", "ERROR")
    results = json.loads(options.source.read_text(encoding="utf-8")) if options.source else run(options)
    predict(results)
    print(write(results, options.out))


if __name__ == "__main__":
    main()
