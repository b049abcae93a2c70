"""The trainings of ``quality.py``: small ones whose data comes with Python or scikit-learn.

digits_*   images of digits, 10 epochs: a stem, 16 residual convolutions with GroupNorm ("gn") or BatchNorm ("bn")
bytes_*    Python's own manual, byte by byte: a transformer of 4 blocks, cut between attention and MLP
docs_*     the docstrings of the standard library, a transformer twice as deep: no rule was chosen on it

Each function takes a seed and returns a `Problem`, as ``ds-ddg study`` wants it; `length` makes the training longer.
Learning rates were chosen for synchronous training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pydoc_data import topics
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, relu, scaled_dot_product_attention

from ds_ddg.staleness.rotation import BasisRotation
from ds_ddg.study.problem import Problem

TRAINED, BATCH, EPOCHS = 1197, 32, 10
CONTEXT, SEQUENCES, UPDATES = 32, 8, 800
DOCS_UPDATES = 600


class Convolution(nn.Module):
    """A residual block: norm, ReLU, convolution, whose kernel is a matrix as DeepSpeed's Muon wants it."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm = norm(width)
        self.kernel = nn.Parameter(nn.Conv2d(width, width, 3, bias=False).weight.detach().flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + conv2d(relu(self.norm(x)), self.kernel.view(len(self.kernel), -1, 3, 3), padding=1)


class Classifier(nn.Module):
    """The head of a network for images."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm, self.linear = norm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(relu(self.norm(x)).mean((2, 3)))


class Embedding(nn.Module):
    """Embeddings of bytes and of their positions."""

    def __init__(self, values: int, width: int) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(values, width), nn.Embedding(CONTEXT, width)
        for table in (self.bytes, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.bytes(x) + self.positions(torch.arange(x.shape[1]))


class Attention(nn.Module):
    """Causal attention over normed inputs, added to them."""

    def __init__(self, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.inside, self.outside = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        _initialize(self.inside, self.outside, width, blocks)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.inside(self.norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        mixed = scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4), is_causal=True)
        return x + self.outside(mixed.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    """Two layers over normed inputs, added to them."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.norm, self.inside, self.outside = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        _initialize(self.inside, self.outside, width, blocks)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outside(relu(self.inside(self.norm(x))))


def _initialize(inside: nn.Linear, outside: nn.Linear, width: int, blocks: int) -> None:
    nn.init.normal_(inside.weight, std=width**-0.5)
    nn.init.normal_(outside.weight, std=outside.in_features**-0.5 / (2 * blocks) ** 0.5)
    nn.init.zeros_(inside.bias)
    nn.init.zeros_(outside.bias)


def _digits(
    seed: int, norm: Callable[[int], nn.Module], optimizer: Any, width: int = 24, length: float = 1.0
) -> Problem:
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1000 + seed))
    train, test = order[:TRAINED], order[TRAINED:]

    def batches(micro_batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(2000 + seed)
        while True:
            for batch in train[torch.randperm(TRAINED, generator=generator)].split(BATCH)[: TRAINED // BATCH]:
                for part in batch.chunk(micro_batches):
                    yield images[part], labels[part]

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"accuracy": 100 * float((model(images[test]).argmax(1) == labels[test]).double().mean())}

    calls = round(length * EPOCHS * (TRAINED // BATCH))
    layers = [
        nn.Conv2d(1, width, 3, 2, 1, bias=False),
        *(Convolution(width, norm) for _ in range(16)),
        Classifier(width, norm),
    ]
    return Problem(layers, cross_entropy, batches, optimizer, calls, partial(_cosine, calls=calls), evaluate)


@lru_cache(maxsize=1)
def _manual() -> tuple[Tensor, Tensor, int]:
    return _numbers("\n\n".join(topics.topics[name] for name in sorted(topics.topics)))


@lru_cache(maxsize=1)
def _docstrings() -> tuple[Tensor, Tensor, int]:
    from recipes.language.corpus import docstrings

    return _numbers("\n\n".join(dict.fromkeys(docstrings())))


def _numbers(document: str) -> tuple[Tensor, Tensor, int]:
    """Return the bytes of a text as numbers, the part to train on and the part to test on, and how many there are."""
    text = document.encode()
    values = sorted(set(text))
    number = {value: i for i, value in enumerate(values)}
    numbers = torch.tensor([number[value] for value in text])
    pages = numbers[: len(numbers) // 2048 * 2048].view(-1, 2048)
    order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(0))
    test = pages[order[: len(pages) // 10], : 2048 // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)[:512]
    return pages[order[len(pages) // 10 :]].reshape(-1), test, len(values)


def _bytes(
    seed: int,
    optimizer: Any,
    text: Callable[[], tuple[Tensor, Tensor, int]] = _manual,
    width: int = 64,
    blocks: int = 4,
    updates: int = UPDATES,
    length: float = 1.0,
) -> Problem:
    train, test, values = text()
    updates = round(length * updates)

    def batches(micro_batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(2000 + seed)
        while True:
            starts = torch.randint(len(train) - CONTEXT - 1, (SEQUENCES, 1), generator=generator)
            for part in train[starts + torch.arange(CONTEXT + 1)].chunk(micro_batches):
                yield part[:, :-1], part[:, 1:]

    def loss_fn(outputs: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(outputs.flatten(0, 1), labels.flatten())

    def evaluate(model: nn.Module) -> dict[str, float]:
        losses = [loss_fn(model(part[:, :-1]), part[:, 1:]) * len(part) for part in test.split(64)]
        return {"nats": float(sum(losses)) / len(test)}

    halves = (half for _ in range(blocks) for half in (Attention(width, 4, blocks), MLP(width, blocks)))
    layers = [Embedding(values, width), *halves, nn.Sequential(nn.LayerNorm(width), nn.Linear(width, values))]
    return Problem(layers, loss_fn, batches, optimizer, updates, partial(_cosine, calls=updates), evaluate)


def _cosine(optimizer: torch.optim.Optimizer, calls: int) -> Any:
    """Return a scheduler: a tenth of the calls to warm up, then down to 0 along a cosine."""
    warm = calls // 10

    def factor(call: int) -> float:
        return min(1.0, (call + 1) / warm) * 0.5 * (1 + math.cos(math.pi * max(0, call - warm) / (calls - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Return parameter groups: matrices, which decay, and all others, which do not."""
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for parameter in model.parameters():
        parts[parameter.dim() > 1].append(parameter)
    return [{"params": parts[True], "weight_decay": decay}, {"params": parts[False], "weight_decay": 0.0}]


def _sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(_groups(model, 5e-4), lr=lr, momentum=0.9)


def _adamw(model: nn.Module, lr: float, decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_groups(model, decay), lr=lr)


def _muon(model: nn.Module, decay: float) -> torch.optim.Optimizer:
    """Return DeepSpeed's Muon for the matrices and kernels inside, and its Adam for all others."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    inside = [p for layer in list(model)[1:-1] for p in layer.parameters() if p.dim() > 1]  # type: ignore[call-overload]
    taken = set(inside)
    rest = [p for p in model.parameters() if p not in taken]
    return MuonWithAuxAdam(
        [
            {"params": inside, "use_muon": True, "lr": 0.02, "momentum": 0.9, "weight_decay": decay * 0.1},
            {
                "params": rest,
                "use_muon": False,
                "lr": 2e-3,
                "betas": (0.9, 0.999),
                "eps": 1e-8,
                "weight_decay": 0.0,
            },
        ]
    )


def _rotation(model: nn.Module, decay: float) -> torch.optim.Optimizer:
    return BasisRotation(_groups(model, decay), lr=2e-3)


def _group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(4, width)


digits_gn_sgd = partial(_digits, norm=_group_norm, optimizer=partial(_sgd, lr=0.05))
digits_gn_adamw = partial(_digits, norm=_group_norm, optimizer=partial(_adamw, lr=2e-3, decay=1e-2))
digits_gn_muon = partial(_digits, norm=_group_norm, optimizer=partial(_muon, decay=1e-2))
digits_bn_sgd = partial(_digits, norm=nn.BatchNorm2d, optimizer=partial(_sgd, lr=0.05))
digits_bn_adamw = partial(_digits, norm=nn.BatchNorm2d, optimizer=partial(_adamw, lr=2e-3, decay=1e-2))
digits_bn_muon = partial(_digits, norm=nn.BatchNorm2d, optimizer=partial(_muon, decay=1e-2))
digits_gn_rotation = partial(_digits, norm=_group_norm, optimizer=partial(_rotation, decay=1e-2))
bytes_sgd = partial(_bytes, optimizer=partial(_sgd, lr=0.1))
bytes_adamw = partial(_bytes, optimizer=partial(_adamw, lr=2e-3, decay=0.1))
bytes_muon = partial(_bytes, optimizer=partial(_muon, decay=0.1))
bytes_rotation = partial(_bytes, optimizer=partial(_rotation, decay=0.1))
_docs = partial(_bytes, text=_docstrings, width=48, blocks=8, updates=DOCS_UPDATES)
docs_sgd = partial(_docs, optimizer=partial(_sgd, lr=0.1))
docs_adamw = partial(_docs, optimizer=partial(_adamw, lr=2e-3, decay=0.1))
docs_muon = partial(_docs, optimizer=partial(_muon, decay=0.1))
