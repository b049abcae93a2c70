"""Training in fp16 with a dynamic scale and overflows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_ddg.staleness.apply import PREVIOUS_STEP
from helpers import toy
from helpers.census import census
from helpers.formats import ZERO_1, as_fused, batches, fp16_allowed, layers, loss_fn, trainable

CALLS = 16
DYNAMIC = {"enabled": True, "initial_scale_power": 10, "hysteresis": 1, "loss_scale_window": 1000}
WARMUP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 12}}}


@dataclass
class Result:
    told: list[tuple[int, int, bool, float, int]]
    """Facts told after each call: steps skipped, of which call, whether the step was applied, rate, global steps."""
    scales: list[float]
    """Loss scale of this stage, after each call."""
    moved: list[bool]
    """Whether the stage's weights changed in each call."""
    states: list[Tensor]
    across: int
    norms: list[float | None]
    """Norm of the gradients of the pipeline, as told after each call."""
    previous: list[list[Tensor]] = field(default_factory=list)
    """The u_{t-1} of the rules for stale gradients, after each call."""


@fp16_allowed()
def train(
    rank: int,
    world_size: int,
    config: dict[str, Any],
    powers: list[int],
    micro_batches: int,
    ddg: dict[str, Any],
    fused: bool = False,
    frozen: int | None = None,
) -> Result:
    """Train with the scale of stage k at 2 ** powers[k] to begin with."""
    from deepspeed.pipe import PipelineModule

    import ds_ddg

    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)

    net = PipelineModule(layers(frozen=frozen), num_stages=world_size, loss_fn=loss_fn, partition_method="uniform")
    torch.manual_seed(11)
    engine, *_ = ds_ddg.initialize(
        model=net,
        config=toy.config(micro_batches, ddg, **config),
        optimizer=as_fused(make) if fused else make,
        model_parameters=trainable(net),
    )
    set_scale(engine.optimizer, 2.0 ** powers[rank])
    data = batches(CALLS * micro_batches, torch.float16)
    result = Result([], [], [], [], 0, [])
    for _ in range(CALLS):
        before = toy.state(net)
        with census() as seen:
            engine.train_batch(data)
        result.across += sum(count for (_, group), count in seen.items() if len(group) > 1)
        result.moved.append(not all(map(torch.equal, before, toy.state(net))))
        result.scales.append(float(engine.optimizer.loss_scale))
        result.norms.append(engine.get_global_grad_norm())
        states = engine.optimizer.optimizer.state.values()
        result.previous.append([state[PREVIOUS_STEP].clone() for state in states if PREVIOUS_STEP in state])
        rate = engine.get_lr()[0]
        result.told.append(
            (engine.skipped_steps, engine.loss_step, engine.was_step_applied(), rate, engine.global_steps)
        )
    result.states = toy.state(net)
    engine.drain()
    return result


def set_scale(optimizer: Any, scale: float) -> None:
    scaler = getattr(optimizer, "loss_scaler", None) or optimizer.loss_scale_config
    scaler.cur_scale = scale


OPTIMIZERS = {"fp16": {"fp16": DYNAMIC, **WARMUP}, "fp16, ZeRO-1": {"fp16": DYNAMIC, **ZERO_1, **WARMUP}}


def assert_scales_change_nothing(same: list[Result], differing: list[Result]) -> None:
    """Assert that the scale changes no weight, in runs that begin with the powers 10, 10, 10 and 12, 9, 11."""
    for a, b in zip(same, differing, strict=True):
        assert a.told == b.told
        assert b.told[-1][0] == 0, "nothing overflows"
        assert a.moved == b.moved
        assert all(b.moved[2:])
        for x, y in zip(a.states, b.states, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-3, atol=1e-4)
    assert [result.scales[-1] for result in differing] == [2.0**12, 2.0**9, 2.0**11]


def assert_overflow_is_its_own(results: list[Result]) -> None:
    """Assert that an overflow is one stage's alone, in a run that begins with the powers 24, 10, 10."""
    assert [result.across for result in results] == [0, 0, 0]
    told = results[0].told
    assert all(result.told == told for result in results), "every rank must say the same after every call"
    skipped = told[-1][0]
    assert skipped >= 3, "2**24 is far too much for fp16"
    assert results[0].scales[-1] < 2.0**24
    assert results[1].scales[-1] == results[2].scales[-1] == 2.0**10
    stays = [step for step in range(2, CALLS) if not results[0].moved[step]]
    assert len(stays) >= skipped
    assert all(all(result.moved[2:]) for result in results[1:]), "the others go on"
    assert results[0].moved[-1], "and the stage itself, once its scale fits"
    assert [step for *_, step in told] == list(range(1, CALLS + 1))
    known = [applied for _, _, applied, _, _ in told]
    assert known.count(False) == len({step for _, step, applied, _, _ in told if not applied})
