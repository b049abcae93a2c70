"""Layers and micro-batches of every kind that stages exchange."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, cycle
from typing import Any

import torch
from torch import Tensor, nn

from helpers import toy

WIDTH = 12


class Enter(nn.Module):
    """Makes one tensor of each kind of (values, mask, order), those without a gradient between those with one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.level = nn.Parameter(torch.tensor([0.5]))

    def forward(self, values: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        x, mask, order = values
        length = x.shape[1]
        bias = torch.linspace(-1, 1, length * length).view(length, length)  # a float that nobody differentiates
        level = self.level[0] * 2.0
        flags = mask.to(torch.uint8)
        spin = torch.complex(self.linear(x[:, 0]), x[:, 1])
        return (
            mask,
            self.linear(x),
            bias,
            order,
            level,
            x.new_empty(0, 3),
            order.new_empty(0),
            flags,
            spin,
            bias.bfloat16(),
        )


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def any_length() -> list[nn.Module]:
    torch.manual_seed(7)
    return [nn.Linear(WIDTH, WIDTH), toy.Residual(WIDTH), toy.Residual(WIDTH), Mean(), nn.Linear(WIDTH, 5)]


def sequences(lengths: tuple[int, ...], each: int = 1) -> Iterator[Any]:
    """Yield sequences of the lengths given, in turn; `each`: micro-batches of one length."""
    generator = torch.Generator().manual_seed(3)
    for length in cycle(lengths):
        for _ in range(each):
            size = 3 + length % 3
            yield torch.randn(size, length, WIDTH, generator=generator), torch.randn(size, 5, generator=generator)


def say_so(engine: Any, call: int) -> None:
    """Tell the engine of another shape as curricula do it: on every rank, just before a call."""
    if call % 3 == 0:
        engine.reset_activation_shape()


class Attend(nn.Module):
    """Attention takes other kernels where the bias requires a gradient: a wrong flag shows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.2)

    def forward(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        mask, x, bias, order, level, none, nobody, flags, spin, half = values
        assert (mask.dtype, flags.dtype, order.dtype) == (torch.bool, torch.uint8, torch.int64)
        assert (none.shape, nobody.shape, level.shape) == ((0, 3), (0,), ())
        assert not bias.requires_grad
        heads = self.linear(self.norm(x)).unflatten(-1, (2, WIDTH // 2)).transpose(1, 2)
        seen = nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=bias)
        x = x[order] + self.drop(seen.transpose(1, 2).flatten(2)).masked_fill(mask[..., None], 0.0) * level
        x = x + flags[..., None] * half.float().mean() + none.sum()
        return mask, x, bias, order.flip(0), level * 1.1, none, nobody, flags, spin * (1 + 0.5j), half


class Leave(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 5)

    def forward(self, values: tuple[Tensor, ...]) -> Tensor:
        return self.linear(values[1].mean(1) + values[8].abs())


def every_kind() -> list[nn.Module]:
    torch.manual_seed(7)
    return [Enter(), Attend(), Attend(), Attend(), Leave()]


def labelled_by_two() -> Iterator[Any]:
    generator = torch.Generator().manual_seed(3)
    for _ in count():
        x, mask = torch.randn(4, 6, WIDTH, generator=generator), torch.rand(4, 6, generator=generator) > 0.7
        labels = torch.randint(5, (4,), generator=generator), torch.rand(4, generator=generator) > 0.3
        yield (x, mask, torch.randperm(4, generator=generator)), labels


def loss_of_two(outputs: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(labels, tuple)
    target, counts = labels
    assert counts.dtype == torch.bool
    return (nn.functional.cross_entropy(outputs, target, reduction="none") * counts).mean()
