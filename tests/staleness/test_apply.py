"""Rules at work: what an optimizer finds in a step, what is left after it, and the steps against the formula."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_ddg.staleness.apply import PREVIOUS_STEP, StaleSteps
from ds_ddg.staleness.rules import Rules, Staleness

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
}
ALL = Rules(learning_rate=0.5, momentum="stretch", extrapolation=1.0)


class Derived(torch.optim.SGD):
    """As projects write them: torch's hooks run in both of its steps."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (4,))]


def set_gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def visible(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What a scheduler or a checkpoint sees of the groups."""
    return [{name: copy.copy(value) for name, value in group.items()} for group in optimizer.param_groups]


def trained(make: Callable[[Any], Any], rules: Rules | None, ages: list[Staleness]) -> tuple[list[Tensor], Any]:
    """Weights after a step at each of `ages`, and the optimizer."""
    weights = parameters()
    optimizer = make(weights)
    now = ages[:1]
    if rules is not None:
        StaleSteps(optimizer, rules, lambda parameters: {now[0]: parameters})
    for step, age in enumerate(ages):
        now[0] = age
        set_gradients(weights, step)
        optimizer.step()
    return [weight.detach().clone() for weight in weights], optimizer


def by_hand(name: str, rules: Rules, ages: list[Staleness]) -> list[Tensor]:
    """The same from the formula: another optimizer with the changed numbers, and u_t by hand."""
    weights = parameters()
    optimizer = OPTIMIZERS[name](weights)
    group = optimizer.param_groups[0]
    lr, key = group["lr"], "betas" if "betas" in group else "momentum"
    own = group[key]
    previous: list[Tensor | None] = [None] * len(weights)
    for step, age in enumerate(ages):
        s = age.updates
        factor = (1 + s) ** -rules.learning_rate
        group["lr"] = lr * (factor / (1 + s) if key == "momentum" else factor)
        stretched = 1 - (1 - (own if key == "momentum" else own[0])) / (1 + s)
        group[key] = (stretched if key == "momentum" else (stretched, own[1])) if s else own
        set_gradients(weights, step)
        before = [weight.detach().clone() for weight in weights]
        optimizer.step()
        with torch.no_grad():
            for i, weight in enumerate(weights):
                u = before[i] - weight
                if s:
                    weight.sub_(u, alpha=s)
                    if previous[i] is not None:
                        weight.add_(previous[i], alpha=s)
                previous[i] = u if s else None
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_the_formula(name: str) -> None:
    ages = [Staleness(s) for s in (3.0, 3.0, 3.0, 1.5, 0.0, 0.0, 1.0, 1.0)]
    got, _ = trained(OPTIMIZERS[name], ALL, ages)
    assert all(map(torch.equal, got, by_hand(name, ALL, ages)))
    plain, _ = trained(OPTIMIZERS[name], None, ages)
    assert not any(map(torch.equal, got, plain))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fresh_gradients_leave_no_trace(name: str) -> None:
    ages = [Staleness()] * 4
    got, ours = trained(OPTIMIZERS[name], ALL, ages)
    expected, plain = trained(OPTIMIZERS[name], None, ages)
    assert all(map(torch.equal, got, expected))
    assert str(ours.state_dict()) == str(plain.state_dict())


def test_groups_are_as_the_script_left_them() -> None:
    """After a step, and in it for those who hold a group: a scheduler may have cycled the momentum."""
    weights = parameters()
    optimizer = torch.optim.SGD([{"params": [weights[0]], "lr": 0.1}, {"params": [weights[1]]}], lr=0.2, momentum=0.9)
    given = optimizer.param_groups
    inside: list[tuple[float, float]] = []
    StaleSteps(optimizer, ALL, lambda parameters: {Staleness(3.0): parameters})
    optimizer.register_step_pre_hook(lambda o, *_: inside.extend((g["lr"], g["momentum"]) for g in o.param_groups))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    before = visible(optimizer)
    set_gradients(weights, 0)
    optimizer.step()
    assert optimizer.param_groups is given
    assert visible(optimizer) == before
    assert inside == [pytest.approx((0.0125, 0.975)), pytest.approx((0.025, 0.975))]
    scheduler.step()
    assert scheduler.get_last_lr() == [0.05, 0.1]


def test_a_group_is_split_by_the_age_of_its_gradients() -> None:
    weights = parameters()
    optimizer = torch.optim.SGD(weights, lr=0.1)
    StaleSteps(optimizer, Rules(learning_rate=1.0), lambda both: {Staleness(1.0): both[:1], Staleness(): both[1:]})
    before = [weight.detach().clone() for weight in weights]
    set_gradients(weights, 0)
    optimizer.step()
    for weight, start, rate in zip(weights, before, (0.05, 0.1), strict=True):
        assert torch.equal(weight, start.sub(weight.grad, alpha=rate))
    assert len(optimizer.param_groups) == 1
    assert all(map(torch.equal, optimizer.param_groups[0]["params"], weights))


def test_what_an_optimizer_notes_in_a_group_stays() -> None:
    """DeepSpeed's FusedAdam counts steps there."""

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1

    weights = parameters()
    optimizer = Counting(weights, lr=0.1)
    StaleSteps(optimizer, ALL, lambda parameters: {Staleness(2.0): parameters})
    for step in range(3):
        set_gradients(weights, step)
        optimizer.step()
    assert optimizer.param_groups[0]["count"] == 3
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_step_within_a_step_counts_once() -> None:
    ages = [Staleness(2.0)] * 3
    make = lambda p: Derived(p, lr=0.05, momentum=0.9, weight_decay=0.01)  # noqa: E731
    got, _ = trained(make, ALL, ages)
    expected, _ = trained(OPTIMIZERS["sgd"], ALL, ages)
    assert all(map(torch.equal, got, expected))


def test_the_outermost_of_steps_within_steps_counts() -> None:
    """Torch puts its hooks into the step of a class with the first optimizer of that class."""

    class Plain(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(parameter.grad, alpha=group["lr"])

    class Decaying(Plain):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(1 - group["lr"])

    ages, rules = [Staleness(2.0)] * 3, Rules(learning_rate=0.5, extrapolation=1.0)
    make = lambda p: Decaying(p, {"lr": 0.05})  # noqa: E731
    first, _ = trained(make, rules, ages)
    Plain(parameters(), {"lr": 0.05})
    then, optimizer = trained(make, rules, ages)
    assert all(map(torch.equal, first, then))
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_a_compiled_step_is_the_same() -> None:
    """To rounding, which tracing changes."""

    def compiled(weights: Any) -> Any:
        optimizer = OPTIMIZERS["adamw"](weights)
        optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
        return optimizer

    ages = [Staleness(2.0)] * 3
    got, optimizer = trained(compiled, ALL, ages)
    expected, _ = trained(OPTIMIZERS["adamw"], ALL, ages)
    torch.testing.assert_close(got, expected)
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_an_optimizer_around_another_shares_its_groups() -> None:
    class Around(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner.param_groups, {})
            self.inner, self.param_groups = inner, inner.param_groups

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

    ages = [Staleness(2.0)] * 3
    got, _ = trained(lambda p: Around(OPTIMIZERS["sgd"](p)), ALL, ages)
    expected, _ = trained(OPTIMIZERS["sgd"], ALL, ages)
    assert all(map(torch.equal, got, expected))


def test_a_step_that_failed_leaves_no_trace_in_the_next() -> None:
    class Failing(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise MemoryError
            return super().step(closure)

    weights = parameters()
    optimizer = Failing(weights, lr=0.05, momentum=0.9, weight_decay=0.01)
    StaleSteps(optimizer, ALL, lambda parameters: {Staleness(2.0): parameters})
    for step in range(3):
        set_gradients(weights, step)
        optimizer.fails = True
        with pytest.raises(MemoryError):
            optimizer.step()
        optimizer.fails = False
        optimizer.step()
    expected, _ = trained(OPTIMIZERS["sgd"], ALL, [Staleness(2.0)] * 3)
    assert all(map(torch.equal, weights, expected))
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    weights = parameters()
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    StaleSteps(optimizer, ALL, lambda parameters: {Staleness(2.0): parameters})
    set_gradients(weights, 0)
    weights[1].grad = None
    before = weights[1].detach().clone()
    optimizer.step()
    assert torch.equal(weights[1], before)
    assert not optimizer.state[weights[1]]
    assert PREVIOUS_STEP in optimizer.state[weights[0]]


def test_a_step_not_extrapolated_ends_the_extrapolation() -> None:
    """Or the next one that is would take off what the optimizer did long ago."""
    weights, optimizer = trained(OPTIMIZERS["adamw"], ALL, [Staleness(2.0)] * 2)
    assert all(PREVIOUS_STEP in state for state in optimizer.state.values())
    StaleSteps(optimizer, Rules(learning_rate=1.0), lambda parameters: {Staleness(2.0): parameters})
    optimizer.step()
    assert not any(PREVIOUS_STEP in state for state in optimizer.state.values())
    del weights


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_state_goes_with_that_of_the_optimizer(name: str) -> None:
    age = Staleness(2.0)
    whole, _ = trained(OPTIMIZERS[name], ALL, [age] * 6)
    half, optimizer = trained(OPTIMIZERS[name], ALL, [age] * 3)
    weights = [torch.nn.Parameter(weight.clone()) for weight in half]
    other = OPTIMIZERS[name](weights)
    StaleSteps(other, ALL, lambda parameters: {age: parameters})
    other.load_state_dict(optimizer.state_dict())
    for step in range(3, 6):
        set_gradients(weights, step)
        other.step()
    assert all(map(torch.equal, weights, whole))


def test_rules_of_an_engine_before_are_given_up() -> None:
    weights = parameters()
    optimizer = torch.optim.SGD(weights, lr=0.1)
    for _ in range(2):
        StaleSteps(optimizer, Rules(learning_rate=1.0), lambda parameters: {Staleness(1.0): parameters})
    start = weights[0].detach().clone()
    set_gradients(weights, 0)
    optimizer.step()
    assert torch.equal(weights[0], start.sub(weights[0].grad, alpha=0.05))


def test_refuses_what_it_cannot_change() -> None:
    around = type("Around", (torch.optim.Optimizer,), {"__init__": lambda self: None})  # as some wrappers are
    for it in (type("Own", (), {})(), around()):
        with pytest.raises(TypeError, match=rf"subclasses of torch\.optim\.Optimizer.*, got {type(it).__name__}"):
            StaleSteps(it, ALL, lambda parameters: {Staleness(): parameters})
    weights = parameters()
    optimizer = torch.optim.SGD(weights, lr=0.1)
    StaleSteps(optimizer, ALL, lambda parameters: {Staleness(1.0): parameters})
    set_gradients(weights, 0)
    with pytest.raises(ValueError, match="given a closure or gradients"):
        optimizer.step(lambda: 0.0)
    assert optimizer.param_groups[0]["lr"] == 0.1
