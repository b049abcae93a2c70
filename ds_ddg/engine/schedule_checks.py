"""Refuses schedules that a project's engine executes in the wrong place, by name and with what to do instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.pipe.schedule import TrainSchedule

__all__ = ["Call", "refuse_other_schedule", "refuse_outside_call"]


@dataclass
class Call:
    """How far the present call of the script has come."""

    what: str
    """The method, "train_batch" or "eval_batch"."""
    begun: bool = False
    executed: bool = False


def refuse_outside_call(engine_name: str, asked: Any, call: Call | None) -> Call:
    """Return `call`, or raise RuntimeError for a schedule that is executed where no call expects one.

    Args:
        engine_name: what errors call the engine.
        asked: the schedule.
        call: the present call; None: there is none.
    """
    what = "train_batch" if torch.is_grad_enabled() else "eval_batch"
    if call is not None and call.what == what and not call.executed:
        return call
    raise RuntimeError(
        f"{engine_name} executes a {type(asked).__name__}, with gradients "
        f"{'on' if torch.is_grad_enabled() else 'off'}, "
        + ("outside a call" if call is None else f"in {call.what}" + " once more" * call.executed)
        + "; a training schedule is executed once in each train_batch, an inference schedule in each "
        "eval_batch (an engine that derives from DDG's own has to call their super())"
    )


def refuse_other_schedule(engine_name: str, asked: Any, micro_batches: int) -> None:
    """Raise RuntimeError for a schedule whose place the delayed one cannot take.

    Args:
        engine_name: what errors call the engine.
        asked: the schedule.
        micro_batches: M, micro-batches per call.
    """
    if type(asked) is not TrainSchedule:
        raise RuntimeError(
            f"{engine_name} executes a {type(asked).__name__}; the delayed schedule takes the place of "
            'DeepSpeed\'s TrainSchedule alone ("ddg": {"enabled": false} runs others)'
        )
    if asked.micro_batches != micro_batches:
        raise RuntimeError(
            f"{engine_name} trains on {asked.micro_batches} micro-batches, and gradient_accumulation_steps is "
            f"{micro_batches}; call set_train_batch_size on every rank before"
        )
