"""Jobs on ranks that are fresh processes, as DeepSpeed picks its accelerator once in a process.

    launch(job, 2, *args)                  two stages that share one GPU over gloo
    launch(job, 2, *args, device="cpu")    the same on CPU, to compare with

Without a GPU, all but the kernels can be tried: `DS_DDG_TEST_DEVICE=cpu python -m pytest tests/gpu`.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from helpers.paths import ROOT, TESTS

DEVICE = os.environ.get("DS_DDG_TEST_DEVICE", "cuda")
TIMEOUT = 500.0


def launch(
    job: Callable[..., Any],
    world_size: int,
    *args: Any,
    device: str = DEVICE,
    backend: str = "gloo",
    dying: Collection[int] = (),
) -> list[Any]:
    """Run `job(rank, world_size, *args)` in processes of its own on one device; return the results, on the CPU.

    A rank that fails or hangs fails the test with all that it printed, but ranks in `dying` may end as they like once
    they have returned.
    """
    with tempfile.TemporaryDirectory(prefix="ds_ddg_gpu_") as name:
        directory = Path(name)
        (directory / "job").write_bytes(pickle.dumps((job, world_size, args, backend)))
        processes = []
        for rank in range(world_size):
            with (directory / f"log{rank}").open("w") as log:
                command = [sys.executable, "-c", f"from helpers import devices; devices.serve({name!r}, {rank})"]
                environment = environment_of(rank, world_size, device, backend)
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + TIMEOUT
        try:
            for process in processes:
                process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass  # whoever hangs shows below
        for process in processes:
            process.kill()
            process.wait()
        results = [directory / f"result{rank}" for rank in range(world_size)]
        failed = [r for r, p in enumerate(processes) if (p.returncode and r not in dying) or not results[r].exists()]
        if failed:
            logs = [f"rank {r}: {(directory / f'log{r}').read_text()[-4000:]}" for r in range(world_size)]
            raise AssertionError(f"{job.__name__} failed on {device}, rank {failed}\n" + "\n".join(logs))
        # Written by ourselves a moment ago.
        return [torch.load(result, map_location="cpu", weights_only=False) for result in results]


def environment_of(rank: int, world_size: int, device: str, backend: str) -> dict[str, str]:
    paths = [str(ROOT), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    more = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "DS_ACCELERATOR": device,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "RANK": str(rank),
        # DeepSpeed computes on the device of this number: with gloo all ranks share one.
        "LOCAL_RANK": str(rank if backend == "nccl" else 0),
        "WORLD_SIZE": str(world_size),
        **more,
    }


def serve(name: str, rank: int) -> None:
    """Run the jobs on a rank."""
    import deepspeed

    directory = Path(name)
    job, world_size, args, backend = pickle.loads((directory / "job").read_bytes())
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = f"file://{directory / 'store'}"
    torch.distributed.init_process_group(backend, init_method=store, rank=rank, world_size=world_size)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend)
    result = job(rank, world_size, *args)
    # Under its name only when it is whole.
    torch.save(result, directory / f"part{rank}")
    (directory / f"part{rank}").rename(directory / f"result{rank}")


def device() -> torch.device:
    """Return the device of this rank."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


needs_kernels = pytest.mark.skipif(DEVICE == "cpu", reason="about the device itself")


@contextmanager
def random_state_of_the_device() -> Iterator[None]:
    """Inside this block torch's state of the random numbers is that of the device, from which dropout takes them."""
    if device().type == "cpu":
        yield
        return
    with (
        mock.patch.object(torch, "get_rng_state", torch.cuda.get_rng_state),
        mock.patch.object(torch, "set_rng_state", torch.cuda.set_rng_state),
    ):
        yield
