"""Number formats and DeepSpeed's optimizer wrappers, against the oracle in the same format, to the last bit.

The oracle knows nothing of formats: its stages hold bf16 weights, or run under autocast, and its optimizers keep fp32
masters of them, in a few lines of plain torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_ddg import reference
from ds_ddg.weights.optimizer_wrappers import with_a_parameter
from helpers import toy
from helpers.distributed import GetRanks
from helpers.formats import (
    CALLS,
    FORMATS,
    OPTIMIZERS,
    REFILL,
    Autocast,
    Format,
    Result,
    batches,
    build_engine,
    fp16_allowed,
    layers,
    loss_fn,
    parts_of,
    proving,
    train_engine,
    train_replicas,
    trainable,
)
from helpers.modes import DEFAULT, MODES

pytestmark = pytest.mark.usefixtures("one_thread")


class Mixed:
    """An optimizer of bf16 weights by way of fp32 masters."""

    def __init__(
        self, weights: Iterable[nn.Parameter], make: Callable[[Any], torch.optim.Optimizer], clip: float, form: Format
    ) -> None:
        self.weights = list(weights)
        self.masters = [nn.Parameter(w.detach().float()) for w in self.weights]
        self.inner, self.clip, self.scale = make(with_a_parameter(self.masters)), clip, form.scale
        if form.primed:
            for master in self.masters:
                master.grad = torch.zeros_like(master)
            self.inner.step()

    def step(self, known: float = 0.0) -> float:
        """By the `known` norm, if there is one; returns that of these gradients."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = SUMS.pop(weight).float() / self.scale
        gradients = [master.grad for master in self.masters if master.grad is not None]
        if not gradients:
            return 0.0
        norm = torch.stack([g.norm(2.0) for g in gradients]).square().sum().sqrt()
        if self.clip > 0:
            for gradient in gradients:
                gradient.mul_(torch.clamp(self.clip / ((torch.tensor(known) if known > 0 else norm) + 1e-6), max=1.0))
        self.inner.step()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)
        return float(norm)

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.grad = None


class MixedReference(reference.Reference):
    """Its optimizers clip for themselves, since they alone have the gradients in full."""

    def _update(self, k: int) -> float:
        known = self.norms[self.told - 1] if self.clip_globally and self.told > 0 else 0.0
        optimizer: Any = self.optimizers[k]
        norm: float = optimizer.step(known)
        optimizer.zero_grad()
        return norm**2


SUMS: dict[nn.Parameter, Tensor] = {}


def accumulate_in(dtype: torch.dtype) -> Callable[[Any, Any], None]:
    """In place of the oracle's own, which sums in the format of the weights."""

    def accumulate(parameters: Iterable[nn.Parameter], gradients: Iterable[Tensor | None]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            total = gradient.to(dtype)
            SUMS[parameter] = SUMS[parameter] + total if parameter in SUMS else total.clone()
            parameter.grad = SUMS[parameter].to(parameter.dtype)

    return accumulate


def train_oracle(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    stages: int,
    micro_batches: int,
    optimizer: str,
    ddg: dict[str, Any],
    clip: float = 0.0,
    dropout: bool = True,
    frozen: int | None = None,
) -> list[Result]:
    form = FORMATS[name]
    net = [layer.to(form.weights) for layer in layers(dropout, frozen)]
    torch.manual_seed(11)
    parts = parts_of(net, stages)
    modules: list[nn.Module] = [nn.Sequential(*net[a:b]) for a, b in itertools.pairwise(parts)]
    if form.autocast:
        modules = [Autocast(module) for module in modules]
    SUMS.clear()
    make = OPTIMIZERS[optimizer]
    optimizers: list[Any] = [make(with_a_parameter(trainable(module))) for module in modules]
    kind = reference.Reference
    if form.weights is not torch.float32:
        monkeypatch.setattr(reference, "_accumulate", accumulate_in(form.sums))
        optimizers = [Mixed(trainable(module), make, clip, form) for module in modules]
        kind = MixedReference
    settings = {"clip_by" if key == "clip" else key: value for key, value in ddg.items()}
    oracle = kind(
        modules,
        lambda o, y: loss_fn(o, y) * form.scale,
        optimizers,
        micro_batches=micro_batches,
        clip=clip,
        **settings,
    )
    data = batches((CALLS + REFILL) * micro_batches, form.weights)
    losses = []
    for calls in (CALLS, REFILL):
        losses += [oracle.train_batch(data) / form.scale for _ in range(calls)]
        oracle.drain()
    delay = -(-(stages - 1) // micro_batches)
    known = [losses[max(t - delay, 0)] for t in range(CALLS)]
    known += [losses[max(t - delay, CALLS - 1)] for t in range(CALLS, CALLS + REFILL)]
    return [Result(known, toy.state(module), norm=oracle.norms[-2]) for module in modules]


def assert_exact(got: list[Result], expected: list[Result]) -> None:
    for stage, (ours, its) in enumerate(zip(got, expected, strict=True)):
        assert [float(loss) for loss in ours.losses] == [float(loss) for loss in its.losses], f"stage {stage}"
        for index, (a, b) in enumerate(zip(ours.states, its.states, strict=True)):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), f"stage {stage}, tensor {index}: {float((a.float() - b.float()).abs().max())}"


@pytest.mark.parametrize(("weights", "activations"), MODES)
@pytest.mark.parametrize("name", proving(("weights", "activations")))
def test_equals_the_oracle(
    ranks: GetRanks, monkeypatch: pytest.MonkeyPatch, name: str, weights: str, activations: str
) -> None:
    stages, micro_batches, optimizer = (3, 2, "adamw") if activations == "keep" else (2, 1, "sgd")
    ddg = {"weights": weights, "activations": activations}
    got = ranks(stages).run(train_engine, name, micro_batches, optimizer, ddg, 0.0)
    bare = type(OPTIMIZERS[optimizer]([torch.zeros(1)])).__name__
    assert {result.wrapper for result in got} == {FORMATS[name].wrapper or bare}
    assert [result.collectives for result in got] == [0] * stages
    assert_exact(got, train_oracle(monkeypatch, name, stages, micro_batches, optimizer, ddg))


@pytest.mark.parametrize("mode", [MODES[0], MODES[1], MODES[3]], ids="-".join)
@pytest.mark.parametrize("name", proving("mode", ", a stage without anything to train"))
def test_stage_without_anything_to_train(
    ranks: GetRanks, monkeypatch: pytest.MonkeyPatch, name: str, mode: tuple[str, str]
) -> None:
    """First, last or in between; DeepSpeed's wrappers alone would fail there in their first step, or before."""
    weights, activations = mode
    frozen = {MODES[0]: 0, MODES[1]: 2, MODES[3]: 1}[mode]
    ddg = {"weights": weights, "activations": activations}
    got = ranks(3).run(train_engine, name, 2, "adamw", ddg, 0.0, frozen)
    assert [result.collectives for result in got] == [0, 0, 0]
    expected = train_oracle(monkeypatch, name, 3, 2, "adamw", ddg, frozen=frozen)
    assert_exact(got, expected)
    assert FORMATS[name].wrapper in (got[frozen].wrapper, "")
    start = [layer.to(FORMATS[name].weights) for layer in layers()]
    first, end = parts_of(start, 3)[frozen : frozen + 2]
    assert all(map(torch.equal, got[frozen].states, toy.state(nn.Sequential(*start[first:end])))), "it was to stay"


@pytest.mark.parametrize("name", proving(DEFAULT, ", clipped", exact=False))
def test_clips_by_the_norm_of_the_stage(ranks: GetRanks, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    run = (monkeypatch, name, 3, 1, "sgd", {})
    assert_clipped(ranks, name, "sgd", {}, 0.05, train_oracle(*run, 0.05), unlike=train_oracle(*run))


@pytest.mark.parametrize("name", proving(DEFAULT, ', "clip": "global"', exact=False))
def test_clips_by_the_norm_of_the_pipeline(ranks: GetRanks, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    globally, by_stage = (
        train_oracle(monkeypatch, name, 3, 1, "fast_sgd", {"clip": clip}, 0.2) for clip in ("global", "stage")
    )
    assert_clipped(ranks, name, "fast_sgd", {"clip": "global"}, 0.2, globally, unlike=by_stage)


def assert_clipped(
    ranks: GetRanks,
    name: str,
    optimizer: str,
    ddg: dict[str, Any],
    clip: float,
    expected: list[Result],
    unlike: list[Result],
) -> None:
    """DeepSpeed's wrappers clip with an arithmetic of their own: equal to rounding."""
    got = ranks(3).run(train_engine, name, 1, optimizer, ddg, clip)
    assert [result.collectives for result in got] == [0, 0, 0]
    fine = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}[FORMATS[name].weights]
    for ours, its, other in zip(got, expected, unlike, strict=True):
        assert ours.norm == got[0].norm, "the norm of the pipeline, which all ranks know alike"
        assert ours.norm == pytest.approx(its.norm, rel=fine), "without the loss scale"
        for a, b in zip(ours.states, its.states, strict=True):
            torch.testing.assert_close(a, b, rtol=fine, atol=fine / 10)
        pairs = zip(ours.states, other.states, strict=True)
        assert not all(torch.allclose(a, b, rtol=fine, atol=fine / 10) for a, b in pairs), "the clip was not at work"


@pytest.mark.parametrize("name", proving(DEFAULT, ", data x pipeline", False, ["fp32, ZeRO-1", "bf16, ZeRO-1"]))
def test_replicas_share_the_optimizer_states(ranks: GetRanks, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Data 2 x pipeline 2, both replicas on the same data: their mean is that of one."""
    got = ranks(4).run(train_replicas, name)
    expected = train_oracle(monkeypatch, name, 2, 2, "adamw", {}, dropout=False)
    fine = 2**-6 if FORMATS[name].weights is torch.bfloat16 else 1e-6
    for stage in range(2):
        first, second = got[2 * stage : 2 * stage + 2]
        assert all(map(torch.equal, first.states, second.states)), "replicas differ"
        for a, b in zip(first.states, expected[stage].states, strict=True):
            torch.testing.assert_close(a, b, rtol=fine, atol=fine)


@fp16_allowed()
def resume(rank: int, world_size: int, directory: str, name: str, frozen: int) -> list[tuple[Any, ...]]:
    """What four calls after a checkpoint come to: going on, and with another engine that loads it."""
    ddg = {"clip": "global"}
    one, other = (build_engine(world_size, name, 2, "adamw", ddg, 0.2, frozen) for _ in range(2))
    dtype = FORMATS[name].weights
    data = batches(10, dtype)
    for _ in range(5):
        one.train_batch(data)
    one.save_checkpoint(directory, client_state={"rng": torch.get_rng_state()})
    found = []
    for engine in (one, other):
        if engine is other:
            data = batches(8, dtype)
            for _ in range(4):
                other.train_batch(data)
            _, state = other.load_checkpoint(directory)
            torch.set_rng_state(state["rng"].cpu())
        data = itertools.islice(batches(20, dtype), 10, None)
        losses = [engine.train_batch(data).item() for _ in range(4)]
        norm = engine.get_global_grad_norm()
        engine.drain()
        found.append((losses, norm, toy.state(engine.module)))
    return found


# With bf16 and no ZeRO, DeepSpeed fails to load what it has saved, on any stage.
LOADABLE = [name for name in FORMATS if not name.startswith("bf16") or "ZeRO-1" in name]


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize("name", proving(DEFAULT, ", a stage without anything to train, resumed", names=LOADABLE))
def test_resumes_where_a_stage_has_nothing_to_train(ranks: GetRanks, tmp_path: Path, name: str, frozen: int) -> None:
    """With the norm of the pipeline that was known."""
    for one, other in ranks(3).run(resume, str(tmp_path), name, frozen):
        assert one[:2] == other[:2]
        assert all(map(torch.equal, one[2], other[2]))


@fp16_allowed()
def load_weights(rank: int, world_size: int, directory: str, name: str) -> list[list[Tensor]]:
    """Of an engine that was trained, and of another that loads them."""
    one, other = (build_engine(world_size, name, 2, "adamw", {}, 0.2, frozen=1) for _ in range(2))
    data = batches(10, FORMATS[name].weights)
    for _ in range(5):
        one.train_batch(data)
    one.save_checkpoint(directory)
    other.load_checkpoint(directory, load_module_only=True)
    other.train_batch(batches(2, FORMATS[name].weights))
    other.load_checkpoint(directory, load_module_only=True)
    return [toy.state(engine.module) for engine in (one, other)]


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in LOADABLE])
def test_loads_weights_where_a_stage_has_nothing_to_train(ranks: GetRanks, tmp_path: Path, name: str) -> None:
    for one, other in ranks(3).run(load_weights, str(tmp_path), name):
        assert all(map(torch.equal, one, other))


def synchronous(rank: int, world_size: int, name: str, frozen: int) -> Result:
    """Trained on DeepSpeed's own schedule, after two delayed calls at a learning rate of 0."""
    engine = build_engine(world_size, name, 2, "sgd", {}, frozen=frozen, dropout=False)
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(2):
        engine.train_batch(batches(2, FORMATS[name].weights))
    engine.schedule = "1f1b"
    engine.optimizer.state.clear()
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    data = batches((CALLS + REFILL) * 2, FORMATS[name].weights)
    losses = [engine.train_batch(data).clone() for _ in range(CALLS + REFILL)]
    return Result(losses, toy.state(engine.module))


# With fp32 sums DeepSpeed's own schedule adds up in another way, with or without such a stage.
SYNCHRONOUS = [name for name in FORMATS if "fp16" not in name and "fp32 sums" not in name]


@pytest.mark.parametrize(("name", "frozen"), [(name, 1 + index % 2) for index, name in enumerate(SYNCHRONOUS)])
def test_a_stage_without_training_on_deepspeeds_schedule(
    ranks: GetRanks, monkeypatch: pytest.MonkeyPatch, name: str, frozen: int
) -> None:
    """Its wrappers fail there on either schedule."""
    got = ranks(3).run(synchronous, name, frozen)
    [expected] = train_oracle(monkeypatch, name, 1, 2, "sgd", {}, dropout=False, frozen=frozen)
    for stage in got:
        assert [float(loss) for loss in stage.losses] == [float(loss) for loss in expected.losses]
    states = [tensor for stage in got for tensor in stage.states]
    assert all(map(torch.equal, states, expected.states))
    assert len(states) == len(expected.states)
