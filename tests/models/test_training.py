"""Transformers models under the delayed schedule: equal to the oracle on the same layers, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from torch import Tensor, nn

from ds_ddg import models
from ds_ddg.reference import Reference
from helpers import toy
from helpers.distributed import GetRanks
from helpers.modes import MODES
from helpers.transformers_models import build_config

pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


CALLS = 4


def without_dropout(name: str) -> list[Any]:
    config, auto = build_config(name)
    for key in vars(config):
        if "drop" in key and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    return models.from_transformers(config, auto)


def batches(count: int) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for index in range(count):
        words = torch.randint(3, 61, (4, 7), generator=generator)
        mask = torch.ones_like(words)
        mask[index % 4, 5:] = 0
        yield (words, mask), words.masked_fill(mask == 0, -100)


def train(rank: int, world_size: int, name: str, micro_batches: int, ddg: dict[str, Any]) -> dict[str, Tensor]:
    import ds_ddg

    net = PipelineModule(
        without_dropout(name),
        num_stages=world_size,
        loss_fn=models.next_token_loss,
        partition_method="uniform",
        seed_layers=True,
        seed_fn=torch.manual_seed,
    )
    engine, *_ = ds_ddg.initialize(
        model=net,
        config=toy.config(micro_batches, ddg),
        optimizer=toy.OPTIMIZERS["adamw"],
        model_parameters=list(net.parameters()),
    )
    data = batches(CALLS * micro_batches)
    for _ in range(CALLS):
        engine.train_batch(data)
    engine.drain()
    return state(net)


def state(net: nn.Module) -> dict[str, Tensor]:
    return {
        k: t.detach().clone()
        for m in net.modules()
        if hasattr(m, "original_state")
        for k, t in m.original_state().items()
    }


class Use(nn.Module):
    def __init__(self, module: nn.Module, use: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.module, self.use = module, use

    def forward(self, x: Any) -> Any:
        return self.use(self.module, x)


def oracle(name: str, stages: int, micro_batches: int, ddg: dict[str, Any]) -> list[dict[str, Tensor]]:
    from deepspeed.runtime.utils import partition_uniform

    layers: list[nn.Module] = []
    for index, spec in enumerate(without_dropout(name)):
        torch.manual_seed(1234 + index)
        module = spec.build()
        if isinstance(spec, TiedLayerSpec) and index > 0:
            module.part(module._path).weight = layers[0].weight
            module = Use(module, spec.forward_fn)
        layers.append(module)
    parts = [nn.Sequential(*layers[a:b]) for a, b in itertools.pairwise(partition_uniform(len(layers), stages))]
    seen: set[nn.Parameter] = set()
    optimizers = []
    for part in parts:
        own = [p for p in part.parameters() if p not in seen]
        seen.update(own)
        optimizers.append(toy.OPTIMIZERS["adamw"](own))
    reference = Reference(parts, models.next_token_loss, optimizers, micro_batches=micro_batches, **ddg)
    data = batches(CALLS * micro_batches)
    for _ in range(CALLS):
        reference.train_batch(data)
    reference.drain()
    return [state(part) for part in parts]


@pytest.mark.parametrize(("weights", "activations"), MODES)
@pytest.mark.parametrize(("name", "stages", "micro_batches"), [("llama", 3, 1), ("bert_mlm", 2, 2), ("gpt2", 3, 2)])
def test_training_equals_the_oracle(
    ranks: GetRanks, name: str, stages: int, micro_batches: int, weights: str, activations: str
) -> None:
    ddg = {"weights": weights, "activations": activations}
    got = ranks(stages).run(train, name, micro_batches, ddg)
    for k, (found, expected) in enumerate(zip(got, oracle(name, stages, micro_batches, ddg), strict=True)):
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), f"stage {k}, {key}: {float((found[key] - tensor).abs().max())}"


@pytest.mark.parametrize("name", ["llama", "bert_mlm"])
def test_deepspeeds_own_schedule_runs_the_same_specs(ranks: GetRanks, name: str) -> None:
    """One stage and two train to the same weights, up to rounding: tuples with integers travel there as well."""
    off = {"enabled": False}
    one = ranks(1).run(train, name, 2, off)[0]
    two = ranks(2).run(train, name, 2, off)
    for key, tensor in {**two[1], **two[0]}.items():
        torch.testing.assert_close(tensor, one[key], rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
