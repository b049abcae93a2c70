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

import os
import pickle
import tempfile
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

from helpers.outcomes import Outcome, RanksFailedError
from helpers.rank_process import GRACE, LINGER
from helpers.rank_worker import Worker, fork_server

T = TypeVar("T")

TIMEOUT = 120.0
THREADS = 80
"""Threads of a process above which no more calls go to it. Each engine leaves those of its groups, which wake a
hundred times a second, and so slow down everything else that runs."""


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
        self._workers: list[Worker] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._num_calls = 0

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
            if max(len(os.listdir(f"/proc/{worker.pid}/task")) for worker in self._workers) > THREADS:
                self.close()
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
        context = fork_server()
        for rank in range(self.world_size):
            self._workers.append(Worker(context, rank, self.world_size, Path(self._directory.name)))

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
