"""Small models, data and configs that the engine tests share."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "fused_adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
}


class Residual(nn.Module):
    """Dropout, normalisation and a product: what a wrong weight version or random number shows in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(torch.tanh(self.up(self.norm(x)))))


class ConvBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class Split(nn.Module):
    """Makes a tuple of a tensor: values, a float tensor nobody differentiates, and an integer one."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, torch.ones(x.shape[0], 1), torch.arange(x.shape[0])


class OnFirst(nn.Module):
    """Applies a layer to the first entry of a tuple and mixes the second in."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, values: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, order = values
        return self.layer(x) * weight + 0.0 * x[order], x, order


class First(nn.Module):
    def forward(self, values: tuple[Tensor, ...]) -> Tensor:
        return values[0] + 0.5 * values[1]


def layers(tuples: bool = False) -> list[nn.Module]:
    """Return eight layers, the same on every rank; with `tuples` the stages exchange tuples."""
    torch.manual_seed(7)
    head: list[nn.Module] = [ConvBlock(3, 6), ConvBlock(6, 6), nn.Flatten(1), nn.Linear(6 * 16, 12)]
    if tuples:
        return [
            *head[:2],
            nn.Sequential(*head[2:], Split()),
            *(OnFirst(Residual(12)) for _ in range(4)),
            nn.Sequential(First(), nn.Linear(12, 5)),
        ]
    return [*head, Residual(12), Residual(12), Residual(12), nn.Linear(12, 5)]


def batches(count: int, size: int = 4, seed: int = 3) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `count` micro-batches of images (size, 3, 4, 4) and labels (size,), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(size, 3, 4, 4, generator=generator), torch.randint(5, (size,), generator=generator)


loss_fn = nn.functional.cross_entropy


def config(micro_batches: int, ddg: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Return a DeepSpeed config: no clipping unless asked for, nothing printed."""
    block = {} if ddg is None else {"ddg": ddg}
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        **block,
        **more,
    }


def engine(
    num_stages: int,
    micro_batches: int,
    optimizer: str = "sgd",
    ddg: dict[str, Any] | None = None,
    tuples: bool = False,
    loss: Any = loss_fn,
    initialize: Any = None,
    lr_scheduler: Any = None,
    **more: Any,
) -> Any:
    """Make a DDG engine on the toy model over all ranks."""
    from deepspeed.pipe import PipelineModule

    import ds_ddg

    net = PipelineModule(layers(tuples), num_stages=num_stages, loss_fn=loss, partition_method="uniform")
    torch.manual_seed(11)
    result, *_ = (initialize or ds_ddg.initialize)(
        model=net,
        config=config(micro_batches, ddg, **more),
        optimizer=OPTIMIZERS[optimizer],
        model_parameters=[p for p in net.parameters() if p.requires_grad],
        lr_scheduler=lr_scheduler,
    )
    return result


def reference(num_stages: int, optimizer: str = "sgd", tuples: bool = False, **settings: Any) -> Any:
    """Make the oracle on the same model, split as DeepSpeed's "uniform" splits it."""
    from deepspeed.runtime.utils import partition_uniform

    from ds_ddg.reference import Reference

    net = layers(tuples)
    torch.manual_seed(11)
    parts = partition_uniform(len(net), num_stages)
    stages = [nn.Sequential(*net[a:b]) for a, b in itertools.pairwise(parts)]
    optimizers = [OPTIMIZERS[optimizer](stage.parameters()) for stage in stages]
    return Reference(stages, loss_fn, optimizers, **settings)


class Lines(logging.Handler):
    """The lines that a logger says."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.lines.append(record.getMessage())


def state(module: nn.Module) -> list[Tensor]:
    """Return parameters and buffers in layer order."""
    return [t.detach().clone() for t in (*module.parameters(), *module.buffers())]


def decay(optimizer: torch.optim.Optimizer) -> Any:
    """Return a scheduler that multiplies the learning rate by 0.9 a step."""
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
