"""The engine against the oracle, bit for bit: parameters, buffers and losses, in every setting of the schedule.

The oracle runs in this process, the engine on K ranks that stay for the next case of the same K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import nn

from helpers import toy
from helpers.distributed import GetRanks
from helpers.exact_runs import (
    Case,
    Course,
    assert_exact,
    differences,
    train,
    train_engine,
    train_oracle,
)
from helpers.modes import DEFAULT, MODES

pytestmark = pytest.mark.usefixtures("one_thread")


STAGES = (1, 2, 3, 4)


# -- the grid ---------------------------------------------------------------------------------------------------------


def grid(stages: int) -> list[Case]:
    """Every M, slack and mode; optimizers and kinds of activation take turns, so that each meets every mode and K."""
    cases = []
    for m, slack, (mode, (weights, activations)) in product(range(3), (0, 1), enumerate(MODES)):
        optimizer = list(toy.OPTIMIZERS)[(2 * m + slack + mode + stages) % len(toy.OPTIMIZERS)]
        tuples = (m + slack + mode + stages) % 2 == 1
        cases.append(Case(stages, 2**m, slack, weights, activations, tuples, optimizer))
    return cases


@pytest.mark.parametrize("case", [case for stages in STAGES for case in grid(stages)], ids=str)
@pytest.mark.proves(
    "fp32: SGD, Adam, AdamW, fused AdamW; convolutions, BatchNorm, LayerNorm, dropout; tensors and tuples; slack",
    modes="case.ddg",
)
def test_engine_equals_the_oracle(ranks: GetRanks, case: Case) -> None:
    assert_exact(case, ranks(case.stages).run(train_engine, case, {}, timeout=60), train_oracle(case))


@pytest.mark.parametrize("stages", STAGES)
def test_grid_takes_everything_through_every_mode(stages: int) -> None:
    cases = grid(stages)
    for name, number in (("optimizer", len(toy.OPTIMIZERS)), ("tuples", 2), ("slack", 2), ("micro_batches", 3)):
        met = {(case.weights, case.activations, getattr(case, name)) for case in cases}
        assert len(met) == len(MODES) * number, name


def test_oracle_tells_the_settings_apart() -> None:
    """The grid proves something only if another delay, other weights and other random numbers show on every stage."""
    cases = [
        Case(3),
        Case(3, slack=1),
        Case(3, weights="current"),
        Case(3, weights="current", activations="recompute"),
        Case(3, micro_batches=2),
        Case(3, optimizer="adam"),
        Case(3, optimizer="adamw"),
    ]
    finals = [[course.states["filled"] for course in train_oracle(case)] for case in cases]
    for (one, mine), (other, its) in combinations(zip(cases, finals, strict=True), 2):
        for k, (a, b) in enumerate(zip(mine, its, strict=True)):
            assert not all(map(torch.equal, a, b)), f"stage {k} is the same in {one} and {other}"


# -- what else decides the numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("micro_batches", "mode"), list(zip((1, 2, 4, 2), MODES, strict=True)))
@pytest.mark.proves('"clip": "stage"', modes="mode")
def test_clips_by_the_norm_of_the_stage(ranks: GetRanks, micro_batches: int, mode: tuple[str, str]) -> None:
    case = Case(3, micro_batches, weights=mode[0], activations=mode[1], clip=0.05)
    clipped = train_oracle(case)
    assert all(map(differences, clipped, train_oracle(replace(case, clip=0.0)))), "the clip was not at work"
    assert_exact(case, ranks(3).run(train_engine, case, {}), clipped)


WARMUP = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.02, "warmup_num_steps": 6}


def warm_up(optimizer: torch.optim.Optimizer) -> Any:
    from deepspeed.runtime.lr_schedules import WarmupLR

    return WarmupLR(optimizer, **WARMUP)


def halve_every_second_call(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    ("scheduler", "more"),
    [
        (warm_up, {"scheduler": {"type": "WarmupLR", "params": WARMUP}}),
        (halve_every_second_call, {"lr_scheduler": halve_every_second_call}),
    ],
    ids=["json", "torch"],
)
@pytest.mark.proves("learning-rate schedulers", modes=DEFAULT)
def test_learning_rate_goes_by_calls(
    ranks: GetRanks, scheduler: Callable[[Any], Any], more: dict[str, Any], micro_batches: int
) -> None:
    """On every rank alike, from the first call on, gradient or not; a drain does not move it."""
    case = Case(3, micro_batches, optimizer="adamw")
    expected = train_oracle(case, scheduler)
    assert len(set(expected[0].rates)) > 5
    assert_exact(case, ranks(3).run(train_engine, case, more), expected)


def warm_up_calls(rank: int, world_size: int, optimizer: str) -> list[tuple[int, bool]]:
    """After each call and a drain: steps that the optimizer counted, and whether the weights are still the first."""
    engine = toy.engine(world_size, 1, optimizer, {})
    first = [p.detach().clone() for p in engine.module.parameters()]
    data = toy.batches(6)

    def look() -> tuple[int, bool]:
        counts = {int(state["step"]) for state in engine.optimizer.state.values()} or {0}
        assert len(counts) == 1
        return counts.pop(), all(map(torch.equal, first, engine.module.parameters()))

    seen = [(engine.train_batch(data), look())[1] for _ in range(6)]
    engine.drain()
    return [*seen, look()]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "fused_adamw"])
def test_calls_without_a_gradient_do_not_step_the_optimizer(ranks: GetRanks, optimizer: str) -> None:
    """No count that would spoil Adam's bias correction, no weight decay."""
    for stage, seen in enumerate(ranks(3).run(warm_up_calls, optimizer)):
        delay = 2 - stage
        steps = [*(max(0, t - delay) for t in range(1, 7)), 6]
        assert seen == [(count, count == 0) for count in steps], f"stage {stage}"


# -- next to DeepSpeed ------------------------------------------------------------------------------------------------


def train_deepspeeds_own(rank: int, world_size: int, case: Case) -> Course:
    import deepspeed

    engine = case.engine(initialize=deepspeed.initialize)
    assert type(engine) is deepspeed.PipelineEngine
    engine.drain = lambda: None
    return train(engine, case.data(), [(engine.module, engine.optimizer)])[0]


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, clip=1.0),
        Case(1, 2, tuples=True, optimizer="adam"),
        Case(1, 4, optimizer="fused_adamw"),
        Case(2, 1, clip=1.0),
        Case(2, 2, tuples=True, optimizer="adam"),
        Case(2, 4, optimizer="fused_adamw"),
    ],
    ids=str,
)
@pytest.mark.proves('one stage, or "enabled": false: equal to DeepSpeed\'s engine', modes="case.ddg")
def test_equals_deepspeeds_own_engine(ranks: GetRanks, case: Case) -> None:
    """With one stage nothing is delayed, and when not enabled nothing is touched, DeepSpeed's clip included."""
    pool = ranks(case.stages)
    more = {} if case.stages == 1 else {"ddg": {"enabled": False}}
    ours, own = pool.run(train_engine, case, more), pool.run(train_deepspeeds_own, case)
    for stage, (mine, its) in enumerate(zip(ours, own, strict=True)):
        assert not differences(mine, its), f"stage {stage}"


# -- data parallel ----------------------------------------------------------------------------------------------------


def plain_layers() -> list[nn.Module]:
    """Without BatchNorm and dropout, which see the samples of one replica only: the mean of two is not one of both."""
    torch.manual_seed(7)
    head = [nn.Conv2d(3, 6, 3, padding=1), nn.Flatten(1), nn.Linear(96, 12), nn.LayerNorm(12)]
    return [*head, nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5)]


def train_replicas(rank: int, world_size: int, case: Case) -> tuple[int, Course]:
    with pytest.MonkeyPatch.context() as patch:  # this process goes on to other tests
        patch.setattr(toy, "layers", lambda tuples=False: plain_layers())
        engine = case.engine()
    data = case.data(seed=engine.grid.get_data_parallel_rank())
    return engine.stage_id, train(engine, data, [(engine.module, engine.optimizer)])[0]


def farthest(ours: Course, its: Course) -> float:
    """The largest difference between two courses."""
    pairs = [(a, b) for moment in its.states for a, b in zip(ours.states[moment], its.states[moment], strict=True)]
    return max(float((a - b).abs().max()) for a, b in [*pairs, *zip(ours.losses, its.losses, strict=True)])


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 1, weights="stash", slack=1),
        Case(2, 2, weights="stash", activations="recompute", optimizer="adamw"),
        Case(2, 2, weights="current", optimizer="fused_adamw"),
        Case(2, 1, weights="current", activations="recompute"),
    ],
    ids=str,
)
@pytest.mark.proves("data x pipeline", exact=False, modes="case.ddg")
def test_data_parallel_equals_one_process_with_all_data(
    monkeypatch: pytest.MonkeyPatch, ranks: GetRanks, case: Case
) -> None:
    """Two replicas of two stages: to the oracle, micro-batches of twice the size."""
    monkeypatch.setattr(toy, "layers", lambda tuples=False: plain_layers())
    halves = [case.data(seed) for seed in (0, 1)]
    both = (tuple(map(torch.cat, zip(*pair, strict=True))) for pair in zip(*halves, strict=True))
    expected = train_oracle(case, data=both)
    for course in expected:
        course.losses = case.known(course.losses)
    by_rank = ranks(4).run(train_replicas, case)
    for stage, course in by_rank:
        assert farthest(course, expected[stage]) < 1e-6, f"stage {stage}"
        assert farthest(course, train_oracle(case, data=case.data(seed=0))[stage]) > 1e-3, (
            "one replica's data is enough"
        )
    for stage in range(2):
        one, other = (course for k, course in by_rank if k == stage)
        assert not differences(one, other), f"the replicas of stage {stage} are apart"
