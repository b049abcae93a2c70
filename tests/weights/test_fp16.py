"""Loss scales of fp16: each stage has its own, gradients say theirs, and an overflow concerns one stage's weights.

DeepSpeed refuses fp16 on CPU, where torch has it: the tests allow it, so that everything but the kernels is what runs
on a GPU. Static scales are compared with the oracle in test_precision.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import toy
from helpers.distributed import GetRanks
from helpers.formats import fp16_allowed, trainable
from helpers.fp16_runs import (
    CALLS,
    DYNAMIC,
    OPTIMIZERS,
    assert_overflow_is_its_own,
    assert_scales_change_nothing,
    set_scale,
    train,
)
from helpers.modes import DEFAULT


def proving(exact: bool = False) -> list[Any]:
    return [
        pytest.param(config, id=name, marks=pytest.mark.proves(f"{name}, dynamic scale", modes="ddg", exact=exact))
        for name, config in OPTIMIZERS.items()
    ]


@pytest.mark.parametrize("config", proving())
@pytest.mark.parametrize(
    "ddg",
    [{}, {"activations": "recompute"}, {"weights": "current"}, {"weights": "current", "activations": "recompute"}],
)
def test_scale_travels_with_the_gradient(ranks: GetRanks, config: dict[str, Any], ddg: dict[str, Any]) -> None:
    """Scales that differ from stage to stage change no more than the smallest numbers of the format."""
    same = ranks(3).run(train, config, [10, 10, 10], 2, ddg)
    assert_scales_change_nothing(same, ranks(3).run(train, config, [12, 9, 11], 2, ddg))


@pytest.mark.parametrize("config", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_overflow_of_one_stage_is_its_own_and_known_to_all(ranks: GetRanks, config: dict[str, Any]) -> None:
    assert_overflow_is_its_own(ranks(3).run(train, config, [24, 10, 10], 1, {}))


@pytest.mark.parametrize("frozen", [1, 2])
@pytest.mark.parametrize(
    ("config", "fused"),
    [(OPTIMIZERS["fp16"], False), (OPTIMIZERS["fp16"], True), (OPTIMIZERS["fp16, ZeRO-1"], False)],
    ids=["fp16", "fp16, fused optimizer", "fp16, ZeRO-1"],
)
def test_scale_of_a_stage_without_anything_to_train(
    ranks: GetRanks, config: dict[str, Any], fused: bool, frozen: int
) -> None:
    """Left as it is, it would make every gradient that passes overflow, and the stages before it skip for ever."""
    powers = [10, 10, 10]
    powers[frozen] = 24
    results = ranks(3).run(train, config, powers, 1, {}, fused, frozen)
    assert all(result.told == results[0].told for result in results), "every rank must say the same after every call"
    scales = results[frozen].scales
    assert scales[-1] < 2.0**24
    assert scales[-1] == scales[-3], "it has come to rest"
    assert not any(results[frozen].moved)
    skipped = [skips for skips, *_ in results[0].told]
    assert 0 < skipped[-1] == skipped[-3], "stages before it skip while it overflows, and then no more"
    assert results[0].moved[-2:] == [True, True]


def test_scale_of_a_stage_without_anything_to_train_grows(ranks: GetRanks) -> None:
    growing = {**OPTIMIZERS["fp16"], "fp16": {**DYNAMIC, "loss_scale_window": 4}}
    results = ranks(3).run(train, growing, [10, 10, 10], 1, {}, False, 1)
    assert results[1].scales[-1] > 2.0**11


@pytest.mark.parametrize("config", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_learning_rate_goes_by_calls_whatever_overflows(ranks: GetRanks, config: dict[str, Any]) -> None:
    smooth = ranks(2).run(train, config, [10, 10], 1, {})
    rough = ranks(2).run(train, config, [24, 24], 1, {})
    rates = [rate for *_, rate, _ in smooth[0].told]
    assert len(set(rates)) > 5
    for result in rough:
        assert [rate for *_, rate, _ in result.told] == rates
        assert result.told[-1][0] > 0, "something overflowed"


@pytest.mark.parametrize(
    ("config", "fused"),
    [
        pytest.param(
            config,
            fused,
            id=name,
            marks=pytest.mark.proves(f'{name}, dynamic scale, "clip": "global"', exact=False, modes=DEFAULT),
        )
        for name, config, fused in (
            ("fp16", OPTIMIZERS["fp16"], False),
            ("fp16, fused optimizer", OPTIMIZERS["fp16"], True),
            ("fp16, ZeRO-1", OPTIMIZERS["fp16, ZeRO-1"], False),
        )
    ],
)
def test_clips_by_a_norm_without_scales(ranks: GetRanks, config: dict[str, Any], fused: bool) -> None:
    """The norm of the pipeline adds up stages whose scales differ, grow, and shrink where they overflow."""
    clipping = {**config, "gradient_clipping": 0.2}
    same, differing, rough = (
        ranks(3).run(train, clipping, powers, 1, {"clip": "global"}, fused)
        for powers in ([10, 10, 10], [12, 9, 11], [10, 24, 10])
    )
    for a, b in zip(same, differing, strict=True):
        assert known(b.norms) == pytest.approx(known(a.norms), rel=5e-3)
        for x, y in zip(a.states, b.states, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-3, atol=1e-4)
    assert len(known(same[0].norms)) > CALLS - 5
    assert all(0.5 < norm < 5.0 for norm in known(same[0].norms)), "as without scales, and above the limit of 0.2"
    # While stage 1 overflows nobody knows a norm; that of two stages alone would be another.
    assert all(result.norms == rough[0].norms for result in rough)
    skipped = [skips for skips, *_ in rough[0].told]
    for call in range(1, CALLS):
        if skipped[call] > skipped[call - 1]:
            assert rough[0].norms[call] == rough[0].norms[call - 1]
    assert skipped[-1] >= 3
    assert all(0.5 < norm < 5.0 for norm in known(rough[0].norms))


def known(norms: list[float | None]) -> list[float]:
    return [norm for norm in norms if norm is not None]


@pytest.mark.parametrize("fused", [False, True])
def test_norm_is_that_of_the_scale_it_was_measured_in(ranks: GetRanks, fused: bool) -> None:
    """Where a scale grows in a step, DeepSpeed's fused optimizer unscales the norm by the next one."""
    growing = {**OPTIMIZERS["fp16"], "fp16": {**DYNAMIC, "loss_scale_window": 4}}
    steady, grown = (
        ranks(3).run(train, config, [10, 10, 10], 1, {}, fused) for config in (OPTIMIZERS["fp16"], growing)
    )
    assert grown[2].scales[-1] > 2.0**11, "it grew more than once"
    first = next(call for call in range(CALLS) if grown[2].scales[call] > 2.0**10)
    # Told two calls and the pipeline's delay later; up to that step the runs are the same.
    assert grown[0].norms[first + 3] == steady[0].norms[first + 3]
    assert all(0.5 < norm < 5.0 for norm in known(grown[0].norms)), grown[0].norms


@fp16_allowed()
def train_behind_a_frozen_stage(rank: int, world_size: int) -> list[float]:
    """Scales of this stage after each call; the gradients of the second replica alone are too large for its scale."""
    from deepspeed.pipe import PipelineModule

    import ds_ddg

    torch.manual_seed(7)
    frozen = torch.nn.Linear(6, 6).requires_grad_(False)
    net = PipelineModule([torch.nn.Linear(6, 6), frozen], num_stages=2, loss_fn=torch.nn.functional.mse_loss)
    engine, *_ = ds_ddg.initialize(
        model=net,
        config=toy.config(1, **OPTIMIZERS["fp16"]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        model_parameters=trainable(net),
    )
    set_scale(engine.optimizer, 2.0**14 if engine.is_last_stage() else 2.0**4)
    size = 100.0 if engine.grid.get_data_parallel_rank() == 1 else 0.1
    batch = torch.ones(4, 6, dtype=torch.float16), torch.full((4, 6), size, dtype=torch.float16)
    scales = []
    for _ in range(6):
        engine.train_batch(iter([batch]))
        scales.append(float(engine.optimizer.loss_scale))
    engine.drain()
    return scales


def test_scale_of_a_frozen_stage_is_one_of_all_replicas(ranks: GetRanks) -> None:
    first, second, *_ = found = ranks(4).run(train_behind_a_frozen_stage)
    assert found[2] == found[3]
    assert found[3][-1] < 2.0**14, "nothing overflowed"
    assert first == second
