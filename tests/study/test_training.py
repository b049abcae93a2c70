"""A run of a study: its weights are those of the oracle, and what went wrong is said."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_ddg.reference import Reference
from ds_ddg.study.problem import Problem
from ds_ddg.study.training import train

CALLS = 9


def batches(micro_batches: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 6, generator=generator)
        yield from zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True)


def problem(clip: float = 0.0) -> Problem:
    torch.manual_seed(1)
    return Problem(
        layers=[nn.Linear(6, 6) for _ in range(4)],
        loss_fn=nn.functional.mse_loss,
        batches=batches,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        calls=CALLS,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5),
        clip=clip,
    )


# The oracle of a stage whose first gradient has not come steps its scheduler first.
@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize(("stages", "micro_batches", "clip"), [(1, 1, 0.0), (2, 1, 0.0), (4, 1, 0.05), (4, 2, 0.0)])
def test_a_run_trains_as_the_oracle_does(stages: int, micro_batches: int, clip: float) -> None:
    mine = problem(clip)
    result = train(mine, stages, micro_batches)
    other = list(problem().layers)
    parts = [nn.Sequential(*other[4 // stages * k : 4 // stages * (k + 1)]) for k in range(stages)]
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in parts]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5) for optimizer in optimizers]
    reference = Reference(
        parts, nn.functional.mse_loss, optimizers, micro_batches=micro_batches, clip=clip, schedulers=schedulers
    )
    data = batches(micro_batches)
    losses = [float(reference.train_batch(data)) for _ in range(CALLS)]
    assert result["train_loss"] == pytest.approx(losses[-1], rel=1e-6)
    for layer, same in zip(mine.layers, other, strict=True):
        assert torch.equal(layer.weight, same.weight)  # type: ignore[arg-type]


def test_a_factor_of_the_learning_rate() -> None:
    slow, fast = problem(), problem()
    train(slow, 2, 1, learning_rate=0.5)
    train(replace(fast, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)), 2, 1)
    assert torch.equal(slow.layers[0].weight, fast.layers[0].weight)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    def loss_fn(outputs: Any, labels: Any) -> Tensor:
        return nn.functional.mse_loss(outputs, labels) * math.inf

    result = train(replace(problem(), loss_fn=loss_fn), 2, 1)
    assert result["diverged"] == 0
    assert "train_loss" not in result


def test_evaluation_is_of_the_trained_model() -> None:
    seen: list[bool] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append(model.training or torch.is_grad_enabled())
        return {"size": float(sum(p.numel() for p in model.parameters()))}

    assert train(replace(problem(), evaluate=evaluate), 1, 1)["size"] == 4 * 42
    assert seen == [False]
