"""A rank records its training calls where ``"ddg": {"trace": DIR}`` asks for it; ``ds-ddg trace`` reads that.

The operations of a call are instructions, which are wrapped for the time of that call (``recorder.py`` makes records
of them). Instructions also appear by name in a torch profile, while one is being taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.pipe import schedule as instructions

from ds_ddg.host import Host
from ds_ddg.instructions import DDGSchedule, UpdateWeights
from ds_ddg.schedules.plan import BACKWARD, FORWARD, UPDATE
from ds_ddg.stage import RunState
from ds_ddg.telemetry.recorder import Recorder

__all__ = ["TraceWriter"]

_OPERATIONS: dict[type, str] = {
    instructions.ForwardPass: FORWARD,
    instructions.BackwardPass: BACKWARD,
    instructions.OptimizerStep: UPDATE,
    UpdateWeights: UPDATE,
}
_DEEPSPEEDS_WAITS: dict[type, str] = {
    instructions.RecvActivation: "activation",
    instructions.RecvGrad: "gradient",
    instructions.SendActivation: "send",
    instructions.SendGrad: "send",
}
"""The instructions in which DeepSpeed's own schedule waits; in the delayed one the links say what they wait for."""

_Execute = Callable[[Any], None]
"""The method of DeepSpeed's engine that executes a schedule."""


class TraceWriter:
    """Records the training calls of one rank if it is asked to, and names instructions in profiles.

    Args:
        run: the place of the stage in its run.
        host: DeepSpeed's engine, whose instructions are wrapped for the time of a call.
        recorder: makes the records; None: no trace is wanted.
    """

    def __init__(self, run: RunState, host: Host, recorder: Recorder | None) -> None:
        self._run, self._host, self._recorder = run, host, recorder
        self._wrapped_map: tuple[Any, Any] = (None, None)
        """The instructions as wrapped last, behind what they were made from."""

    def close(self) -> None:
        """Write to the disk what has been recorded."""
        if self._recorder is not None:
            self._recorder.end(flush=True)

    def execute(self, execute: _Execute, pipe_schedule: Any) -> None:
        """Have DeepSpeed `execute` a schedule, recorded and named where that is wanted."""
        recorder = self._recorder
        if recorder is None:
            self._execute(execute, pipe_schedule)
        elif not torch.is_grad_enabled():
            with recorder.evaluation():
                self._execute(execute, pipe_schedule)
        else:
            run = self._run
            slack = run.slack if run.delayed else 0
            recorder.under(schedule=run.schedule, micro_batches=run.micro_batches, slack=slack)
            self._execute(execute, pipe_schedule, recorder)
            recorder.end(flush=isinstance(pipe_schedule, DDGSchedule) and pipe_schedule.draining)

    def _execute(self, execute: _Execute, pipe_schedule: Any, recorder: Recorder | None = None) -> None:
        """Have DeepSpeed `execute` a schedule, with wrapped instructions if anybody wants to know of them."""
        profiled = torch._C._autograd._profiler_enabled()
        if recorder is None and not profiled:
            execute(pipe_schedule)
            return
        host = self._host
        own = host._INSTRUCTION_MAP
        key = own, profiled, recorder
        if self._wrapped_map[0] != key:
            waits = {} if self._run.delayed else _DEEPSPEEDS_WAITS
            wrapped = {step: _wrapped(step, run, recorder, waits, profiled) for step, run in own.items()}
            self._wrapped_map = key, wrapped
        host._INSTRUCTION_MAP = self._wrapped_map[1]
        try:
            execute(pipe_schedule)
        finally:
            host._INSTRUCTION_MAP = own


def _wrapped(
    step: type, run: Callable[..., None], recorder: Recorder | None, waits: dict[type, str], profiled: bool
) -> Callable[..., None]:
    """Return the method of an instruction, recorded by `recorder`, and by name in a profile."""
    if recorder is not None and step in _OPERATIONS:
        run = recorder.operation(_OPERATIONS[step], run)
    elif recorder is not None and step in waits:
        run = recorder.waiting(waits[step], run)
    if not profiled:
        return run

    def named(*args: Any, **kwargs: Any) -> None:
        with torch.profiler.record_function(f"ds_ddg.{step.__name__}"):
            run(*args, **kwargs)

    return named
