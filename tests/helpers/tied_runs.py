"""A model whose first and last stage share weights, trained by the engine and by the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_ddg.reference import Reference
from helpers import toy
from helpers.census import census
from helpers.formats import FORMATS, fp16_allowed, made_for

WORDS, WIDTH = 17, 12
CALLS, REFILL = 9, 3


class Embed(nn.Module):
    """Words to vectors; as a decoder it multiplies by the same weight, with a bias that is its own."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(WORDS, WIDTH, generator=generator) / 4)
        self.bias = nn.Parameter(torch.zeros(WORDS))

    def forward(self, words: Tensor) -> Tensor:
        return nn.functional.embedding(words, self.weight)


def decode(module: Embed, x: Tensor) -> Tensor:
    return nn.functional.linear(x, module.weight, module.bias)


def remix(module: Embed, x: Tensor) -> Tensor:
    """Use the weight a third time, in between."""
    return x + nn.functional.linear(x, module.weight, module.bias).tanh().mean(-1, keepdim=True)


def blocks() -> list[nn.Module]:
    torch.manual_seed(7)
    return [toy.Residual(WIDTH) for _ in range(6)]


def specs(three: bool) -> list[Any]:
    from deepspeed.pipe import TiedLayerSpec

    tie = lambda use: TiedLayerSpec("embed", Embed, forward_fn=use)  # noqa: E731
    inner = blocks()
    middle = [tie(remix)] if three else []
    return [tie(None), *inner[:3], *middle, *inner[3:], tie(decode)]


class Use(nn.Module):
    def __init__(self, module: Embed, use: Callable[[Embed, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.use = module, use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.module, x)


def oracle_layers(three: bool) -> list[nn.Module]:
    """Make a module for each stage, as in the pipeline: only the weight is one and the same, not the bias."""
    first, between, last = Embed(), Embed(), Embed()
    between.weight = last.weight = first.weight
    inner = blocks()
    middle = [Use(between, remix)] if three else []
    return [first, *inner[:3], *middle, *inner[3:], Use(last, decode)]


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        words = torch.randint(WORDS, (4, 6), generator=generator)
        yield words[:, :-1], words[:, 1:]


def loss_fn(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.float().flatten(0, 1), labels.flatten())


@dataclass
class Result:
    losses: list[float]
    states: list[Tensor]
    copies: list[Tensor]
    """The tied weight after every call."""
    across: int
    """Collectives across stages in a call of the filled pipeline."""
    in_optimizer: int
    evaluated: list[float]


@fp16_allowed()
def train_engine(
    rank: int, world_size: int, setting: dict[str, Any], stages: int, more: dict[str, Any], name: str = ""
) -> Result:
    """Train the engine in fp32, or in the format called `name`."""
    from deepspeed.pipe import PipelineModule

    import ds_ddg

    make = toy.OPTIMIZERS.get(setting["optimizer"], setting["optimizer"])
    if name:
        make, more = made_for(name, make), {**FORMATS[name].config, **more}
    with torch.no_grad():  # for stages that share a GPU, see README
        net = PipelineModule(specs(setting["three"]), num_stages=stages, loss_fn=loss_fn, partition_method="uniform")
    torch.manual_seed(11)
    engine, *_ = ds_ddg.initialize(
        model=net,
        config=toy.config(setting["micro_batches"], setting["ddg"], **more),
        optimizer=make,
        model_parameters=list(net.parameters()),
    )
    stage_of = [engine.grid.topology().get_coord(r).pipe for r in range(world_size)]
    data = batches((CALLS + REFILL) * setting["micro_batches"])
    losses, copies, evaluated = [], [], []
    across = 0

    def call() -> None:
        losses.append(engine.train_batch(data).item())
        if "embed" in net.tied_modules:
            copies.append(net.tied_modules["embed"].weight.detach().clone())

    for step in range(CALLS):
        with census() as seen:
            call()
        across = sum(count for key, count in seen.items() if len({stage_of[r] for r in key[1]}) > 1)
        if step == 4 and setting.get("evaluate"):
            evaluated.append(float(engine.eval_batch(batches(setting["micro_batches"]))))
            net.train()
    engine.drain()
    for _ in range(REFILL):
        call()
    engine.drain()
    mine = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    tied = [m.weight for m in net.tied_modules.values()]
    return Result(losses, toy.state(net), copies, across, sum(id(p) in mine for p in tied), evaluated)


def train_oracle(setting: dict[str, Any], stages: int) -> tuple[list[float], list[list[Tensor]], list[Tensor]]:
    from deepspeed.runtime.utils import partition_uniform

    net = oracle_layers(setting["three"])
    torch.manual_seed(11)
    parts = partition_uniform(len(net), stages)
    modules = [nn.Sequential(*net[a:b]) for a, b in itertools.pairwise(parts)]
    seen: set[nn.Parameter] = set()
    optimizers = []
    for module in modules:
        own = [p for p in module.parameters() if p not in seen]
        seen.update(own)
        optimizers.append(toy.OPTIMIZERS[setting["optimizer"]](own))
    oracle = Reference(
        modules,
        loss_fn,
        optimizers,
        micro_batches=setting["micro_batches"],
        clip=setting.get("clip", 0.0),
        **{"clip_by" if key == "clip" else key: value for key, value in setting["ddg"].items()},
    )
    data = batches((CALLS + REFILL) * setting["micro_batches"])
    losses, copies = [], []
    for calls in (CALLS, REFILL):
        for _ in range(calls):
            losses.append(float(oracle.train_batch(data)))
            copies.append(net[0].weight.detach().clone())
        oracle.drain()
    delay = -(-(stages - 1) * (1 + setting["ddg"].get("slack", 0)) // setting["micro_batches"])
    known = [losses[max(t - delay, 0)] for t in range(CALLS)]
    known += [losses[max(t - delay, CALLS - 1)] for t in range(CALLS, CALLS + REFILL)]
    return known, [toy.state(module) for module in modules], copies


def sorted_states(states: list[Tensor]) -> list[Tensor]:
    """Sort states, as DeepSpeed registers a tied module in another place than the oracle."""
    return sorted(states, key=lambda t: (t.dim(), tuple(t.shape), t.flatten().tolist()))


def assert_exact(got: list[Result], setting: dict[str, Any], stages: int) -> None:
    losses, states, copies = train_oracle(setting, stages)
    for k, (result, expected) in enumerate(zip(got, states, strict=True)):
        assert result.losses == losses, f"stage {k}"
        for index, (a, b) in enumerate(zip(sorted_states(result.states), sorted_states(expected), strict=True)):
            assert torch.equal(a, b), f"stage {k}, tensor {index}: {float((a - b).abs().max())}"
        if result.copies:
            assert len(result.copies) == len(copies)
            for t, (a, b) in enumerate(zip(result.copies, copies, strict=True)):
                assert torch.equal(a, b), f"stage {k}: the tied weight after call {t}"
    assert [result.across for result in got] == [0] * stages, "a collective across stages"
