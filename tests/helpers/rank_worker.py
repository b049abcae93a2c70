"""The parent's side of a rank: its process, its pipe, its log."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

from helpers.outcomes import Outcome
from helpers.rank_process import ENVIRONMENT, LINGER, serve

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


class Worker:
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
            target=serve, args=(remote, rank, world_size, str(self._log_path)), name=f"rank{rank}"
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


def fork_server() -> multiprocessing.context.ForkServerContext:
    """Return the context whose processes are forked from one that has imported what takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with _environment(ENVIRONMENT):
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
