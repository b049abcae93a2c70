"""The oracle itself, against the equation written out and against results by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_ddg.reference import Reference

RATE = 0.1
mse = nn.functional.mse_loss


def network(stages: int) -> list[nn.Module]:
    torch.manual_seed(7)
    return [nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double() for _ in range(stages)]


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        yield (
            torch.randn(3, 4, dtype=torch.float64, generator=generator),
            torch.randn(3, 4, dtype=torch.float64, generator=generator),
        )


def sgd(stages: list[nn.Module]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(stage.parameters(), lr=RATE) for stage in stages]


def parameters(stages: list[nn.Module]) -> list[list[Tensor]]:
    return [[p.detach().clone() for p in stage.parameters()] for stage in stages]


def by_the_equation(stages: list[nn.Module], calls: int, micro_batches: int, slack: int) -> list[list[Tensor]]:
    """w_k^{t+1} = w_k^t - lr / M sum over n of [g_{n - d_k}]_k, g_j the gradient at w^{j // M}, as it stands."""
    gradients: list[list[tuple[Tensor, ...]]] = []
    data = batches(calls * micro_batches)
    for t in range(calls):
        for _ in range(micro_batches):
            inputs, labels = next(data)
            loss = mse(nn.Sequential(*stages)(inputs), labels)
            gradients.append([torch.autograd.grad(loss, list(s.parameters()), retain_graph=True) for s in stages])
        for k, stage in enumerate(stages):
            delay = (len(stages) - 1 - k) * (1 + slack)
            for n in range(t * micro_batches, (t + 1) * micro_batches):
                for index, parameter in enumerate(stage.parameters()):
                    if n >= delay:
                        parameter.data -= RATE / micro_batches * gradients[n - delay][k][index]
    return parameters(stages)


@pytest.mark.parametrize("slack", [0, 1])
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_is_the_equation(stages: int, micro_batches: int, slack: int) -> None:
    net = network(stages)
    oracle = Reference(net, mse, sgd(net), micro_batches, slack)
    data = batches(8 * micro_batches)
    for _ in range(8):
        oracle.train_batch(data)
    torch.testing.assert_close(parameters(net), by_the_equation(network(stages), 8, micro_batches, slack))


def test_one_stage_is_plain_training() -> None:
    net, plain = network(1), network(1)
    oracle = Reference(net, mse, [torch.optim.AdamW(net[0].parameters())])
    optimizer = torch.optim.AdamW(plain[0].parameters())
    data = batches(6)
    for inputs, labels in batches(6):
        optimizer.zero_grad()
        loss = mse(plain[0](inputs), labels)
        loss.backward()
        optimizer.step()
        assert oracle.train_batch(data) == loss
    for got, expected in zip(net[0].parameters(), plain[0].parameters(), strict=True):
        assert torch.equal(got, expected)


class Twice(nn.Module):
    """tanh(w tanh(w x)), of one number: its backward reads the weight as well as what the forward left."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.weight * torch.tanh(self.weight * x))


def derivatives(x: float, forward: float, backward: float) -> tuple[float, float]:
    """Of `Twice` by its weight and by x, where the forward had the one weight and the backward has the other."""
    inner = math.tanh(forward * x)
    outer = 1 - math.tanh(forward * inner) ** 2
    return outer * (inner + backward * (1 - inner**2) * x), outer * backward * (1 - inner**2) * backward


@pytest.mark.parametrize(
    "settings",
    [{"weights": w, "activations": a} for w in ("stash", "current") for a in ("keep", "recompute")],
    ids=lambda settings: "-".join(settings.values()),
)
def test_what_a_late_backward_sees(settings: dict[str, str]) -> None:
    """Two stages of one weight each, with y as the loss, by hand, until stage 0 goes back at another weight."""
    stages = [Twice(), Twice()]
    oracle = Reference(stages, lambda outputs, labels: outputs, sgd(stages), **settings)
    x, first, last = 0.8, [0.5], [0.5]  # the weights of the stages, call by call
    errors: list[float] = []
    for t in range(4):
        if t > 0:
            then, now = first[t - 1], first[t]
            forward = now if settings == {"weights": "current", "activations": "recompute"} else then
            backward = then if settings["weights"] == "stash" else now
            first.append(now - RATE * errors[-1] * derivatives(x, forward, backward)[0])
        else:
            first.append(first[0])
        h = math.tanh(first[t] * math.tanh(first[t] * x))
        by_weight, error = derivatives(h, last[t], last[t])
        last.append(last[t] - RATE * by_weight)
        errors.append(error)
        oracle.train_batch(iter([(torch.tensor(x, dtype=torch.float64), None)]))
    assert [stage.weight.item() for stage in stages] == pytest.approx([first[-1], last[-1]], rel=1e-12)
    assert len(set(first)) == 4


@pytest.mark.parametrize("weights", ["stash", "current"])
def test_module_used_twice_is_two_that_share_their_weights(weights: str) -> None:
    results = []
    for same in (True, False):
        torch.manual_seed(7)
        one, other, last = nn.Linear(4, 4).double(), nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        other.weight, other.bias = one.weight, one.bias
        before = one.weight
        stages = [nn.Sequential(one, nn.Tanh(), one if same else other), last]
        oracle = Reference(stages, mse, sgd(stages), weights=weights)
        data = batches(5)
        results.append([float(oracle.train_batch(data)) for _ in range(5)])
        assert one.weight is before, "the model has another parameter now"
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weights": "old"}, "weights must be 'stash' or 'current', got 'old'"),
        ({"activations": "x"}, "activations must be 'keep' or 'recompute', got 'x'"),
        ({"clip_by": "z"}, "clip_by must be 'stage' or 'global', got 'z'"),
        ({"micro_batches": 0}, "micro_batches must be 1 or more, got 0"),
        ({"slack": -1}, "slack must be 0 or more, got -1"),
        ({"clip": -1.0}, "clip must be 0 or more, got -1.0"),
        ({"optimizers": []}, "needs an optimizer for each stage, got 2 stages, 0 optimizers"),
    ],
)
def test_refuses_what_it_does_not_know(wrong: dict[str, Any], message: str) -> None:
    net = network(2)
    with pytest.raises(ValueError, match=message):
        Reference(**{"stages": net, "loss_fn": mse, "optimizers": sgd(net), **wrong})
