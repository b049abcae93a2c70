"""Training throughput on GPUs: DDG, DeepSpeed's 1F1B and one process, with the same model and data.

    python benchmarks/gpu.py                     # a GPU for each stage; where there are fewer, all stages share one
    python benchmarks/gpu.py --stages 4 --micro-batches 1 --turns 1
    python benchmarks/gpu.py --device cpu --layers 4 --width 64    # to try the script without a GPU

Two kinds of stages. *Transformer* blocks in bf16, as many in all whatever K is: stages that share a GPU share its
computing power, so there the most that a schedule can reach is what one process does, and what lacks is waiting and
copying. *Sleeping* stages (30 ms forward, 60 ms backward, on the host) leave the GPU idle but for the activations, so
their efficiency is that of the messages: from the device to pinned memory, through gloo, and to the device again.

DeepSpeed cannot run 1F1B where stages share a GPU: NCCL refuses that, and gloo breaks on tensors of a device. There
its ``p2p`` is given tensors of the host here, copied before and after, so that both schedules have the same wire. In a
turn both run in the same processes, and one process by itself. Medians of the turns, of the slowest stage.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from processes import join, run_ranks
from report import machine, table
from sleeping import TICK, sleeping_layer
from tqdm import tqdm

HEADS, ROWS, LENGTH = 8, 8, 128
OUT = Path(__file__).parents[1] / "docs" / "benchmarks" / "gpu.json"


class Cell(NamedTuple):
    """One setting, measured for each schedule in turns."""

    stages: int
    micro_batches: int
    megabytes: float | None = None
    """Size of the activation between two sleeping stages; None: transformer blocks."""


def rank_main(rank: int, count: int, options: argparse.Namespace, cells: list[Cell], store: str, results: Any) -> None:
    """Put the seconds of a call by schedule, for each cell, and the name of the device."""
    import torch
    from deepspeed.accelerator import get_accelerator

    join(rank, count, store, "nccl" if options.own_device else "gloo", rank if options.own_device else 0)
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    results.put((name, [measure(cell, options) for cell in cells]))


def measure(cell: Cell, options: argparse.Namespace) -> dict[str, float]:
    """Return the seconds that a call takes on this rank, by schedule; one process has only one."""
    found = {}
    shared = options.device == "cuda" and not options.own_device
    for name in ("ddg", "1f1b") if cell.stages > 1 else ("alone",):
        with staged_p2p() if shared and name == "1f1b" else nullcontext():
            engine, data = build(cell, options, name)
            found[name] = per_call(engine, data, 2 + 2 * cell.stages, options.calls)
            if name == "ddg":
                engine.drain()
    return found


def build(cell: Cell, options: argparse.Namespace, name: str) -> tuple[Any, Iterator[Any]]:
    import deepspeed
    import torch
    from deepspeed.pipe import PipelineModule

    import ds_ddg

    torch.manual_seed(0)
    if cell.megabytes is None:
        layers = [block(options.width) for _ in range(options.layers)]
        x, dtype = torch.randn(ROWS, LENGTH, options.width), torch.bfloat16
    else:
        layers = [sleeping_layer() for _ in range(cell.stages)]
        x, dtype = torch.ones(round(cell.megabytes * 2**20 / 64), 16), torch.float32
    net = PipelineModule(
        layers, num_stages=cell.stages, loss_fn=torch.nn.functional.mse_loss, partition_method="uniform"
    )
    config = {
        "train_micro_batch_size_per_gpu": x.shape[0],
        "gradient_accumulation_steps": cell.micro_batches,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
        "ddg": {"slack": options.slack},
    }
    initialize = ds_ddg.initialize if name == "ddg" else deepspeed.initialize
    engine, *_ = initialize(model=net, config=config, model_parameters=list(net.parameters()))
    return engine, itertools.repeat((x.to(dtype), torch.zeros_like(x, dtype=dtype)))


def block(width: int) -> Any:
    import torch

    return torch.nn.TransformerEncoderLayer(width, HEADS, 4 * width, dropout=0.0, batch_first=True, norm_first=True)


def per_call(engine: Any, data: Iterator[Any], warm_up: int, calls: int) -> float:
    from deepspeed.accelerator import get_accelerator

    for _ in range(warm_up):
        engine.train_batch(data)
    get_accelerator().synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        loss = engine.train_batch(data)
    get_accelerator().synchronize()
    seconds = (time.perf_counter() - start) / calls
    if not loss.isfinite():
        raise ArithmeticError(f"a loss of {float(loss)}: this was no training")
    return seconds


@contextmanager
def staged_p2p() -> Iterator[None]:
    """Inside this block DeepSpeed's messages between stages go by way of host memory."""
    import torch
    from deepspeed.runtime.pipe import p2p

    send, recv = p2p.send, p2p.recv

    def staged_send(tensor: Any, *arguments: Any) -> None:
        send(tensor.cpu(), *arguments)

    def staged_recv(tensor: Any, *arguments: Any) -> None:
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        recv(host, *arguments)
        tensor.copy_(host)

    p2p.send, p2p.recv = staged_send, staged_recv
    try:
        yield
    finally:
        p2p.send, p2p.recv = send, recv


def rows_of(cells: list[Cell], turns: list[list[dict[str, float]]]) -> Iterator[dict[str, Any]]:
    """Yield samples per second, or efficiency, of every turn, by cell and schedule."""
    for i, cell in enumerate(cells):
        for name in turns[0][i]:
            seconds = [turn[i][name] for turn in turns]
            work = cell.micro_batches * (ROWS if cell.megabytes is None else TICK)
            yield {**cell._asdict(), "schedule": name, "turns": [work / s for s in seconds]}


def page(result: dict[str, Any]) -> str:
    """Return the page in Markdown."""
    about = result["about"]
    tables: list[list[list[str]]] = [[], []]
    for row in result["rows"]:
        sleeping, turns = row["megabytes"] is not None, row["turns"]
        form = ".3f" if sleeping else ".1f"
        size = [f"{row['megabytes']:g}"] if sleeping else []
        spread = f"{min(turns):{form}}, {max(turns):{form}}"
        start = [str(row["stages"]), str(row["micro_batches"]), *size, row["schedule"]]
        tables[sleeping].append([*start, f"{median(turns):{form}}", spread])
    transformer = ["K", "M", "schedule", "samples/s", "lowest, highest"]
    sleeping = ["K", "M", "MB", "schedule", "efficiency", "lowest, highest"]
    where = "each stage has one" if about["own_device"] else "all stages share one"
    return (
        f"Written by `{about['command']}` on {about['device']} ({where}), {about['cores']} cores, torch "
        f"{about['torch']}, DeepSpeed {about['deepspeed']}; turns: {len(result['rows'][0]['turns'])}.\n\n"
        f"{about['layers']} transformer blocks of width {about['width']} in bf16, micro-batches of {ROWS} x {LENGTH}:"
        f"\n\n{table(transformer, tables[0])}\n\n"
        f"Sleeping stages, by megabytes of a message:\n\n{table(sleeping, tables[1])}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument(
        "--megabytes", type=float, nargs="*", default=[0.001, 1, 16], help="of a sleeping stage's output"
    )
    parser.add_argument("--layers", type=int, default=8, help="transformer blocks, shared out over the stages")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--slack", type=int, default=0, help='of DDG, as in "ddg": {"slack": ...}')
    parser.add_argument("--calls", type=int, default=20, help="timed calls of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON; the page is beside it")
    options = parser.parse_args()
    os.environ.update(DS_ACCELERATOR=options.device, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    os.environ.setdefault("LOG_LEVEL", "ERROR")
    import torch

    gpus = torch.cuda.device_count() if options.device == "cuda" else 0
    if options.device == "cuda" and not gpus:
        parser.error("there is no GPU here; --device cpu tries the script without one")
    options.own_device = gpus >= max(options.stages)
    plan = [
        [Cell(k, m, size) for size in (None, *options.megabytes) for m in options.micro_batches]
        for k in (1, *options.stages)
    ]
    told = {key: getattr(options, key) for key in ("own_device", "layers", "width", "calls")}
    about: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), **told, **machine()}
    turns: list[list[dict[str, float]]] = []
    for _ in tqdm(range(options.turns), unit="turn"):
        turn = []
        for cells in plan:
            by_rank = run_ranks(rank_main, cells[0].stages, options, cells)
            about["device"] = by_rank[0][0]
            turn += [
                {name: max(found[i][name] for _, found in by_rank) for name in by_rank[0][1][i]}
                for i in range(len(cells))
            ]
        turns.append(turn)
        result = {"about": about, "rows": list(rows_of(list(itertools.chain(*plan)), turns))}
        save(result, options.out)
    print(page(result))


def save(result: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text("# On GPUs\n\n" + page(result), encoding="utf-8")


if __name__ == "__main__":
    main()
