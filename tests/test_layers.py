"""Layers that do more than map an input with weights of their own: bit for bit as in one process, in every mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

import toy
from versus import MODES, GetRanks, Setup, adamw, versus

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, CLASSES = 12, 5


def vectors() -> Iterator[Any]:
    generator = torch.Generator().manual_seed(3)
    for _ in count():
        yield torch.randn(4, WIDTH, generator=generator), torch.randn(4, CLASSES, generator=generator)


def sequences() -> Iterator[Any]:
    generator = torch.Generator().manual_seed(3)
    for _ in count():
        yield torch.randn(4, 6, WIDTH, generator=generator), torch.randn(4, CLASSES, generator=generator)


class WritesIntoItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x += 0.5
        return self.linear(torch.tanh(x)).add_(1.0)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True, dropout=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lstm(x)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 3, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean(1))


class Counts(nn.Module):
    """Its forward depends on how often it has run in training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("never", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return torch.tanh(self.linear(x)) / self.seen.clone()


def twice(stages: int) -> list[nn.Module]:
    """One module, and one parameter, in two layers of each stage."""
    net: list[nn.Module] = []
    for _ in range(stages):
        layer, other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        other.weight = layer.weight
        net += [layer, nn.Tanh(), layer, nn.Tanh(), other]
    net[-1] = nn.Linear(WIDTH, CLASSES)
    return net


def alike(make: Callable[[], nn.Module], last: Callable[[], nn.Module], stages: int) -> list[nn.Module]:
    return [*(make() for _ in range(2 * stages - 1)), last()]


def head() -> nn.Module:
    return nn.Linear(WIDTH, CLASSES)


def normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh())


def behind_relu(stages: int) -> list[nn.Module]:
    """Each later stage begins with a layer that overwrites what came in."""
    net = [layer for _ in range(stages) for layer in (nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH))]
    return [*net[1:-1], nn.Linear(WIDTH, CLASSES)] if stages == 1 else [nn.Linear(WIDTH, WIDTH), *net[1:-1], head()]


KINDS: dict[str, tuple[Callable[[int], list[nn.Module]], Callable[[], Iterator[Any]]]] = {
    "layers that write into their input": (partial(alike, WritesIntoItsInput, head), vectors),
    "an in-place layer at the border": (behind_relu, vectors),
    "weight normalisation": (partial(alike, partial(normed, parametrizations.weight_norm), head), vectors),
    "spectral normalisation": (partial(alike, partial(normed, parametrizations.spectral_norm), head), vectors),
    "spectral normalisation by hooks": (partial(alike, partial(normed, spectral_norm), head), vectors),
    "a buffer that its own forward changes": (partial(alike, Counts, head), vectors),
    "recurrent layers": (partial(alike, Recurrent, Mean), sequences),
    "attention with dropout": (partial(alike, Attention, Mean), sequences),
    "a module, and a weight, used twice on a stage": (twice, vectors),
}


def made(kind: str, stages: int) -> list[nn.Module]:
    torch.manual_seed(7)
    return KINDS[kind][0](stages)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(mode.values()))
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.proves(kind)) for kind in KINDS])
def test_kind_of_layer(ranks: GetRanks, kind: str, mode: dict[str, Any]) -> None:
    for stages in (2, 3):
        setup = Setup(partial(made, kind, stages), KINDS[kind][1], stages=stages, ddg=mode, optimizer=adamw)
        versus(ranks, setup)


@pytest.mark.parametrize("kind", ["spectral normalisation", "a buffer that its own forward changes"])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_checkpointed_layer_sees_the_buffers_of_its_first_run(ranks: GetRanks, kind: str, activations: str) -> None:
    """In plain PyTorch it would see those that the first run left behind."""
    more = {"module": {"activation_checkpoint_interval": 1}, "ddg": {"activations": activations}}
    versus(ranks, Setup(partial(made, kind, 3), vectors, stages=3, optimizer=adamw, **more))


def test_past_buffers_are_copied_once() -> None:
    from ds_ddg.local import PastBuffers, with_past_buffers

    net, past = nn.Sequential(Counts(), nn.BatchNorm1d(WIDTH), toy.Residual(WIDTH)), PastBuffers()
    first, second = past.now(net), past.now(net)
    assert len(first) == 4
    assert all(first[place] is second[place] for place in first), "nothing has changed, but there are two copies"
    net(torch.randn(4, WIDTH))
    third = past.now(net)
    for place in ((net[0], "seen"), (net[1], "num_batches_tracked")):
        assert first[place] is not third[place]
    with with_past_buffers(net, first):
        assert net[0].seen == 0
        net(torch.randn(4, WIDTH))
        assert net[0].seen == 1
    assert net[0].seen == 1
    assert first[net[0], "seen"] == 0
