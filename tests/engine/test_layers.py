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

from helpers import toy
from helpers.distributed import GetRanks
from helpers.modes import MODE_BLOCKS
from helpers.versus import Setup, adamw, versus

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


class Average(nn.Module):
    """Subtracts a running mean, which it updates without a new version; `late`: and makes when it first runs."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", None if late else torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        seen = x.detach().mean(0)
        if self.mean is None:
            self.mean = seen.clone()
        out = torch.tanh(self.linear(x - self.mean.clone()))
        if self.training:
            self.mean.data.mul_(0.9).add_(seen, alpha=0.1)
        return out


def sharing_a_buffer(stages: int) -> list[nn.Module]:
    """Two counters of each stage count in one place."""
    net: list[nn.Module] = []
    for _ in range(stages):
        one, other = Counts(), Counts()
        other.seen = one.seen
        net += [one, other]
    return [*net[:-1], nn.Sequential(net[-1], head())]


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
    "a buffer written through .data": (partial(alike, Average, head), vectors),
    "a buffer of two modules": (sharing_a_buffer, vectors),
    "recurrent layers": (partial(alike, Recurrent, Mean), sequences),
    "attention with dropout": (partial(alike, Attention, Mean), sequences),
    "a module, and a weight, used twice on a stage": (twice, vectors),
}


def made(kind: str, stages: int) -> list[nn.Module]:
    torch.manual_seed(7)
    return KINDS[kind][0](stages)


@pytest.mark.parametrize("mode", MODE_BLOCKS, ids=lambda mode: "-".join(mode.values()))
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.proves(kind, modes="mode")) for kind in KINDS])
def test_kind_of_layer(ranks: GetRanks, kind: str, mode: dict[str, Any]) -> None:
    for stages in (2, 3):
        setup = Setup(partial(made, kind, stages), KINDS[kind][1], stages=stages, ddg=mode, optimizer=adamw)
        versus(ranks, setup)


def late(stages: int) -> list[nn.Module]:
    torch.manual_seed(7)
    return alike(partial(Average, late=True), head, stages)


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_buffer_that_appears_in_a_forward(ranks: GetRanks, activations: str) -> None:
    setup = Setup(partial(late, 3), vectors, stages=3, optimizer=adamw, ddg={"activations": activations})
    versus(ranks, setup)


@pytest.mark.parametrize("kind", ["spectral normalisation", "a buffer that its own forward changes"])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_checkpointed_layer_sees_buffers_of_its_first_run(ranks: GetRanks, kind: str, activations: str) -> None:
    """In plain PyTorch it would see those that the first run left behind."""
    more = {"module": {"activation_checkpoint_interval": 1}, "ddg": {"activations": activations}}
    versus(ranks, Setup(partial(made, kind, 3), vectors, stages=3, optimizer=adamw, **more))


def set_interval(engine: Any, call: int) -> None:
    if call == 5:
        engine.module.set_checkpoint_interval(1)


def test_checkpointing_switched_on_in_flight(ranks: GetRanks) -> None:
    versus(ranks, Setup(partial(made, "weight normalisation", 3), vectors, stages=3, before=set_interval))


def test_large_past_buffers_are_copied_once() -> None:
    from ds_ddg.weights.recompute import PastBuffers, with_past_buffers

    net, past = nn.Sequential(Counts(), nn.BatchNorm1d(WIDTH), toy.Residual(WIDTH)), PastBuffers()
    net[2].register_buffer("table", torch.zeros(300, 300))
    first, second = past.now(net), past.now(net)
    assert len(first) == 6
    assert first[net[0], "never"] is None
    same = {name for module, name in first if first[module, name] is second[module, name]}
    assert same == {"table", "never"}, "one that has not changed has two copies, or a small one has not"
    net[2].table += 1
    net(torch.randn(4, WIDTH))
    assert past.now(net)[net[2], "table"] is not first[net[2], "table"]
    with with_past_buffers(net, first):
        assert net[2].table.sum() == 0
        assert net[0].seen == 0
        net(torch.randn(4, WIDTH))
        assert net[0].seen == 1
    assert net[0].seen == 1
    assert first[net[0], "seen"] == 0
