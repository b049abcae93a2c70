"""The number formats and ZeRO stages that DeepSpeed has, trained by the engine and by the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import toy
from helpers.census import census

WIDTH, CALLS, REFILL = 12, 8, 2


# bf16 weights hardly notice how small steps are clipped.
OPTIMIZERS = {**toy.OPTIMIZERS, "fast_sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)}
ZERO_1 = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}


@dataclass(frozen=True)
class Format:
    """A number format: what the DeepSpeed config says, and what to expect."""

    config: dict[str, Any]
    wrapper: str
    weights: torch.dtype = torch.bfloat16
    sums: torch.dtype = torch.bfloat16
    """The type in which the gradients of the micro-batches add up."""
    autocast: bool = False
    primed: bool = False
    """Whether DeepSpeed steps this wrapper's optimizer once when it makes it, on zero gradients."""
    scale: float = 1.0
    """Scale of the loss, a power of two: it changes no digit that matters."""


FORMATS = {
    "fp32, ZeRO-1": Format(ZERO_1, "DeepSpeedZeroOptimizer", torch.float32, torch.float32),
    "bf16": Format({"bf16": {"enabled": True}}, "BF16_Optimizer"),
    "bf16, immediate update": Format({"bf16": {"enabled": True, "immediate_grad_update": True}}, "BF16_Optimizer"),
    "bf16, ZeRO-1": Format({"bf16": {"enabled": True}, **ZERO_1}, "DeepSpeedZeroOptimizer"),
    "bf16, ZeRO-1, fp32 sums": Format(
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, **ZERO_1},
        "BF16_Optimizer",
        sums=torch.float32,
    ),
    "fp16, static scale": Format(
        {"fp16": {"enabled": True, "loss_scale": 128.0}},
        "FP16_UnfusedOptimizer",
        torch.float16,
        torch.float16,
        primed=True,
        scale=128.0,
    ),
    "fp16, fused optimizer, static scale": Format(
        {"fp16": {"enabled": True, "loss_scale": 128.0}},
        "FP16_Optimizer",
        torch.float16,
        torch.float16,
        primed=True,
        scale=128.0,
    ),
    "fp16, ZeRO-1, static scale": Format(
        {"fp16": {"enabled": True, "loss_scale": 128.0}, **ZERO_1},
        "DeepSpeedZeroOptimizer",
        torch.float16,
        torch.float16,
        scale=128.0,
    ),
    "autocast": Format(
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "", torch.float32, torch.float32, autocast=True
    ),
}


def made_for(name: str, make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[Any], torch.optim.Optimizer]:
    """Return what DeepSpeed is given for a format."""
    return as_fused(make) if FORMATS[name].wrapper == "FP16_Optimizer" else make


def as_fused(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[Any], torch.optim.Optimizer]:
    """Make a plain optimizer that is a fused one by its class, which decides on the wrapper."""
    from deepspeed.ops.adam import FusedAdam

    def fused(parameters: Any) -> torch.optim.Optimizer:
        optimizer = make(parameters)
        optimizer.__class__ = type("Fused", (type(optimizer), FusedAdam), {})
        return optimizer

    return fused


def proving(modes: Any, what: str = "", exact: bool = True, names: Iterable[str] = FORMATS) -> list[Any]:
    """Return the formats as parameters of a test that proves `what` with them in `modes`."""
    return [pytest.param(name, marks=pytest.mark.proves(name + what, modes=modes, exact=exact)) for name in names]


class Autocast(nn.Module):
    """A stage of the oracle, under autocast."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output: Tensor = self.stage(x)
        return output


def layers(dropout: bool = True, frozen: int | None = None) -> list[nn.Module]:
    """Return eight layers; those of stage number `frozen`, of three, do not train."""
    torch.manual_seed(7)
    blocks = [toy.Residual(WIDTH) for _ in range(6)]
    for block in blocks:
        block.drop.p *= dropout
    net = [nn.Linear(8, WIDTH), *blocks, nn.Linear(WIDTH, 5)]
    if frozen is not None:
        first, end = parts_of(net, 3)[frozen : frozen + 2]
        for layer in net[first:end]:
            layer.requires_grad_(False)
    return net


def parts_of(net: list[nn.Module], stages: int) -> list[int]:
    from deepspeed.runtime.utils import partition_uniform

    parts: list[int] = partition_uniform(len(net), stages)
    return parts


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def batches(count: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        yield torch.randn(4, 8, generator=generator).to(dtype), torch.randint(5, (4,), generator=generator)


def loss_fn(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.float(), labels)


@dataclass
class Result:
    """The results of one stage to compare."""

    losses: list[Tensor]
    states: list[Tensor]
    wrapper: str = ""
    collectives: int = 0
    """Collectives in a call of the filled pipeline, also of a stage with itself: no stage has a replica here."""
    norm: float | None = None


@contextmanager
def fp16_allowed() -> Iterator[None]:
    """Inside this block DeepSpeed takes fp16 on CPUs, slow but right; other tests share these processes."""
    from deepspeed.accelerator import get_accelerator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
        yield


def build_engine(
    stages: int,
    name: str,
    micro_batches: int,
    optimizer: str,
    ddg: dict[str, Any],
    clip: float = 0.0,
    frozen: int | None = None,
    dropout: bool = True,
) -> Any:
    from deepspeed.pipe import PipelineModule

    import ds_ddg

    net = PipelineModule(layers(dropout, frozen), num_stages=stages, loss_fn=loss_fn, partition_method="uniform")
    torch.manual_seed(11)
    return ds_ddg.initialize(
        model=net,
        config=toy.config(micro_batches, ddg, **FORMATS[name].config, **{"gradient_clipping": clip}),
        optimizer=made_for(name, OPTIMIZERS[optimizer]),
        model_parameters=trainable(net),
    )[0]


@fp16_allowed()
def train_engine(
    rank: int,
    world_size: int,
    name: str,
    micro_batches: int,
    optimizer: str,
    ddg: dict[str, Any],
    clip: float,
    frozen: int | None = None,
) -> Result:
    engine = build_engine(min(world_size, 3), name, micro_batches, optimizer, ddg, clip, frozen)
    data = batches((CALLS + REFILL) * micro_batches, FORMATS[name].weights)
    losses = [engine.train_batch(data).clone() for _ in range(CALLS - 1)]
    with census() as seen:
        losses.append(engine.train_batch(data).clone())
    engine.drain()
    for _ in range(REFILL):
        losses.append(engine.train_batch(data).clone())
    engine.drain()
    wrapper, norm = type(engine.optimizer).__name__, engine.get_global_grad_norm()
    return Result(losses, toy.state(engine.module), wrapper, seen.total(), None if norm is None else float(norm))


def train_replicas(rank: int, world_size: int, name: str) -> Result:
    engine = build_engine(2, name, 2, "adamw", {}, dropout=False)  # each replica has random numbers of its own
    data = batches((CALLS + REFILL) * 2, FORMATS[name].weights)
    for calls in (CALLS, REFILL):
        for _ in range(calls):
            engine.train_batch(data)
        engine.drain()
    return Result([], toy.state(engine.module))
