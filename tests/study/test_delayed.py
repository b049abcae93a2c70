"""``ds_ddg.delayed``: an ordinary loop against the oracle, to the last bit, and what could not be as in a pipeline."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ds_ddg
from ds_ddg.reference import Reference
from ds_ddg.staleness.apply import PREVIOUS_STEP
from ds_ddg.study import late_gradients
from helpers import stale_combos, stale_runs, toy
from helpers.stale_runs import CALLS, RULES, ByHand, Loop, Rule, train_oracle
from helpers.versus import trainable

pytestmark = pytest.mark.usefixtures("one_thread")


def delaying(stages: int, micro_batches: int, rule: Rule = RULES["off"]) -> Any:
    """What `Loop` delays its optimizer with, by modules."""
    return lambda net, optimizer: ds_ddg.delayed(
        optimizer, stale_runs.split(net, stages), micro_batches=micro_batches, rules=rule.staleness
    )


def loop(stages: int, micro_batches: int, rule: Rule = RULES["off"], **more: Any) -> Loop:
    return Loop(micro_batches, rule, delaying(stages, micro_batches, rule), **more)


def assert_equal(net: nn.Sequential, results: list[stale_runs.Result]) -> None:
    __tracebackhide__ = True
    for k, (part, result) in enumerate(zip(stale_runs.split(net, len(results)), results, strict=True)):
        assert all(map(torch.equal, toy.state(part), result.states[0])), f"stage {k}"


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", RULES)
def test_equals_the_oracle(stages: int, micro_batches: int, name: str) -> None:
    rule = RULES[name]
    # A scheduler sees the same groups whether it is made before or after.
    ours = loop(stages, micro_batches, rule, scheduler_first=micro_batches == 2)
    expected = train_oracle(stages, micro_batches, rule)
    assert ours.train(toy.batches(CALLS * micro_batches)) == expected[0].losses[:CALLS]
    assert_equal(ours.net, expected)
    if stages > 1 and name != "off":
        plain = train_oracle(stages, micro_batches, Rule(rule.optimizer, "off"))
        assert not all(map(torch.equal, expected[0].states[0], plain[0].states[0])), "the rule did nothing"


def test_no_state_is_kept_where_nothing_is_stale() -> None:
    ours = loop(4, 1, RULES["A"])
    ours.train(toy.batches(CALLS))
    last = set(stale_runs.split(ours.net, 4)[-1].parameters())
    for parameter, state in ours.optimizer.state.items():
        assert (PREVIOUS_STEP in state) == (parameter not in last)
    assert len(ours.optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ["off", "S", "A"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_resumes_with_the_gradients_in_flight(tmp_path: Path, name: str, micro_batches: int) -> None:
    rule = RULES[name]
    whole, first, other = (loop(4, micro_batches, rule) for _ in range(3))
    data = list(toy.batches(CALLS * micro_batches))
    whole.train(iter(data))
    half = CALLS // 2 * micro_batches
    first.train(iter(data[:half]), CALLS // 2)
    other.train(toy.batches(2 * micro_batches, seed=8), 2)
    saved = {"net": first.net.state_dict(), "optimizer": first.optimizer.state_dict()}
    torch.save({**saved, "scheduler": first.scheduler.state_dict()}, path := tmp_path / "saved.pt")
    saved = torch.load(path, weights_only=True)
    other.net.load_state_dict(saved["net"])
    other.optimizer.load_state_dict(saved["optimizer"])
    other.scheduler.load_state_dict(saved["scheduler"])
    other.train(iter(data[half:]), CALLS - CALLS // 2)
    assert all(map(torch.equal, toy.state(other.net), toy.state(whole.net)))


def test_refuses_the_state_of_other_delays() -> None:
    ours, other = loop(4, 1), loop(2, 1)
    ours.train(toy.batches(5), 5)
    with pytest.raises(ValueError, match="saved with other delays"):
        other.optimizer.load_state_dict(ours.optimizer.state_dict())
    plain = toy.OPTIMIZERS["sgd"](ours.net.parameters())
    ours.optimizer.load_state_dict(plain.state_dict())
    before = [p.detach().clone() for p in ours.net[0].parameters()]
    ours.train(toy.batches(3), 3)
    assert all(map(torch.equal, before, ours.net[0].parameters())), "nothing is in flight for stage 0 yet"


def test_resumes_with_other_rules_or_from_a_plain_optimizer() -> None:
    """The extrapolation goes on where the step before had one, and begins anew where it had not."""
    ours, off, plain = loop(4, 1, RULES["A"]), loop(4, 1, Rule("adamw", "off")), toy.OPTIMIZERS["adamw"]
    ours.train(toy.batches(6), 6)

    def keeps(optimizer: torch.optim.Optimizer) -> bool:
        return any(PREVIOUS_STEP in state for state in optimizer.state.values())

    before = ours.optimizer.state_dict()
    assert keeps(ours.optimizer)
    off.optimizer.load_state_dict(before)
    off.train(toy.batches(1), 1)
    assert not keeps(off.optimizer)
    between = plain(ours.net.parameters())
    between.load_state_dict(before)
    assert keeps(between), "it carries along what it does not know"
    ours.optimizer.load_state_dict(between.state_dict())
    assert not keeps(ours.optimizer)
    assert keeps(between)


@pytest.mark.parametrize("name", ["two groups", "two groups, clipped", "OneCycleLR", "OneCycleLR, clipped", "frozen"])
def test_steps_by_rules_with_all_that_optimizers_have(name: str) -> None:
    """Groups go across stages, and a scheduler cycles the momentum in each."""
    rule, stages, calls = RULES["S" if "clipped" in name else "A"], 4, 10
    key = "momentum" if "clipped" in name else "betas"
    make, schedules = toy.OPTIMIZERS[rule.optimizer], name.startswith("OneCycle")
    parameters_of = partial(stale_combos.two_kinds, key=key) if "groups" in name else trainable
    nets = [nn.Sequential(*stale_runs.layers()) for _ in range(2)]
    for net in nets if name == "frozen" else ():
        net[0].requires_grad_(False)
        net[4].up.requires_grad_(False)  # type: ignore[union-attr]
    net, copy = nets
    optimizer = make(parameters_of(net))
    ds_ddg.delayed(
        optimizer,
        stale_runs.split(net, stages),
        rules="auto" if "clipped" in name else rule.staleness,
        gradient_clipping=0.05 if "clipped" in name else 0.0,
    )
    scheduler = stale_combos.torchs_one_cycle(optimizer) if schedules else None
    parts = stale_runs.split(copy, stages)
    plain = [make(parameters_of(part)) for part in parts]
    oracle = Reference(
        parts,
        toy.loss_fn,
        [ByHand(it, replace(rule, clip=0.0), float(stages - 1 - k)) for k, it in enumerate(plain)],  # type: ignore[misc]
        clip=0.05 if "clipped" in name else 0.0,
        schedulers=[stale_combos.torchs_one_cycle(it) for it in plain] if schedules else (),
    )
    data = list(toy.batches(calls))
    for inputs, labels in data:
        toy.loss_fn(net(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    batches = iter(data)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
        for _ in data:
            oracle.train_batch(batches)
    assert all(map(torch.equal, toy.state(net), toy.state(copy)))


class Branches(nn.Module):
    """Takes one of two ways: each is unused in some passes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.ways = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor, way: int) -> Tensor:
        return self.head(self.ways[way](x))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_an_unused_parameter_keeps_its_delay(micro_batches: int) -> None:
    """By the equation: the sum over the call of the gradients of pass n - d, where that pass had one."""
    ways = [0, 0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0]
    inputs = torch.randn(len(ways), 2, 3, generator=torch.Generator().manual_seed(5))
    net, copy = Branches(), Branches()
    optimizer = ds_ddg.delayed(
        torch.optim.SGD(net.parameters(), lr=0.1),
        {"ways": 0, "head": 1},
        model=net,
        micro_batches=micro_batches,
        slack=1,
    )
    seen: list[list[Tensor | None]] = []
    parameters = list(copy.parameters())
    late = [2] * 4 + [0] * 2
    for call in range(len(ways) // micro_batches):
        ticks = range(call * micro_batches, (call + 1) * micro_batches)
        for n in ticks:
            net(inputs[n], ways[n]).square().sum().backward()
            loss = copy(inputs[n], ways[n]).square().sum()
            seen.append(list(torch.autograd.grad(loss, parameters, allow_unused=True)))
        for i, parameter in enumerate(parameters):
            due = [g for n in ticks if n >= late[i] and (g := seen[n - late[i]][i]) is not None]
            given = list(net.parameters())[i].grad
            assert (given is None) == (not due)
            if due and given is not None:
                assert torch.equal(given, sum(due[1:], start=due[0]))
                with torch.no_grad():
                    parameter.sub_(given, alpha=0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert all(map(torch.equal, net.parameters(), parameters))


def test_one_gradient_of_two_parameters_stays_two() -> None:
    """Autograd hands both the same tensor, and a clip in place must not reach the other's."""
    a, b, c = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = ds_ddg.delayed(torch.optim.SGD([a, b, c], lr=1.0), [[a, b], [c]])
    for _ in range(3):
        (((a + b) * c).sum()).backward()
    assert a.grad is not None
    assert b.grad is not None
    a.grad.mul_(0.0)
    assert torch.equal(b.grad, torch.full((2,), 2.0))
    del optimizer


def test_the_users_clip_sees_late_gradients() -> None:
    ours = loop(4, 1)
    first = next(iter(ours.net[0].parameters()))
    data = toy.batches(5)
    norms = []
    for inputs, labels in data:
        toy.loss_fn(ours.net(inputs), labels).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(ours.net[0].parameters(), 0.01)))
        assert (first.grad is None) == (len(norms) <= 3)
        ours.optimizer.step()
        ours.optimizer.zero_grad()
    assert norms[:3] == [0.0] * 3
    assert all(norm > 0 for norm in norms[3:])


def test_hooks_are_made_anew_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = loop(4, 2)
    expected.train(toy.batches(2 * CALLS))
    monkeypatch.setattr(late_gradients, "_HOOKED_FOR", 3)
    ours = loop(4, 2)
    ours.train(toy.batches(2 * CALLS))
    assert all(map(torch.equal, toy.state(ours.net), toy.state(expected.net)))


def test_muon_leaves_alone_what_has_no_gradient_yet() -> None:
    """It would: DeepSpeed puts zeros there, and decays the weights."""
    muon = pytest.importorskip("deepspeed.runtime.zero.muon.muon_optimizer").MuonWithAuxAdam
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for parameter in net.parameters():
        parameter.use_muon = parameter.dim() > 1
    matrices, vectors = ([p for p in net.parameters() if (p.dim() > 1) is wanted] for wanted in (True, False))
    optimizer = muon(
        [
            {"params": matrices, "use_muon": True, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
            {"params": vectors, "use_muon": False, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1},
        ]
    )
    ds_ddg.delayed(optimizer, [net[0], net[1]], rules="auto")
    before = [p.detach().clone() for p in net[0].parameters()]
    for moved in (False, True):
        net(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert [torch.equal(a, b) for a, b in zip(before, net[0].parameters(), strict=True)] == [not moved] * 2
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


# -- what could not be as in a pipeline -------------------------------------------------------------------------------


def small(**more: Any) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    return net, ds_ddg.delayed(torch.optim.SGD(net.parameters(), lr=0.1), [net[0], net[1]], **more)


def backward(net: nn.Module, times: int = 1) -> None:
    for _ in range(times):
        net(torch.ones(1, 2)).sum().backward()


def test_other_numbers_of_passes_are_refused() -> None:
    net, optimizer = small(micro_batches=2)
    backward(net)
    with pytest.raises(RuntimeError, match="1 backward passes before it, and micro_batches is 2"):
        optimizer.step()
    net, optimizer = small(micro_batches=2)
    backward(net, 2)
    optimizer.step()
    backward(net)
    optimizer.step()  # the end of an epoch
    backward(net, 3)
    with pytest.raises(RuntimeError, match="3 backward passes"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="0 backward passes"):
        optimizer.step()


def test_refuses_reentrant_checkpointing() -> None:
    net, optimizer = small()
    x = torch.ones(1, 2, requires_grad=True)

    def run(reentrant: bool) -> Tensor:
        return net[1](checkpoint(net[0], x, use_reentrant=reentrant)).sum()

    run(reentrant=False).backward()
    optimizer.step()
    run(reentrant=True).backward()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.step()


def test_gradients_that_go_elsewhere_are_refused() -> None:
    net, optimizer = small()
    backward(net)
    kept = net[1].weight.grad
    torch.autograd.grad(net(torch.ones(1, 2)).sum(), list(net.parameters()))
    with pytest.raises(RuntimeError, match=r"torch\.autograd\.grad"):
        optimizer.step()
    assert net[1].weight.grad is kept
    net, optimizer = small()
    with pytest.warns(UserWarning, match="create_graph"), pytest.raises(RuntimeError, match="create_graph=True"):
        net(torch.ones(1, 2)).sum().backward(create_graph=True)


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scalers_are_refused(fused: bool) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = ds_ddg.delayed(torch.optim.AdamW(net.parameters(), fused=fused), [net[0], net[1]])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(net(torch.ones(1, 2)).sum()).backward()
    with pytest.raises(RuntimeError, match="GradScaler divides late gradients"):
        scaler.step(optimizer)


def test_closures_and_late_thaws_are_refused() -> None:
    net, optimizer = small()
    backward(net)
    with pytest.raises(RuntimeError, match="given a closure"):
        optimizer.step(lambda: 0.0)
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    optimizer = ds_ddg.delayed(torch.optim.SGD(net.parameters(), lr=0.1), [net[0], net[1]])
    backward(net)
    optimizer.step()
    net[0].requires_grad_(True)
    backward(net)
    with pytest.raises(RuntimeError, match="was frozen, or not there, when the optimizer was delayed"):
        optimizer.step()


def test_what_the_optimizer_does_not_train_does_not_matter() -> None:
    """It may have a stage, and gradients."""
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    optimizer = ds_ddg.delayed(torch.optim.SGD([*net[0].parameters(), *net[2].parameters()], lr=0.1), list(net))
    before = [p.detach().clone() for p in net[0].parameters()]
    for moved in (False, False, True):
        backward(net)
        optimizer.step()
        optimizer.zero_grad()
        assert any(not torch.equal(a, b) for a, b in zip(before, net[0].parameters(), strict=True)) == moved


def test_what_cannot_be_delayed_is_refused() -> None:
    net, optimizer = small()
    with pytest.raises(ValueError, match="delayed already"):
        ds_ddg.delayed(optimizer, [net[0], net[1]])
    with pytest.raises(TypeError, match="innermost one"):
        ds_ddg.delayed(object(), [net[0], net[1]])  # type: ignore[type-var]
    plain = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="2 parameter"):
        ds_ddg.delayed(plain, [net[1]])
    with pytest.raises(ValueError, match="scale of your loss"):
        ds_ddg.delayed(plain, [net[0], net[1]], rules="auto")
    with pytest.raises(ValueError, match="unknown key 'lr'"):
        ds_ddg.delayed(plain, [net[0], net[1]], rules={"lr": 1})
    with pytest.raises(ValueError, match="slack must be 0 or more"):
        ds_ddg.delayed(plain, [net[0], net[1]], slack=-1)
