"""``"clip": "global"``: by the norm of the whole pipeline, against the oracle, and what every rank is told of it."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_ddg.weights.optimizer_wrappers import clipping_by
from helpers import toy
from helpers.census import census
from helpers.distributed import GetRanks
from helpers.modes import DEFAULT, MODES

pytestmark = pytest.mark.usefixtures("one_thread")


CLIP, CALLS, REFILL = 0.05, 10, 4


def train_engine(
    rank: int, world_size: int, micro_batches: int, ddg: dict[str, Any], clip: float
) -> tuple[list[Tensor], list[tuple[int, float | None]], int]:
    """Parameters and buffers; after each call the loss's step and the norm known; collectives across stages."""
    engine = toy.engine(world_size, micro_batches, "sgd", ddg, gradient_clipping=clip)
    data = toy.batches((CALLS + REFILL) * micro_batches)
    norms = []
    for _ in range(CALLS):
        with census() as seen:
            engine.train_batch(data)
        norms.append((engine.loss_step, engine.get_global_grad_norm()))
    engine.drain()
    for _ in range(REFILL):
        engine.train_batch(data)
        norms.append((engine.loss_step, engine.get_global_grad_norm()))
    engine.drain()
    across = sum(count for (_, group), count in seen.items() if len(group) > 1)
    return toy.state(engine.module), norms, across


def train_oracle(
    stages: int, micro_batches: int, ddg: dict[str, Any], clip: float = CLIP
) -> tuple[list[list[Tensor]], list[float]]:
    settings = {**ddg}
    oracle = toy.reference(
        stages, micro_batches=micro_batches, clip=clip, clip_by=settings.pop("clip", "stage"), **settings
    )
    data = toy.batches((CALLS + REFILL) * micro_batches)
    for calls in (CALLS, REFILL):
        for _ in range(calls):
            oracle.train_batch(data)
        oracle.drain()
    return [toy.state(stage) for stage in oracle.stages], oracle.norms


def different(a: list[list[Tensor]], b: list[list[Tensor]]) -> list[int]:
    """Stages that are not equal to the last bit."""
    return [k for k, (x, y) in enumerate(zip(a, b, strict=True)) if not all(map(torch.equal, x, y))]


@pytest.mark.proves('"clip": "global"', modes=("weights", "activations"))
@pytest.mark.parametrize(("weights", "activations"), MODES)
@pytest.mark.parametrize(("stages", "micro_batches", "slack"), [(2, 1, 0), (3, 2, 0), (3, 1, 1)])
def test_equals_the_oracle(
    ranks: GetRanks, stages: int, micro_batches: int, slack: int, weights: str, activations: str
) -> None:
    ddg = {"weights": weights, "activations": activations, "slack": slack, "clip": "global"}
    got = ranks(stages).run(train_engine, micro_batches, ddg, CLIP)
    expected, norms = train_oracle(stages, micro_batches, ddg)
    assert not different([states for states, _, _ in got], expected)
    by_stage, _ = train_oracle(stages, micro_batches, {**ddg, "clip": "stage"})
    assert different(expected, by_stage) == list(range(stages)), "the norms of the other stages did not matter"
    for _, told, across in got:
        assert across == 0
        for step, norm in told:
            known = norms[step - 1] if step > 0 else 0.0
            assert norm == (known or None), "of the call before that of the loss"


@pytest.mark.parametrize("clip", ["stage", "global"])
def test_norm_is_the_pipelines_and_equal_on_every_rank(ranks: GetRanks, clip: str) -> None:
    got = ranks(3).run(train_engine, 4, {"clip": clip}, CLIP)
    _, norms = train_oracle(3, 4, {"clip": clip})
    first = got[0][1]
    assert all(told == first for _, told, _ in got)
    assert [norm for _, norm in first if norm is not None], "no norm was ever known"
    for step, norm in first:
        assert norm is None or math.isclose(norm, norms[step - 1], rel_tol=0.0)


def test_without_clipping_there_is_no_norm(ranks: GetRanks) -> None:
    for _, told, _ in ranks(2).run(train_engine, 1, {"clip": "global"}, 0.0):
        assert {norm for _, norm in told} == {None}


def resume(rank: int, world_size: int, directory: str) -> list[tuple[list[Any], list[Tensor]]]:
    """What six calls after a checkpoint come to: going on, and with another engine that loads it."""
    ddg = {"clip": "global"}
    one, other = (toy.engine(world_size, 1, "sgd", ddg, gradient_clipping=CLIP) for _ in range(2))
    data = toy.batches(6)
    for _ in range(6):
        one.train_batch(data)
    one.save_checkpoint(directory, client_state={"rng": torch.get_rng_state()})
    found = []
    for engine in (one, other):
        if engine is other:
            other.train_batch(toy.batches(1, seed=9))
            _, state = other.load_checkpoint(directory)
            torch.set_rng_state(state["rng"])
        data = toy.batches(6, seed=4)
        told = [(engine.train_batch(data).item(), engine.get_global_grad_norm()) for _ in range(6)]
        found.append((told, toy.state(engine.module)))
        engine.drain()
    return found


@pytest.mark.proves('"clip": "global", resumed from a checkpoint', modes=DEFAULT)
def test_resumes_with_the_norm_that_was_known(ranks: GetRanks, tmp_path: Path) -> None:
    for one, other in ranks(3).run(resume, str(tmp_path)):
        assert one[0] == other[0]
        assert all(map(torch.equal, one[1], other[1]))


class Derived(torch.optim.SGD):
    """As projects write them: torch's hooks would run in both of its steps."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.filterwarnings("error")
def test_wrapper_clips_by_the_known_norm_in_the_block_alone(scheduled: bool) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    inner = Derived([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1, gamma=1.0) if scheduled else None
    before = vars(inner).get("step")
    wrapper = SimpleNamespace(optimizer=inner, clip_grad=0.5)
    for known, coefficient in ((2.0, 0.25), (0.25, 1.0)):
        weight.data.zero_()
        weight.grad = torch.tensor([3.0, 4.0])
        with clipping_by(known, wrapper):
            assert wrapper.clip_grad == 0.0
            inner.step()
            if scheduler is not None:
                scheduler.step()
        torch.testing.assert_close(weight.data, torch.tensor([-3.0, -4.0]) * coefficient)
        assert wrapper.clip_grad == 0.5
        assert vars(inner).get("step") == before
