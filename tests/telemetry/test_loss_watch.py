"""What counts as a loss that rises."""

from __future__ import annotations

import logging
import math
import random

import pytest
from deepspeed.utils import logger

from ds_ddg.telemetry.loss_watch import LossWatch
from helpers import toy
from helpers.distributed import GetRanks

pytestmark = pytest.mark.usefixtures("one_thread")


def said(losses: list[float]) -> list[tuple[int, str]]:
    watch = LossWatch()
    return [(i, line) for i, loss in enumerate(losses) if (line := watch.add(loss))]


def falling(count: int, start: float = 4.0, end: float = 1.0) -> list[float]:
    return [end + (start - end) * math.exp(-4 * i / count) for i in range(count)]


def test_a_loss_that_comes_up_again_is_told_once() -> None:
    losses = [*falling(60), *(1.0 + 0.1 * i for i in range(60))]
    ((call, line),) = said(losses)
    assert 70 < call < 90
    assert line.startswith("the loss rises: ")
    assert "was down at 1." in line


def test_a_loss_that_only_rises_is_told() -> None:
    assert len(said([2.3 + 0.02 * i for i in range(60)])) == 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.05, 0.3, 1.0])
def test_noise_is_no_rise(seed: int, noise: float) -> None:
    """However large, at the start, on the way down and on the spot."""
    draw = random.Random(seed)
    assert said([loss + draw.gauss(0, noise) for loss in [*falling(500), *[1.0] * 2000]]) == []


def test_one_bad_batch_is_no_rise() -> None:
    losses = falling(200)
    losses[150] = 20.0
    assert said(losses) == []


def test_what_is_not_finite_is_told_at_once() -> None:
    assert said([2.0, math.nan, 2.0, math.inf]) == [(1, "the loss is nan")]


def test_after_forget_another_training_begins() -> None:
    watch = LossWatch()
    for loss in [1.0] * 40:
        watch.add(loss)
    watch.forget()
    assert [line for line in map(watch.add, [5.0] * 60) if line] == []


def warnings(rank: int, world_size: int, learning_rate: float) -> list[str]:
    """Return what an engine with K = `world_size` and M = 1 warns of in 60 calls at a learning rate."""
    engine = toy.engine(world_size, 1, optimizer="sgd", ddg={})
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    logger.addHandler(handler := toy.Lines(logging.WARNING))
    try:
        data = toy.batches(60)
        for _ in range(60):
            engine.train_batch(data)
    finally:
        logger.removeHandler(handler)
        engine.drain()
    return [line for line in handler.lines if "may diverge" in line]


def test_engine_says_it_once_and_what_to_set(ranks: GetRanks) -> None:
    first, *others = ranks(3).run(warnings, 3.0)
    (line,) = first
    assert line.startswith("call ")
    assert "the loss rises: " in line or "the loss is " in line
    assert "gradients up to 2 update(s) old" in line
    assert '"gradient_accumulation_steps": 2 or more' in line
    assert '"ddg": {"staleness": "auto"}' in line
    assert others == [[], []]
    assert ranks(3).run(warnings, 0.001) == [[], [], []]
