"""What runs on a rank: jobs that come through a pipe, each in a process group of its own."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

GRACE = 10.0
LINGER = 1.0
# Without `MASTER_*` DeepSpeed looks for an MPI job.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "OMP_NUM_THREADS": "1",
}


def serve(pipe: Connection, rank: int, world_size: int, log_path: str) -> None:
    """Carry out one job after another, until an empty message or the death of the parent."""
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    os.environ.update(ENVIRONMENT, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    environment = dict(os.environ)
    gc.freeze()  # keeps the collection after every call from walking through all that was imported

    while message := pipe.recv_bytes():
        job, rendezvous, timeout = pickle.loads(message)
        os.environ.clear()
        os.environ.update(environment)
        report = _run(job, rank, world_size, rendezvous, timeout)
        gc.collect()
        pipe.send_bytes(pickle.dumps(report))
        if report["state"] == "raised":
            # As under a launcher, a failed rank goes and its peers notice; but not before those who are about to raise
            # an error of their own have done so.
            pipe.poll(LINGER)
            _exit(1)
    _exit(0)


def _run(job: bytes, rank: int, world_size: int, rendezvous: str, timeout: float) -> dict[str, Any]:
    try:
        _initialize(rank, world_size, rendezvous, timeout)
        fn, args = pickle.loads(job)
        value = fn(rank, world_size, *args)
        pickle.dumps(value)
        return {"state": "returned", "value": value}
    except BaseException as error:
        return {
            "state": "raised",
            "exc_type": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
        }


def _initialize(rank: int, world_size: int, rendezvous: str, timeout: float) -> None:
    import deepspeed
    import numpy
    import torch
    import torch.distributed

    if torch.distributed.is_initialized():
        deepspeed.comm.destroy_process_group()
        deepspeed.comm.comm.cdb = None
    torch.set_num_threads(1)
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    # Longer than the parent's patience: the parent tells where every rank hangs, gloo only that one of them did.
    patience = timedelta(seconds=2 * timeout + GRACE)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=patience
    )
    # DeepSpeed would compile a C++ kernel for `inference_all_reduce`, which training never calls: 45 s on first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", timeout=patience, verbose=False)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _exit(code: int) -> None:
    """Leave without destructors: those of a process group whose peers are gone can block."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
