"""Run a function on several gloo ranks of this machine and bring back what every rank returned.

    results = spawn(fn, 4, *args)                    # fresh processes: fn(rank, 4, *args) on each
    results = Ranks(4).run(fn, *args)                # the same on processes that stay for the next call

`fn` is a module-level function of an importable module (helpers and test modules are); arguments and return values are
pickled. When it starts, `torch.distributed` (gloo, file rendezvous) and `deepspeed.comm` are initialized and the seeds
are set.

    parent                    fork server                 rank 0 .. world_size-1
      | start  ----------------->| imports torch and         |
      |                          | deepspeed once, forks --->| waits for a job
      | job  ---------------------------------------------->| new process group, fn(...)
      |<----------------------------------------- report ---| stays until everyone has reported
      | next job, or release ------------------------------>|

The fork server is what makes fresh processes cheap: importing DeepSpeed takes seconds, forking does not.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

T = TypeVar("T")

TIMEOUT = 120.0
GRACE = 10.0
LINGER = 1.0
CALLS = 25
"""Calls that the same processes serve. Each engine leaves its groups' threads, which wake a hundred times a second."""
LOG_TAIL = 6000
_PRELOAD = [
    "numpy",
    "pytest",
    "torch",
    "deepspeed",
    "deepspeed.runtime.pipe.engine",
    "deepspeed.module_inject.auto_ep_layer",
    "torch._dynamo",
]
# Without `MASTER_*` DeepSpeed looks for an MPI job.
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Outcome:
    """The end of one rank."""

    rank: int
    state: Literal["returned", "raised", "died", "hung"]
    """`died`: the process ended without a word; `hung`: it had to be killed."""
    value: Any = None
    exc_type: str = ""
    message: str = ""
    traceback: str = ""
    exit_code: int | None = None
    """Exit code of the process: None while it is alive; negative for a signal."""
    log: str = ""
    """The end of what the rank wrote to stdout and stderr; of a hung rank, also where each thread was."""

    @property
    def failed(self) -> bool:
        return self.state != "returned"

    def __str__(self) -> str:
        head = f"rank {self.rank} {self.state}"
        if self.exc_type:
            head += f" {self.exc_type}: {self.message}"
        if self.exit_code is not None:
            head += f" (exit code {self.exit_code})"
        if not self.failed:
            return head
        output = self.log and f"-- output --\n{self.log}"
        return "\n".join(part.rstrip() for part in (head, self.traceback, output) if part)


class RanksFailedError(AssertionError):
    """At least one rank did not return; `outcomes` holds all of them, by rank."""

    def __init__(self, what: str, outcomes: list[Outcome], first: int) -> None:
        self.outcomes = outcomes
        self.first = first
        ordered = sorted(outcomes, key=lambda outcome: outcome.rank != first)
        rule = "\n" + "=" * 40 + "\n"
        super().__init__(f"{what}, rank {first} first" + rule + rule.join(str(outcome) for outcome in ordered))


@overload
def spawn(
    fn: Callable[..., T],
    world_size: int,
    *args: Any,
    timeout: float = ...,
    grace: float = ...,
    expect_failure: Literal[False] = False,
) -> list[T]: ...
@overload
def spawn(
    fn: Callable[..., T],
    world_size: int,
    *args: Any,
    timeout: float = ...,
    grace: float = ...,
    expect_failure: Literal[True],
) -> list[Outcome]: ...
def spawn(
    fn: Callable[..., T],
    world_size: int,
    *args: Any,
    timeout: float = TIMEOUT,
    grace: float = GRACE,
    expect_failure: bool = False,
) -> list[T] | list[Outcome]:
    """Do as `Ranks.run` on processes that live for this one call."""
    __tracebackhide__ = True
    with Ranks(world_size) as ranks:
        if expect_failure:
            return ranks.run(fn, *args, timeout=timeout, grace=grace, expect_failure=True)
        return ranks.run(fn, *args, timeout=timeout, grace=grace)


class Ranks:
    """`world_size` processes that serve one call after another, started at the first call.

    Every call has a process group of its own, but shares the processes, and so module globals, with the calls before
    it; use `spawn` where that matters. A call in which a rank fails ends all processes: the next one starts new ones.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[_Worker] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._num_calls = 0
        self._first_call = 0
        """The first call of the present processes."""

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids by rank; empty before the first call and after a failed one."""
        return [worker.pid for worker in self._workers]

    @overload
    def run(
        self,
        fn: Callable[..., T],
        *args: Any,
        timeout: float = ...,
        grace: float = ...,
        expect_failure: Literal[False] = False,
    ) -> list[T]: ...
    @overload
    def run(
        self,
        fn: Callable[..., T],
        *args: Any,
        timeout: float = ...,
        grace: float = ...,
        expect_failure: Literal[True],
    ) -> list[Outcome]: ...
    def run(
        self,
        fn: Callable[..., T],
        *args: Any,
        timeout: float = TIMEOUT,
        grace: float = GRACE,
        expect_failure: bool = False,
    ) -> list[T] | list[Outcome]:
        """Call `fn(rank, world_size, *args)` on every rank and return the results by rank.

        After `timeout` seconds, or `grace` seconds after the first failure, ranks that are still busy are killed. On a
        failure this raises `RanksFailedError`; with `expect_failure` it returns every rank's `Outcome`, and raises if
        all ranks returned.
        """
        __tracebackhide__ = True
        job = pickle.dumps((fn, args))
        if self._num_calls - self._first_call >= CALLS:
            self.close()
        try:
            self._start()
            outcomes, first = self._call(job, timeout, grace)
        except BaseException:
            self._kill()
            raise
        what = f"{fn.__module__}.{fn.__qualname__} failed on {self.world_size} ranks"
        if first is None:
            if expect_failure:
                raise AssertionError(f"{what.replace('failed', 'was expected to fail')}, but every rank returned")
            return [outcome.value for outcome in outcomes]
        if expect_failure:
            return outcomes
        raise RanksFailedError(what, outcomes, first)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.release()
        deadline = time.monotonic() + LINGER
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
        self._kill()

    def _start(self) -> None:
        if self._workers:
            return
        self._directory = tempfile.TemporaryDirectory(prefix="ds_ddg_ranks_")
        self._first_call = self._num_calls
        context = _fork_server()
        for rank in range(self.world_size):
            self._workers.append(_Worker(context, rank, self.world_size, Path(self._directory.name)))

    def _kill(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def _call(self, job: bytes, timeout: float, grace: float) -> tuple[list[Outcome], int | None]:
        assert self._directory is not None
        self._num_calls += 1
        rendezvous = str(Path(self._directory.name) / f"rendezvous{self._num_calls}")
        for worker in self._workers:
            worker.send(job, rendezvous, timeout)

        outcomes: dict[int, Outcome] = {}
        first: int | None = None
        deadline = time.monotonic() + timeout
        while len(outcomes) < self.world_size:
            busy = [worker for worker in self._workers if worker.rank not in outcomes]
            ready = connection.wait([worker.pipe for worker in busy], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for worker in busy:
                if worker.pipe in ready:
                    outcome = outcomes[worker.rank] = worker.receive()
                    if outcome.failed and first is None:
                        first = worker.rank
                        deadline = min(deadline, time.monotonic() + grace)

        hung = [worker for worker in self._workers if worker.rank not in outcomes]
        for worker in hung:
            worker.dump_stacks()
        for worker in hung:
            worker.wait_for_stacks()
            outcomes[worker.rank] = Outcome(worker.rank, "hung")
            if first is None:
                first = worker.rank
        if first is None:
            return [outcomes[rank] for rank in range(self.world_size)], None

        logs = [worker.log() for worker in self._workers]
        for worker in hung:
            worker.kill()
        workers = self._workers
        # Released together, so that a rank that returned ends normally instead of losing its peers.
        for worker in workers:
            worker.release()
        exit_codes = [worker.exit_code(within=2 * LINGER) for worker in workers]
        self._kill()
        return [
            Outcome(**{**vars(outcomes[rank]), "exit_code": exit_codes[rank], "log": logs[rank]})
            for rank in range(self.world_size)
        ], first


GetRanks = Callable[[int], Ranks]
"""The type of the fixture `ranks`."""


class _Worker:
    """The parent's side of one rank."""

    def __init__(
        self, context: multiprocessing.context.ForkServerContext, rank: int, world_size: int, directory: Path
    ) -> None:
        self.rank = rank
        self.pipe, remote = context.Pipe()
        self._log_path = directory / f"rank{rank}.log"
        self._log_path.touch()
        self._log_start = 0
        self._size_before_dump = 0
        self.process = context.Process(
            target=_serve, args=(remote, rank, world_size, str(self._log_path)), name=f"rank{rank}"
        )
        self.process.start()
        # The rank holds the only other end now, so its death shows here as the end of the file.
        remote.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def send(self, job: bytes, rendezvous: str, timeout: float) -> None:
        self._log_start = self._log_path.stat().st_size
        with contextlib.suppress(BrokenPipeError):  # a rank that died while idle shows up in `receive`
            self.pipe.send_bytes(pickle.dumps((job, rendezvous, timeout)))

    def receive(self) -> Outcome:
        try:
            return Outcome(self.rank, **pickle.loads(self.pipe.recv_bytes()))
        except (EOFError, ConnectionResetError):
            return Outcome(self.rank, "died")

    def dump_stacks(self) -> None:
        self._size_before_dump = self._log_path.stat().st_size
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)

    def wait_for_stacks(self) -> None:
        deadline = time.monotonic() + LINGER
        while self._log_path.stat().st_size == self._size_before_dump and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.05)  # the dump is written line by line

    def log(self) -> str:
        with self._log_path.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")[-LOG_TAIL:]

    def release(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(b"")

    def exit_code(self, within: float) -> int | None:
        self.process.join(within)
        if self.process.is_alive():
            self.kill()
        return self.process.exitcode

    def kill(self) -> None:
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


def _fork_server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with _environment(_ENVIRONMENT):
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# From here on: what runs on the ranks.


def _serve(pipe: Connection, rank: int, world_size: int, log_path: str) -> None:
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    os.environ.update(_ENVIRONMENT, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
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
