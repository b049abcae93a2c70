"""A record of one rank is an operation with its start and end, and what the gap before it went to.

A gap went to waiting for an activation, a gradient or a loss, to fetching data, to sending, or to the training script
between two calls. What no name covers is Python. All times are those of the processor that computes (``clock.py``): on
a GPU a gap is the device's, whatever the host did meanwhile.
"""

from __future__ import annotations

import functools
import multiprocessing.util
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from ds_ddg.host import Host
from ds_ddg.schedules.plan import BACKWARD, FORWARD, UPDATE, Op
from ds_ddg.stage import Stage
from ds_ddg.telemetry.clock import Clock, HostClock
from ds_ddg.telemetry.jsonl import Log
from ds_ddg.telemetry.observer import Observer

__all__ = ["Recorder", "start_recorder"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Recorder:
    """Makes records of the operations of one rank, for a `Log`.

    Args:
        log: the file that the records go to.
        stage: the number of this stage.
        clock: the clock of the processor that computes the stage; default: the host's.
        about: what else ``ds-ddg trace`` must know of this rank.
    """

    def __init__(self, log: Log, stage: int, clock: Clock | None = None, **about: Any) -> None:
        self._log, self._stage, self._clock = log, stage, clock or HostClock()
        self._left = time.perf_counter()
        moment = {"wall": time.time(), "monotonic": self._left, "machine": _machine()}
        log.begin("rank", {"stage": stage, **about, **moment})
        self._spent: dict[str, float] = {}
        self._numbers = {FORWARD: 0, BACKWARD: 0}
        self._plan: dict[str, Any] = {}
        self._changes = 0
        self._named = 0.0
        self._evaluates = False
        # Neither a script's end nor a dropped engine loses the last second.
        multiprocessing.util.Finalize(self, _close, (self._clock, log), exitpriority=5)

    def under(self, **plan: Any) -> None:
        """Note that what follows is done under this plan."""
        if plan != self._plan:
            self._plan, self._changes = plan, self._changes + 1
            what = {**plan, "changes": self._changes}
            self._clock.then(lambda _: self._log.begin("plan", what), "plan")

    def operation(self, kind: str, run: _Function) -> _Function:
        """Return `run` with a record of each call; `kind` is "F", "B" or "U".

        Micro-batches go forward and come back in order, so the kind says which one it is.
        """

        @functools.wraps(run)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            start: Any = self._clock.now()
            result = run(*args, **kwargs)
            self._clock.then(self._did, kind, start, self._clock.now())
            return result

        return recorded  # type: ignore[return-value]

    def waiting(self, what: str, run: _Function) -> _Function:
        """Return `run` with its time counted as spent on `what`; for a wait that no `Observer` times."""

        @functools.wraps(run)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start: Any = self._clock.now()
            try:
                return run(*args, **kwargs)
            finally:
                self._clock.then(self.waited, what, start, self._clock.now())

        return timed  # type: ignore[return-value]

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Inside this block waits have no name: an evaluation is part of the script."""
        self._clock.then(lambda _: self._set_evaluates(True), "evaluation")
        try:
            yield
        finally:
            self._clock.then(lambda _: self._set_evaluates(False), "evaluation")

    def end(self, flush: bool) -> None:
        """End the operations of a call, or of a drain.

        Args:
            flush: write them to the disk now, which waits for the device; otherwise they are written within a second.
        """
        self._clock.then(self._ended, "call", self._clock.now())
        self._clock.read(wait=flush)
        if flush:
            self._log.flush()
        else:
            self._log.flush_if_due()

    # What follows is done when its times are known, in the order of what it is about.

    def waited(self, what: str, start: float, end: float) -> None:
        """Count a wait as spent before the next operation; an `Observer` calls this.

        A call begins with fetching its data: what has passed since the last call, and has no name, was the script's.
        """
        if self._evaluates:
            return
        if what == "data":
            self._began("script", start)
        self._spent[what] = self._spent.get(what, 0.0) + end - start

    def _set_evaluates(self, evaluates: bool) -> None:
        self._evaluates = evaluates

    def _began(self, what: str, now: float) -> None:
        self._spent.pop(what, None)  # an evaluation has begun since, and is part of it
        named = sum(self._spent.values()) - self._named
        self._spent[what] = now - self._left - named

    def _ended(self, _: str, now: float) -> None:
        self._left, self._named = now, sum(self._spent.values())

    def _did(self, kind: str, start: float, end: float) -> None:
        number = self._numbers[BACKWARD] - 1 if kind == UPDATE else self._numbers[kind]
        if kind != UPDATE:
            self._numbers[kind] += 1
        # Written out by hand: json.dumps would take as long as all the rest of a record.
        spent = ", ".join(f'"{what}": {seconds:.6f}' for what, seconds in self._spent.items())
        self._log.add(f'["{Op(kind, self._stage, number)}", {start:.6f}, {end:.6f}, {{{spent}}}]')
        self._spent = {}


def start_recorder(stage: Stage, host: Host, observer: Observer, everyone: Any) -> Recorder | None:
    """Open the trace of this rank, if one is wanted. Collective then.

    Args:
        stage: this stage.
        host: DeepSpeed's engine.
        observer: times the waits of this stage.
        everyone: a group of all ranks; None: the default one.

    Raises:
        ValueError: the folder cannot be written.
    """
    folder = stage.config.trace
    if folder is None:
        return None
    run = [time.time_ns()]  # tells this run's files from older ones in the same folder
    torch.distributed.broadcast_object_list(run, src=0, group=everyone)
    place = host.grid.topology().get_coord(stage.rank)._asdict()
    replica, part = place.get("data", 0), place.get("model", 0)
    about = {"run": run[0], "stages": stage.num_stages, "replica": replica, "slice": part}
    try:
        log = Log(Path(folder) / f"stage{stage.stage_id}-replica{replica}-slice{part}")
    except OSError as error:
        raise ValueError(f'"ddg": {{"trace": {folder!r}}} cannot be written: {error}') from error
    recorder = Recorder(log, stage.stage_id, observer.clock, **about)
    observer.subscribe(recorder.waited, "activation", "gradient", "loss", "data", "send")
    return recorder


def _close(clock: Clock, log: Log) -> None:
    """Write what is known, if the device still answers."""
    try:
        clock.read(wait=True)
    finally:
        log.close()


def _machine() -> str:
    """Return a name that is the same for all processes that share a monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
