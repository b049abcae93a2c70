"""Weight versions in one process: a backward after updates equals one before them, whatever the optimizer does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_ddg.weights.versions import WeightVersions


class DataEdit(torch.optim.Optimizer):
    """Writes through ``.data``, as DeepSpeed's mixed-precision optimizers do: autograd does not notice."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad, alpha=0.1)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, foreach=False),
    "sgd_foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1, foreach=False),
    "adam_foreach": lambda p: torch.optim.Adam(p, 0.1, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    "data_edit": DataEdit,
}
UNNOTICED = ("data_edit", "adamw_fused", "sgd_fused")
"""Leave autograd's version counter alone."""


def network() -> nn.Sequential:
    """Every kind of layer that saves its weights in a way of its own; more than one of each, so that it shows."""
    torch.manual_seed(5)
    convolutions = [nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)]
    return nn.Sequential(*convolutions, nn.Flatten(1), nn.Linear(12, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8))


def run(net: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    """An input and the loss of a forward on it."""
    x = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    return x, net(x).square().mean()


def gradients(net: nn.Module, x: Tensor, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x, *net.parameters()]))


def at_once(net: nn.Module, seed: int) -> list[Tensor]:
    """The gradient at the present weights, by plain autograd on a copy."""
    twin = copy.deepcopy(net)
    return gradients(twin, *run(twin, seed))


def update(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()


def same(ours: list[Tensor], its: list[Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(ours, its, strict=True)]


@pytest.mark.parametrize("updates", [1, 2, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_late_backward_equals_one_before_the_updates(optimizer: str, updates: int) -> None:
    net, twin = network(), network()
    versions, steps = WeightVersions(net.parameters()), OPTIMIZERS[optimizer](net.parameters())
    plain = OPTIMIZERS[optimizer](twin.parameters())
    expected = at_once(net, 0)
    versions.remember(0)
    x, loss = run(net, 0)
    run(twin, 0)
    for seed in range(updates):
        with versions.updating():
            update(net, steps, seed)
        update(twin, plain, seed)
    assert versions.alive == 2
    with versions.using(0):
        got = gradients(net, x, loss)
    versions.forget(0)
    assert all(same(got, expected))
    assert all(same([*net.parameters(), *net.buffers()], [*twin.parameters(), *twin.buffers()])), "the updates differ"
    versions.assert_empty()
    assert versions.alive == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_autograd_alone_would_not_do(optimizer: str) -> None:
    """What the class is there for: without it the late backward fails or, worse, comes out wrong without a word."""
    net = network()
    steps = OPTIMIZERS[optimizer](net.parameters())
    expected = at_once(net, 0)
    x, loss = run(net, 0)
    update(net, steps, 0)
    if optimizer in UNNOTICED:
        assert not all(same(gradients(net, x, loss), expected))
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(net, x, loss)


@pytest.mark.parametrize("optimizer", ["sgd", "adam_foreach", "adamw_fused", "data_edit"])
@pytest.mark.parametrize(("delay", "micro_batches"), [(1, 1), (3, 1), (3, 2), (2, 4), (5, 3)])
def test_pipelined(optimizer: str, delay: int, micro_batches: int) -> None:
    """As a stage uses it: micro-batches of several versions in flight; the bound on copies is kept and reached."""
    net = network()
    versions, steps = WeightVersions(net.parameters()), OPTIMIZERS[optimizer](net.parameters())
    waiting: dict[int, tuple[Tensor, Tensor, list[Tensor]]] = {}
    most = 0
    for n in range(6 * micro_batches):
        expected = at_once(net, n)
        slot = n % (delay + 1)
        versions.remember(slot)
        waiting[slot] = (*run(net, n), expected)
        if n >= delay:
            slot = (n - delay) % (delay + 1)
            x, loss, expected = waiting.pop(slot)
            with versions.using(slot):
                assert all(same(gradients(net, x, loss), expected)), f"micro-batch {n - delay}"
            versions.forget(slot)
        if (n + 1) % micro_batches == 0:
            with versions.updating():
                update(net, steps, n)
        assert versions.in_flight == len(waiting)
        most = max(most, versions.alive)
    assert most == -(-delay // micro_batches) + 1


@pytest.mark.parametrize("updates", [1, 2, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_stash_a_backward_finds_the_newest_weights(optimizer: str, updates: int) -> None:
    """Old activations and new weights, by hand on two linear layers; one copy of the weights, and no complaint."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    versions, steps = WeightVersions(net.parameters(), stash=False), OPTIMIZERS[optimizer](net.parameters())
    first, second = net.parameters()
    old = second.detach().clone()
    x = torch.randn(5, 3, dtype=torch.double, requires_grad=True)
    versions.remember(0)
    hidden = torch.tanh(x @ first.T).detach()
    out = net(x)
    for _ in range(updates):
        with versions.updating():
            for p in net.parameters():
                p.grad = torch.ones_like(p)
            steps.step()
    assert versions.alive == 1
    assert not torch.allclose(old, second)
    error = torch.randn(5, 2, dtype=torch.double)
    with versions.using(0):
        got = torch.autograd.grad(out, [x, first, second], error)
    versions.forget(0)
    versions.assert_empty()
    inner = (error @ second * (1 - hidden**2)).detach()
    for ours, by_hand in zip(got, (inner @ first, inner.T @ x, error.T @ hidden), strict=True):
        torch.testing.assert_close(ours, by_hand.detach())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_stash_every_layer_can_be_differentiated(optimizer: str) -> None:
    net = network()
    versions, steps = WeightVersions(net.parameters(), stash=False), OPTIMIZERS[optimizer](net.parameters())
    expected = at_once(net, 0)
    versions.remember(0)
    x, loss = run(net, 0)
    with versions.updating():
        update(net, steps, 0)
    with versions.using(0):
        got = gradients(net, x, loss)
    assert not same(got, expected)[0], "the input's gradient passes through the weights"
    assert same(got, expected)[-1], "the last layer's does not pass through any"


def test_no_copy_without_need() -> None:
    """The last stage has nothing in flight when it updates: its weights stay where they are."""
    net = network()
    versions, steps = WeightVersions(net.parameters()), OPTIMIZERS["sgd"](net.parameters())
    home = [p.data_ptr() for p in net.parameters()]
    for n in range(3):
        versions.remember(0)
        x, loss = run(net, n)
        with versions.using(0):
            gradients(net, x, loss)
        versions.forget(0)
        with versions.updating():
            update(net, steps, n)
        assert versions.alive == 1
    assert [p.data_ptr() for p in net.parameters()] == home


def test_frozen_parameters_have_one_version() -> None:
    net = network()
    frozen = net[0].requires_grad_(False)
    home = frozen.weight.data_ptr()
    versions = WeightVersions(net.parameters())
    versions.remember(0)
    with versions.updating():
        pass
    assert versions.alive == 2
    assert frozen.weight.data_ptr() == home
    with pytest.raises(AssertionError, match="in flight"):
        versions.assert_empty()


def test_weights_come_back_after_a_failed_backward() -> None:
    net = network()
    versions, steps = WeightVersions(net.parameters()), OPTIMIZERS["sgd"](net.parameters())
    versions.remember(0)
    with versions.updating():
        update(net, steps, 0)
    newest = [p.detach().clone() for p in net.parameters()]

    def fail() -> None:
        assert not any(same(newest, list(net.parameters())))
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), versions.using(0):
        fail()
    assert all(same(newest, list(net.parameters())))


def test_an_optimizers_own_storage_is_unseen_by_old_graphs() -> None:
    """Mixed-precision and ZeRO optimizers write into a flat buffer whose views the parameters are."""
    torch.manual_seed(2)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3))
    parameters = list(net.parameters())
    flat = torch.cat([p.data.reshape(-1) for p in parameters])
    for p, view in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.data = view.view_as(p)
    versions = WeightVersions(parameters, pinned=True)
    inputs = torch.randn(6, 4, requires_grad=True)
    expected = torch.autograd.grad(net(inputs).square().sum(), [inputs, *parameters])

    versions.remember(0)
    loss = net(inputs).square().sum()
    for _ in range(2):
        with versions.updating():
            assert all(p.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for p in parameters)
            flat.add_(0.5)
    with versions.using(0):
        loss.backward()
    versions.forget(0)
    versions.assert_empty()
    for got, wanted in zip([inputs.grad, *(p.grad for p in parameters)], expected, strict=True):
        assert got is not None
        assert torch.equal(got, wanted)
    assert torch.equal(torch.cat([p.data.reshape(-1) for p in parameters]), flat), "the newest weights are in place"
