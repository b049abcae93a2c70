"""Stages of equal time on ranks: all get the same split, or the same failure."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from torch import nn

import ds_ddg
from ds_ddg.partition import PipelineModule
from helpers import toy
from helpers.distributed import GetRanks
from helpers.timed_layers import Sleeper


def train_profiled(rank: int, world_size: int) -> dict[str, Any]:
    """Only rank 0 has a sample; the slow layer is the first of five."""
    specs = [LayerSpec(Sleeper, 0.05 * (i == 0)) for i in range(4)] + [LayerSpec(nn.Linear, 4, 5)]
    data = [(torch.randn(4, 4), torch.randint(5, (4,))) for _ in range(8)]
    where = {"sample": data[0]} if rank == 0 else {"partition_method": "profile"}
    torch.manual_seed(3)
    net = PipelineModule(specs, num_stages=world_size, loss_fn=toy.loss_fn, **where)
    torch.manual_seed(3)
    expected = nn.ModuleList([spec.build() for spec in specs[net.parts[rank] : net.parts[rank + 1]]])
    initial = all(map(torch.equal, toy.state(net), toy.state(expected)))
    engine, *_ = ds_ddg.initialize(
        model=net,
        config=toy.config(2),
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        model_parameters=list(net.parameters()),
    )
    losses = [float(engine.train_batch(iter(data))) for _ in range(2)]
    engine.drain()
    moved = not any(map(torch.equal, toy.state(net), toy.state(expected)))
    assert net.balance is not None
    assert not hasattr(net, "_sample")
    return {"parts": net.parts, "pace": net.balance.pace_ms, "losses": losses, "initial": initial, "moved": moved}


def test_ranks_agree_and_train(ranks: GetRanks) -> None:
    first, second = ranks(2).run(train_profiled)
    assert first == second
    assert first["parts"] == [0, 1, 5]
    assert first["initial"], "the profile took random numbers from the initialisation"
    assert first["moved"]
    assert all(loss > 0 for loss in first["losses"])


def build_wrongly(rank: int, world_size: int) -> list[str]:
    """What each wrong set-up raises; the last builds without a profile."""
    settings: list[dict[str, Any]] = [
        {"sample": (torch.ones(2, 99), None)},
        {"partition_method": "profile"},
        {"sample": (torch.ones(2, 3), None), "partition_method": "uniform"},
        {"sample": (torch.ones(2, 3), None), "layers": [nn.Linear(3, 3)]},
        {"partition_method": "uniform"},
    ]
    messages = []
    for setting in settings:
        arguments = {"layers": [nn.Linear(3, 3) for _ in range(5)], "num_stages": 2, **setting}
        try:
            messages.append(str(PipelineModule(**arguments).parts))
        except (ValueError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def test_a_failure_is_every_ranks(ranks: GetRanks) -> None:
    first, second = ranks(2).run(build_wrongly)
    for here, there, message in zip(
        first,
        second,
        [
            "RuntimeError: layer 0 (Linear) failed on (2, 99) torch.float32",
            'ValueError: partition_method="profile" measures the layers on rank 0, which has no micro-batch',
            "ValueError: sample has no meaning for partition_method='uniform', which measures nothing; leave it out",
            "ValueError: every stage needs a layer, and there must be a stage: 2 stages for 1 layers",
            "[0, 3, 5]",
        ],
        strict=True,
    ):
        assert here.startswith(message)
        assert there == here or there == f"RuntimeError: rank 0 could not profile the layers, see its log; {here}"
