"""One process for each stage, as a launcher starts them, from a server that has imported the slow things already."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import tempfile
from collections.abc import Callable
from typing import Any


def run_ranks(target: Callable[..., None], count: int, *arguments: Any) -> list[Any]:
    """Return what `count` processes of ``target(rank, count, *arguments, store, results)`` put into `results`.

    Args:
        target: a function of a module; `store` is the file for ``init_process_group``'s rendezvous, `results` a queue.
        count: number of ranks.
        *arguments: arguments for `target`.
    """
    # A process that has asked for GPUs cannot be forked.
    context: Any = multiprocessing.get_context("spawn" if os.environ["DS_ACCELERATOR"] == "cuda" else "forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "deepspeed", "deepspeed.runtime.pipe.engine"])
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=target, args=(rank, count, *arguments, f"{folder}/store", results), daemon=True)
            for rank in range(count)
        ]
        for process in ranks:
            process.start()
        multiprocessing.connection.wait([process.sentinel for process in ranks])
        measured = [results.get(timeout=60) for _ in ranks]
        for process in ranks:
            process.join()
    return measured


def join(rank: int, count: int, store: str, backend: str = "gloo", device: int | None = None) -> None:
    """Prepare such a process: one thread, process groups, and DeepSpeed on top, on the GPU of number `device`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank if device is None else device), WORLD_SIZE=str(count))
    import deepspeed
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=count)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for a minute, for inference only
    deepspeed.init_distributed(backend)
