"""What a rank really did and when, written while it trains; ``ds-ddg trace`` reads it.

``"ddg": {"trace": DIR}`` wraps the instructions of each training call, for the time of that call. A record is one
operation of the plan with its start and end, and what the gap before it went to: waiting for an activation, a gradient
or a loss, fetching data, sending, or the training script between two calls. What no name covers is Python. All times
are those of what computes (``clock.py``): on a GPU a gap is the device's, whatever the host did meanwhile.

Instructions also appear by name in a torch profile, while one is being taken.
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
from deepspeed.runtime.pipe import schedule as instructions

from ds_ddg.host import Host
from ds_ddg.instructions import DDGSchedule, UpdateWeights
from ds_ddg.schedules.plan import BACKWARD, FORWARD, UPDATE, Op
from ds_ddg.stage import RunState, Stage
from ds_ddg.telemetry.clock import Clock, HostClock
from ds_ddg.telemetry.jsonl import Log
from ds_ddg.telemetry.stage_metrics import WatchedLinks

__all__ = ["Recorder", "TraceWriter", "start_recorder"]

_OPERATIONS: dict[type, str] = {
    instructions.ForwardPass: FORWARD,
    instructions.BackwardPass: BACKWARD,
    instructions.OptimizerStep: UPDATE,
    UpdateWeights: UPDATE,
}
_WAITS: dict[type, str] = {
    instructions.RecvActivation: "activation",
    instructions.RecvGrad: "gradient",
    instructions.SendActivation: "send",
    instructions.SendGrad: "send",
}
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Recorder:
    """Makes records of the operations of one rank, for a `Log`.

    Args:
        log: where they go.
        stage: this stage.
        clock: of what computes; default: the host's.
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
        # Neither a script's end nor a dropped engine loses the last second.
        multiprocessing.util.Finalize(self, _close, (self._clock, log), exitpriority=5)

    def under(self, **plan: Any) -> None:
        """What follows is done under this plan."""
        if plan != self._plan:
            self._plan, self._changes = plan, self._changes + 1
            what = {**plan, "changes": self._changes}
            self._clock.then(lambda _: self._log.begin("plan", what), "plan")

    def operation(self, kind: str, run: _Function) -> _Function:
        """`run`, recorded. Micro-batches go forward and come back in order, so the kind says which one it is."""

        @functools.wraps(run)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            start: Any = self._clock.now()
            result = run(*args, **kwargs)
            self._clock.then(self._did, kind, start, self._clock.now())
            return result

        return recorded  # type: ignore[return-value]

    def waiting(self, what: str, run: _Function) -> _Function:
        """`run`, its time counted as spent on `what` before the next operation."""

        @functools.wraps(run)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start: Any = self._clock.now()
            try:
                return run(*args, **kwargs)
            finally:
                self._clock.then(self._waited, what, start, self._clock.now())

        return timed  # type: ignore[return-value]

    def beginning(self, run: _Function) -> _Function:
        """`run`, with which a call begins: what has passed since the last one, and has no name, was the script's."""

        @functools.wraps(run)
        def begin(*args: Any, **kwargs: Any) -> Any:
            self._clock.then(self._began, "script", self._clock.now())
            return run(*args, **kwargs)

        return begin  # type: ignore[return-value]

    def end(self, flush: bool) -> None:
        """The operations of a call, or of a drain, are over."""
        self._clock.then(self._ended, "call", self._clock.now())
        self._clock.read(wait=flush)
        if flush:
            self._log.flush()
        else:
            self._log.flush_if_due()

    # What follows is done when its times are known, in the order of what it is about.

    def _waited(self, what: str, start: float, end: float) -> None:
        self._spent[what] = self._spent.get(what, 0.0) + end - start

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


class TraceWriter:
    """Records the training calls of one rank if it is asked to, and names instructions in profiles.

    Args:
        stage: this stage.
        run: where it is in its run.
        host: DeepSpeed's engine, whose instructions are wrapped for the time of a call.
        recorder: makes the records; None: no trace is wanted.
    """

    def __init__(self, stage: Stage, run: RunState, host: Host, recorder: Recorder | None) -> None:
        self._stage, self._run, self._host, self._recorder = stage, run, host, recorder
        self._watched_map: tuple[Any, Any] = (None, None)
        """Instructions wrapped, behind what they were wrapped from and for."""

    def close(self) -> None:
        """What is recorded is on its way to the disk."""
        if self._recorder is not None:
            self._recorder.end(flush=True)

    def execute(self, execute: Callable[[Any], None], pipe_schedule: Any) -> None:
        """Have DeepSpeed `execute` a schedule, recorded and named where that is wanted."""
        recorder = self._recorder if torch.is_grad_enabled() else None
        if recorder is None and not torch._C._autograd._profiler_enabled():
            execute(pipe_schedule)
            return
        if recorder is not None:
            run = self._run
            slack = run.slack if run.delayed else 0
            recorder.under(schedule=run.schedule, micro_batches=run.micro_batches, slack=slack)
        with self._watching(recorder):
            execute(pipe_schedule)
        if recorder is not None:
            recorder.end(flush=isinstance(pipe_schedule, DDGSchedule) and pipe_schedule.draining)

    @contextmanager
    def _watching(self, recorder: Recorder | None) -> Iterator[None]:
        """Inside this block instructions are wrapped."""
        host = self._host
        own = host._INSTRUCTION_MAP
        profiled = torch._C._autograd._profiler_enabled()
        key = own, profiled, recorder
        if self._watched_map[0] != key:
            watched = {step: _watched(step, run, recorder, profiled) for step, run in own.items()}
            self._watched_map = key, watched
        host._INSTRUCTION_MAP = self._watched_map[1]
        try:
            yield
        finally:
            host._INSTRUCTION_MAP = own


def start_recorder(stage: Stage, host: Host, links: WatchedLinks, feed: Any, everyone: Any) -> Recorder | None:
    """Open the trace of this rank, if one is wanted. Collective then.

    Args:
        stage: this stage.
        host: DeepSpeed's engine.
        links: its receives are timed.
        feed: its fetching of data is timed.
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
    recorder = Recorder(log, stage.stage_id, links.clock, **about)
    timed: Any = links
    feed.fetch = recorder.beginning(recorder.waiting("data", feed.fetch))
    timed.begin = recorder.waiting("activation", links.begin)  # a call's first one announces it
    for name in ("next_loss", "share"):
        setattr(links, name, recorder.waiting("loss", getattr(links, name)))
    return recorder


def _watched(step: type, run: Callable[..., None], recorder: Recorder | None, profiled: bool) -> Callable[..., None]:
    """The method of an instruction, recorded and named."""
    if recorder is not None and step in _OPERATIONS:
        run = recorder.operation(_OPERATIONS[step], run)
    elif recorder is not None and step in _WAITS:
        run = recorder.waiting(_WAITS[step], run)
    if not profiled:
        return run

    def named(*args: Any, **kwargs: Any) -> None:
        with torch.profiler.record_function(f"ds_ddg.{step.__name__}"):
            run(*args, **kwargs)

    return named


def _close(clock: Clock, log: Log) -> None:
    """Write what is known, if the device still answers."""
    try:
        clock.read(wait=True)
    finally:
        log.close()


def _machine() -> str:
    """Of processes that share a monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
