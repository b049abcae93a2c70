"""What delay does to a stage, measured on the side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_ddg.telemetry import delay_effects
from ds_ddg.telemetry.delay_effects import DelayEffects, LateNumber
from ds_ddg.weights.versions import WeightVersions
from helpers import toy
from helpers.distributed import GetRanks
from helpers.monitors import recorded

pytestmark = pytest.mark.usefixtures("one_thread")

GRADIENTS = torch.randn(8, 3, 2, generator=torch.Generator().manual_seed(0))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm()))


def end_calls(effects: DelayEffects) -> None:
    """End as many calls as there are from one sample to the next."""
    for _ in range(10):
        effects.end_call()


def samples(delay: int, weight: nn.Parameter, backward: Callable[[Tensor], Any]) -> list[tuple[Any, ...]]:
    """Return the two cosines after each of the backward passes of `GRADIENTS`, with a call's end before the first."""
    effects = DelayEffects(lambda: WeightVersions([weight]), lambda: delay)
    end_calls(effects)
    found = []
    for gradient in GRADIENTS:
        with effects.backward():
            backward(gradient)
        found.append(effects.values[1:])
    return found


@pytest.mark.parametrize("delay", [1, 2, 5])
def test_compares_a_gradient_with_its_fresh_one(delay: int) -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    found = samples(delay, weight, lambda gradient: (weight * gradient).sum().backward())
    fresh, following = cosine(GRADIENTS[0], GRADIENTS[delay]), cosine(GRADIENTS[0], GRADIENTS[1])
    assert found[0] == (None, None)
    for after, (now, next_one) in enumerate(found[1:], 1):
        assert next_one == pytest.approx(following)
        assert now == (None if after < delay else pytest.approx(fresh))
    assert torch.equal(weight.grad, sum(GRADIENTS)), "looking on changed the training"
    assert not weight._backward_hooks, "hooks were left behind"


def test_adds_the_parts_that_checkpointing_finds() -> None:
    """Each segment that runs again finds its part of the gradient of a weight that both use."""
    weight = nn.Parameter(torch.ones(3, 2))
    one = torch.ones(3, 2, requires_grad=True)

    def backward(gradient: Tensor) -> None:
        first = checkpoint(lambda x: x * weight, one, use_reentrant=True)
        (checkpoint(lambda x: x * weight, first, use_reentrant=True) * gradient).sum().backward()

    found = samples(1, weight, backward)
    assert found[-1] == (pytest.approx(cosine(GRADIENTS[0], GRADIENTS[1])),) * 2


def test_sparse_gradients_are_passed_over() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    found = samples(2, table.weight, lambda _: table(torch.tensor([1, 3])).sum().backward())
    assert set(found) == {(None, None)}


def test_nothing_is_looked_at_between_two_samples() -> None:
    weight = nn.Parameter(torch.ones(2))
    effects = DelayEffects(lambda: WeightVersions([weight]), lambda: 1)
    sampled = []
    for _ in range(24):
        with effects.backward():
            sampled.append(bool(weight._backward_hooks))
            weight.sum().backward()
        effects.end_call()
    assert [i for i, looked in enumerate(sampled) if looked] == [10, 11, 20, 21]


def test_without_delay_there_is_nothing_to_see() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    assert set(samples(0, weight, lambda gradient: (weight * gradient).sum().backward())) == {(None, None)}


def test_frozen_weights_and_many_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delay_effects, "_SAMPLED", 4)
    weights = [nn.Parameter(torch.ones(2)) for _ in range(6)]
    weights[1].requires_grad_(False)
    effects = DelayEffects(lambda: WeightVersions(weights), lambda: 1)
    end_calls(effects)
    with effects.backward():
        looked = [i for i, weight in enumerate(weights) if weight._backward_hooks]
        torch.cat(weights).sum().backward()
    assert looked == [0, 4], "each third one of those that are trained"


def test_drift_is_from_the_weights_of_the_oldest() -> None:
    weight, frozen = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([9.0]), requires_grad=False)
    versions = WeightVersions([weight, frozen])
    assert versions.drift() is None
    for key, step in enumerate(([1.0, 0.0], [0.0, 2.0])):
        versions.remember(key)
        with versions.updating():
            weight.data.sub_(torch.tensor(step))
    newest = torch.tensor([2.0, 2.0])
    assert float(versions.drift()) == pytest.approx(float(torch.tensor([1.0, 2.0]).norm() / newest.norm()))
    versions.forget(0)
    assert float(versions.drift()) == pytest.approx(float(torch.tensor([0.0, 2.0]).norm() / newest.norm()))
    versions.forget(1)
    assert versions.drift() is None


def test_a_number_that_is_not_finite_is_not_known() -> None:
    number = LateNumber()
    assert number.get() is None
    number.set(torch.tensor(0.5))
    assert number.get() == 0.5
    number.set(torch.tensor(float("nan")))
    assert number.get() is None


# -- in the engine ----------------------------------------------------------------------------------------------------

CALLS = 14


def layers() -> list[nn.Module]:
    torch.manual_seed(5)
    return [nn.Flatten(1), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5)]


def train(rank: int, world_size: int, micro_batches: int, directory: str) -> list[dict[str, Any]]:
    import ds_ddg

    net = PipelineModule(layers(), num_stages=world_size, loss_fn=toy.loss_fn, partition_method="uniform")
    engine, *_ = ds_ddg.initialize(
        model=net,
        config=toy.config(
            micro_batches,
            {},
            steps_per_print=None,
            csv_monitor={"enabled": True, "output_path": directory, "job_name": "job"},
        ),
        optimizer=toy.OPTIMIZERS["sgd"],
        model_parameters=net.parameters(),
    )
    data, found = toy.batches(CALLS * micro_batches), []
    for _ in range(CALLS):
        engine.train_batch(data)
        found.append(engine.ddg_stats())
    engine.drain()
    return [*found, engine.ddg_stats()]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_engine_finds_what_an_ordinary_loop_finds(ranks: GetRanks, tmp_path: Path, micro_batches: int) -> None:
    """On stage 0 of 3: the weights of a loop with late gradients, and the gradients themselves; a monitor sees it."""
    import ds_ddg

    stages = ranks(3).run(train, micro_batches, str(tmp_path))
    net = nn.Sequential(*layers())
    optimizer = toy.OPTIMIZERS["sgd"](net.parameters())
    ds_ddg.delayed(optimizer, [net[:2], net[2:4], net[4:]], micro_batches=micro_batches)
    weights, gradients, seen = list(net[1].parameters()), [], []
    for inputs, labels in toy.batches(CALLS * micro_batches):
        seen.append([w.detach().clone() for w in weights])
        optimizer.zero_grad() if len(seen) % micro_batches == 1 % micro_batches else None
        before = [None if w.grad is None else w.grad.clone() for w in weights]
        (toy.loss_fn(net(inputs), labels) / micro_batches).backward()
        if weights[0].grad is not None:
            pairs = zip(weights, before, strict=True)
            gradients.append(torch.cat([(w.grad - (0 if b is None else b)).flatten() for w, b in pairs]))
        optimizer.step() if len(seen) % micro_batches == 0 else None

    def flat(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.flatten() for part in parts])

    delay = 2
    # The sample begins with the first backward of call 10, as the first is call 0.
    first = 10 * micro_batches - delay
    fresh, following = (cosine(gradients[first], gradients[first + n]) for n in (delay, 1))
    assert stages[0][-2]["gradient_cosine"] == pytest.approx(fresh, abs=1e-5)
    assert stages[0][-2]["gradient_cosine_next"] == pytest.approx(following, abs=1e-5)
    old, new = (flat(seen[10 * micro_batches - ago]) for ago in (delay, 0))
    assert stages[0][9]["weight_drift"] == pytest.approx(float((new - old).norm() / new.norm()), rel=1e-4)
    for stage, found in enumerate(stages):
        names = delay_effects.EFFECTS
        assert all((found[-2][name] is None) == (stage == 2) for name in names)
        assert all(found[-1][name] is None for name in names), "a drained pipeline has no delay"
    shown = recorded(tmp_path)
    assert shown["Train_DDG_stage0_gradient_cosine"][-1][1] == pytest.approx(fresh, abs=1e-5)
    assert not any(f"Train_DDG_stage2_{name}" in shown for name in delay_effects.EFFECTS)
