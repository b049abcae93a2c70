"""One run of a study: an ordinary training loop whose gradients come late."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ds_ddg.study.delayed import delayed
from ds_ddg.study.problem import Problem
from ds_ddg.study.stages import parameters_by_stage
from ds_ddg.weights.stage_groups import clip, square_norm

__all__ = ["train"]

_LAST = 10
"""The part of the calls, one in so many, over which the last training loss is the mean."""


def train(
    problem: Problem, stages: int, micro_batches: int, rules: str | Mapping[str, Any] = "off", learning_rate: float = 1
) -> dict[str, Any]:
    """Train `problem` as on so many stages of a DDG pipeline.

    Args:
        problem: what to train.
        stages: K; 1 is synchronous training.
        micro_batches: M, micro-batches per call.
        rules: as ``"ddg": {"staleness": ...}``.
        learning_rate: a factor of the problem's learning rates.

    Returns:
        "train_loss", the mean over the last tenth of the calls, what the problem's evaluation has measured, and
        "seconds"; or, if a loss was not finite, "diverged", the number of its call from 0, and "seconds".

    Raises:
        ValueError: the layers cannot be divided into so many stages, or the rules are wrong.
    """
    start = time.perf_counter()
    model = nn.Sequential(*problem.layers)
    optimizer = problem.optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] *= learning_rate
    delayed(optimizer, stages, model=model, micro_batches=micro_batches, rules=rules)
    scheduler = problem.scheduler(optimizer) if problem.scheduler else None
    parts = parameters_by_stage(stages, model)
    batches = problem.batches(micro_batches)
    losses: list[float] = []
    model.train()
    for call in range(problem.calls):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(micro_batches):
            inputs, labels = next(batches)
            loss = problem.loss_fn(model(inputs), labels) / micro_batches
            loss.backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            return {"diverged": call, "seconds": time.perf_counter() - start}
        losses.append(total)
        if problem.clip:
            _clip(parts, problem.clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    last = losses[-max(1, len(losses) // _LAST) :]
    model.eval()
    with torch.no_grad():
        measured = dict(problem.evaluate(model)) if problem.evaluate else {}
    return {"train_loss": sum(last) / len(last), **measured, "seconds": time.perf_counter() - start}


@torch.no_grad()
def _clip(stages: list[list[Any]], max_norm: float) -> None:
    """Clip the gradients of each stage by their own norm, as a pipeline does."""
    for parameters in stages:
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            clip(gradients, max_norm, square_norm(gradients).pow(0.5))
