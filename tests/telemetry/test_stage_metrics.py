"""What a stage measures of itself."""

from __future__ import annotations

import time
from typing import Any

import pytest
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn

from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.telemetry.delay_effects import EFFECTS
from ds_ddg.telemetry.observer import Timestamp
from helpers import toy
from helpers.distributed import GetRanks

# The oracle steps schedulers in warm-up calls too, as the engine does.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before:UserWarning"),
    pytest.mark.usefixtures("one_thread"),
]


class Slow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.03)
        return x + 0.0


def measure(rank: int, world_size: int, micro_batches: int, slack: int, slow: bool) -> list[dict[str, Any]]:
    import ds_ddg

    net = PipelineModule(
        [*toy.layers(), Slow() if slow else nn.Identity()],
        num_stages=world_size,
        loss_fn=toy.loss_fn,
        partition_method="uniform",
    )
    engine, *_ = ds_ddg.initialize(
        model=net,
        config=toy.config(micro_batches, {"slack": slack}),
        optimizer=toy.OPTIMIZERS["sgd"],
        model_parameters=net.parameters(),
    )
    data = toy.batches(8 * micro_batches)
    found = [engine.ddg_stats()]
    for _ in range(8):
        engine.train_batch(data)
        found.append(engine.ddg_stats())
    engine.drain()
    found.append(engine.ddg_stats())
    return [{name: value for name, value in stats.items() if name not in EFFECTS} for stats in found]


@pytest.mark.parametrize(("micro_batches", "slack"), [(1, 0), (2, 1)])
def test_ddg_stats(ranks: GetRanks, micro_batches: int, slack: int) -> None:
    """In steady state the bounds of the plan; the last stage has most to do, and the first waits for it."""
    plan = DDGPlan(3, micro_batches, slack)
    busy = [0.0] * 3
    for stage, found in enumerate(ranks(3).run(measure, micro_batches, slack, True)):
        empty = {"stage": stage, "staleness": 0, "busy": 0.0, "micro_batches_in_flight": 0, "weight_versions": 1}
        assert found[0] == empty
        assert found[-1] == empty
        for stats in found[6:9]:
            assert stats.pop("stage") == stage
            busy[stage] += (share := stats.pop("busy"))
            assert 0 <= share <= 1
            assert stats == {
                "staleness": plan.staleness(stage),
                "micro_batches_in_flight": plan.delay(stage),
                "weight_versions": plan.versions(stage),
            }
    assert busy[2] > busy[0]


def test_busy_is_the_share_without_waiting() -> None:
    assert Timestamp(10.0, 2.0).busy(Timestamp(20.0, 6.0)) == 0.6
    assert Timestamp(10.0, 2.0).busy(Timestamp(20.0, 2.0)) == 1.0
