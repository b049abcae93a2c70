"""What a profile of layers measures, and that it leaves everything as it was."""

from __future__ import annotations

import functools
import gc
import itertools
import random
import time
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy
import pytest
import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn
from torch.nn import functional as F

from ds_ddg.analysis.balance import balance
from ds_ddg.partition import profile
from helpers.timed_layers import Sleeper


class Add(nn.Module):
    """A second input and an integer pass by."""

    def forward(self, values: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y, order = values
        return x + y, order


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        time.sleep(0.05)
        return gradient


def scripted(*durations: float) -> Callable[[], float]:
    """A clock that lets `durations` pass between its 1st and 2nd, its 3rd and 4th, ... reading."""
    readings = itertools.chain.from_iterable((0.0, duration) for duration in durations)
    return lambda: next(readings)


def test_the_median_of_the_runs_after_the_first_counts() -> None:
    runs = [(9, 9), (1, 20), (3, 40), (2, 30)]
    clock = scripted(*(second for run in runs for second in run))
    (cost,) = profile([LayerSpec(nn.Linear, 2, 2)], (torch.ones(1, 2), None), repetitions=3, clock=clock)
    assert (cost.name, cost.forward_ms, cost.backward_ms) == ("Linear", 2000, 30000)


def test_the_loss_counts_for_the_last_layer() -> None:
    # Linear, then ReLU, then the loss: an untimed run and a timed one of each, forward and backward.
    clock = scripted(0, 0, 1, 2, 0, 0, 3, 4, 0, 0, 10, 20)
    sample = torch.ones(4, 3), torch.zeros(4, dtype=torch.long)
    found = profile([nn.Linear(3, 5), F.relu], sample, F.cross_entropy, repetitions=1, clock=clock)
    assert [(c.name, c.forward_ms, c.backward_ms) for c in found] == [
        ("Linear", 1000, 2000),
        ("relu + cross_entropy", 13000, 24000),
    ]


def test_memory_of_each_layer() -> None:
    """Parameters; what is kept besides the input; the output. The input of a layer is the output of another."""
    layers = [
        nn.Linear(3, 5),
        nn.Tanh(),
        nn.Flatten(),
        nn.BatchNorm1d(5),
        lambda x: x * x.exp(),
        nn.ReLU(inplace=True),
    ]
    found = profile(layers, (torch.ones(4, 3), None), repetitions=1)
    out = 4 * 5 * 4
    assert [(c.parameter_bytes, c.activation_bytes, c.output_bytes) for c in found] == [
        (4 * (15 + 5), out, out),
        (0, out, out),
        (0, 0, out),
        (4 * 10, out + 2 * 5 * 4, out),  # mean and deviation of the batch
        (0, 2 * out, out),
        (0, 0, out),
    ]


def test_every_kind_of_layer() -> None:
    embed = functools.partial(TiedLayerSpec, "embed", nn.Embedding, 11, 6)
    layers = [
        lambda tokens: tokens.clamp(min=1),  # integers to integers: nothing to differentiate
        embed(),
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True)),
        lambda x: (x, x.detach().sum(-1, keepdim=True), torch.arange(len(x))),
        Add(),
        lambda values: values[0],
        embed(forward_fn=lambda module, x: F.linear(x, module.weight)),
    ]
    sample = torch.randint(11, (3, 5)), torch.randint(11, (3, 5))
    found = profile(layers, sample, lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    names = ["<lambda>", "Embedding", "Sequential", "<lambda>", "Add", "<lambda>", "Embedding + <lambda>"]
    assert [c.name for c in found] == names
    assert found[0].backward_ms == 0
    assert all(c.backward_ms > 0 for c in found[1:])
    assert found[1].parameter_bytes == found[6].parameter_bytes == 11 * 6 * 4
    assert found[3].output_bytes == 4 * (3 * 5 * 6 + 3 * 5) + 8 * 3


def test_a_frozen_stem_has_no_backward() -> None:
    stem = nn.Linear(3, 3).requires_grad_(False)
    found = profile([stem, nn.Linear(3, 3)], (torch.ones(2, 3), None))
    assert found[0].backward_ms == 0 < found[1].backward_ms


class Counting:
    """A loss that counts, as that of the ResNet recipe."""

    def __init__(self) -> None:
        self.calls = torch.zeros(())

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return (x - y).square().mean()


def frozen(*tensors: Tensor | None) -> list[bytes | None]:
    """As bytes: equal means equal to the last bit."""
    return [None if t is None else t.detach().numpy().tobytes() for t in tensors]


def randomness() -> list[Any]:
    return [random.getstate(), numpy.random.get_state()[1].tolist(), frozen(torch.get_rng_state())]


@pytest.mark.parametrize("fails", [False, True])
def test_a_profile_leaves_everything_as_it_was(fails: bool) -> None:
    last = nn.Linear(8, 5)
    net = nn.ModuleList(
        [nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2).eval(), nn.Dropout(), nn.ReLU(True), nn.Flatten(), last]
    )
    for parameter in net[:2].parameters():
        parameter.grad = torch.randn_like(parameter)
    noise = [lambda x: x * random.random() + numpy.random.rand(), LayerSpec(nn.Linear, 5, 5)]
    sample, loss = (torch.randn(4, 3, 4, 4), torch.randn(4, 4 if fails else 5)), Counting()

    def everything() -> list[Any]:
        parameters = list(net.parameters())
        tensors = [*net.state_dict().values(), *(p.grad for p in parameters), *sample, loss.calls]
        return [frozen(*tensors), [id(p) for p in parameters], [module.training for module in net.modules()]]

    before = everything(), randomness()
    with torch.no_grad():
        if fails:
            with pytest.raises(RuntimeError, match=r"loss_fn \(Counting\)"):
                profile([*net, *noise], sample, loss)
        else:
            profile([*net, *noise], sample, loss)
        assert not torch.is_grad_enabled()
    assert (everything(), randomness()) == before


def test_gradients_of_tensors_from_outside_are_put_back() -> None:
    with_gradient, without = torch.ones(3, requires_grad=True), nn.Linear(3, 3)
    with_gradient.grad = torch.full((3,), 7.0)
    (cost,) = profile([lambda x: without(x * with_gradient)], (torch.ones(2, 3), None))
    assert cost.backward_ms > 0
    assert with_gradient.grad.tolist() == [7, 7, 7]
    assert without.weight.grad is None


class Census(nn.Module):
    """Counts how many of its kind are alive."""

    alive: ClassVar[weakref.WeakSet[nn.Module]] = weakref.WeakSet()
    most: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        Census.alive.add(self)
        Census.most = max(Census.most, len(Census.alive))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_no_more_than_two_layers_are_alive_at_once() -> None:
    gc.collect()
    gc.disable()
    try:
        profile([LayerSpec(Census) for _ in range(6)], (torch.ones(2, 3), None), lambda x, _: x.sum())
        assert 1 <= Census.most <= 2
        assert not Census.alive
    finally:
        gc.enable()


@pytest.mark.parametrize("slow", [LayerSpec(Sleeper, 0.05), SlowBackward.apply])
def test_a_slow_layer_ends_alone_on_its_stage(slow: Any) -> None:
    layers = [Sleeper(), Sleeper(), slow, Sleeper(), Sleeper()]
    found = profile(layers, (torch.ones(2, 4), torch.ones(2, 4)), F.mse_loss, repetitions=3)
    assert balance(found, 3).parts == (0, 2, 3, 5)
    assert found[2].total_ms >= 50


class NoCopy(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("holds a socket")


BATCH = torch.ones(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: profile([nn.Linear(3, 3)], torch.ones(2, 3)),
            ValueError,
            r"(inputs, labels) .*got (2, 3) torch.float32",
        ),
        (lambda: profile([], BATCH), ValueError, "no layers to profile"),
        (lambda: profile(["relu"], BATCH), ValueError, "layer 0 (str) must be a LayerSpec, a module or a function"),
        (lambda: profile([F.relu], BATCH, repetitions=0), ValueError, "repetitions must be 1 or more, got 0"),
        (
            lambda: profile([F.relu, nn.Linear(4, 4)], BATCH),
            RuntimeError,
            "layer 1 (Linear) failed on (2, 3) torch.float32: .*shapes cannot be multiplied.*; the sample must be",
        ),
        (lambda: profile([F.relu], BATCH, nn.NLLLoss()), RuntimeError, "loss_fn (NLLLoss) failed on"),
        (
            lambda: profile([NoCopy(3, 3)], BATCH),
            RuntimeError,
            "layer 0 (NoCopy) cannot be copied.*holds a socket; pass it as a LayerSpec",
        ),
    ],
)
def test_what_cannot_be_profiled(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message.replace("(", r"\(").replace(")", r"\)")):
        call()
