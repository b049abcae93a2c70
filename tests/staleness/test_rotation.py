"""Adam in the eigenbasis of its gradients: against the formula, against AdamW, and where it is of use."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_ddg
from ds_ddg.staleness.rotation import BasisRotation

SETTINGS: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.95), "weight_decay": 0.1}


def gradient(step: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def trained(weight: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int = 7) -> Tensor:
    for step in range(steps):
        weight.grad = gradient(step, *weight.shape)
        optimizer.step()
    return weight.detach()


def start(*shape: int) -> nn.Parameter:
    return nn.Parameter(gradient(99, *shape))


def test_is_the_formula() -> None:
    """At refresh 1, in float64; with more columns than rows their basis would not be determined at first."""
    weight = start(4, 4)
    got = trained(weight, BasisRotation([weight], refresh=1, **SETTINGS))
    w, lr, (beta1, beta2), decay = start(4, 4).detach(), *SETTINGS.values()
    mean, square = torch.zeros(4, 4).double(), torch.zeros(4, 4).double()
    left, right = torch.zeros(4, 4).double(), torch.zeros(4, 4).double()
    for t in range(7):
        g = gradient(t, 4, 4)
        left = beta2 * left + (1 - beta2) * g @ g.T
        right = beta2 * right + (1 - beta2) * g.T @ g
        if t == 0:
            u, v = torch.linalg.eigh(left)[1].flip(1), torch.linalg.eigh(right)[1].flip(1)
        else:
            rows, columns = (torch.diag(b.T @ m @ b).argsort(descending=True) for b, m in ((u, left), (v, right)))
            u, v = torch.linalg.qr(left @ u[:, rows])[0], torch.linalg.qr(right @ v[:, columns])[0]
            square = square[rows][:, columns]
        mean = beta1 * mean + (1 - beta1) * g
        square = beta2 * square + (1 - beta2) * (u.T @ g @ v) ** 2
        step = (u.T @ mean @ v) / (1 - beta1 ** (t + 1)) / ((square / (1 - beta2 ** (t + 1))).sqrt() + 1e-8)
        w = w - lr * decay * w - lr * u @ step @ v.T
    # The first gradient is diagonal in its own basis, but for rounding, which eps bounds.
    assert torch.allclose(got, w, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("shape", "largest"), [((4,), 4096), ((2, 3, 4), 4096), ((3, 5), 2)])
def test_is_adamw_where_there_is_nothing_to_rotate(shape: tuple[int, ...], largest: int) -> None:
    weight, other = start(*shape), start(*shape)
    got = trained(weight, BasisRotation([weight], largest=largest, **SETTINGS))
    assert torch.allclose(got, trained(other, torch.optim.AdamW([other], **SETTINGS)), rtol=1e-9, atol=1e-12)


def test_bases_are_orthogonal_and_wait_for_the_refresh() -> None:
    weight = start(3, 5)
    optimizer = BasisRotation([weight], refresh=4, **SETTINGS)
    bases = []
    for step in range(6):
        weight.grad = gradient(step, 3, 5)
        optimizer.step()
        bases.append(optimizer.state[weight]["right_basis"].clone())
    assert all(torch.allclose(b @ b.T, torch.eye(5).double(), atol=1e-10) for b in bases)
    assert [torch.equal(a, b) for a, b in itertools.pairwise(bases)] == [True, True, True, False, True]


def test_a_large_side_is_not_rotated() -> None:
    weight = start(3, 5)
    optimizer = BasisRotation([weight], largest=4, **SETTINGS)
    trained(weight, optimizer)
    assert "left_basis" in optimizer.state[weight]
    assert "right_basis" not in optimizer.state[weight]


def test_resumes_to_the_last_bit() -> None:
    whole, half = start(3, 5), start(3, 5)
    one, other = BasisRotation([whole], refresh=2, **SETTINGS), BasisRotation([half], refresh=2, **SETTINGS)
    trained(whole, one)
    trained(half, other, 3)
    loaded = BasisRotation([half], refresh=2, **SETTINGS)
    loaded.load_state_dict(other.state_dict())
    for step in range(3, 7):
        half.grad = gradient(step, 3, 5)
        loaded.step()
    assert torch.equal(half, whole)


def test_refuses_parameters_that_have_been_flattened() -> None:
    weight = start(3, 5)
    optimizer = BasisRotation([weight])
    flat = nn.Parameter(weight.detach().flatten())
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match="flatten matrices"):
        optimizer.step()
    with pytest.raises(ValueError, match="refresh must be 1 or more, got 0"):
        BasisRotation([weight], refresh=0)


def loss_after(make: Any, delay: int) -> float:
    """Least squares whose curvature is steep along directions that are no coordinates, with late gradients."""
    torch.manual_seed(0)
    turn, _ = torch.linalg.qr(gradient(1, 8, 8))
    data = torch.diag(torch.logspace(0, 2, 8).double().sqrt()) @ turn
    weight, rest = nn.Parameter(gradient(2, 8, 8)), nn.Parameter(torch.zeros(1).double())
    optimizer = make([weight, rest])
    if delay:
        ds_ddg.delayed(optimizer, [[weight], [rest]], slack=delay - 1)
    losses = []
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        loss = (data @ weight + rest).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def test_delay_hurts_less_in_the_eigenbasis() -> None:
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.0}
    plain = [loss_after(lambda p: torch.optim.AdamW(p, **settings), delay) for delay in (0, 5)]
    rotated = [loss_after(lambda p: BasisRotation(p, **settings), delay) for delay in (0, 5)]
    assert rotated[1] < plain[1] / 4
    assert max(plain[0], rotated[0]) < 1e-6, "without delay both arrive"
