"""Training with rules for stale gradients: by the engine, by `ds_ddg.delayed`, by the oracle with steps by hand."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ds_ddg.weights.optimizer_wrappers import with_a_parameter
from helpers import formats, toy
from helpers.census import census
from helpers.formats import Format

CALLS, REFILL = 9, 4


def unchanged(s: float) -> float:
    """Return the factor of a learning rate without a discount."""
    return 1.0


@dataclass(frozen=True)
class Discount:
    """The factor of a learning rate."""

    exponent: float
    tolerance: float = 0.0

    def __call__(self, s: float) -> float:
        """(1+s-s0)^-p for s above s0."""
        return float((1 + s - self.tolerance) ** -self.exponent) if s > self.tolerance else 1.0


@dataclass(frozen=True)
class Rule:
    """A way to step, as the config says it, and as numbers of s."""

    optimizer: str
    staleness: Any
    rate: Callable[[float], float] = unchanged
    stretch: bool = False
    lead: float = 0.0
    clip: float = 0.0
    everywhere: float = 0.0
    """The norm that stages without delay are clipped to, larger than `clip`."""


def muon(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """DeepSpeed's, for matrices (it fails on convolutions); Adam for the rest."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    parameters = list(parameters)
    groups: list[dict[str, Any]] = [
        {"use_muon": True, "lr": 0.02, "momentum": 0.9, "weight_decay": 0.1},
        {"use_muon": False, "lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1},
    ]
    for parameter in parameters:
        parameter.use_muon = parameter.dim() == 2  # type: ignore[attr-defined]
    halves = [[p for p in parameters if (p.dim() == 2) is group["use_muon"]] for group in groups]
    return MuonWithAuxAdam([{**group, "params": half} for group, half in zip(groups, halves, strict=True) if half])


def rotation(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW in rotated bases."""
    from ds_ddg.staleness.rotation import BasisRotation

    return BasisRotation(parameters, lr=0.01, refresh=2)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {**toy.OPTIMIZERS, "muon": muon, "rotation": rotation}

RULES = {
    "off": Rule("sgd", "off"),
    "S": Rule("sgd", {"rules": "auto", "clip": 0.05}, Discount(1.75, 1.0), stretch=True, lead=3.0, clip=0.05),
    "A": Rule("adamw", "auto", Discount(0.5, 1.0), stretch=True, lead=3.0),
    "A, fused": Rule("fused_adamw", "auto", Discount(0.5, 1.0), stretch=True, lead=3.0),
    "Muon's": Rule("sgd", {"learning_rate": 1}, Discount(1.0)),
}
MORE_RULES = {
    "muon": Rule("muon", "auto"),
    "rotation": Rule("rotation", {"learning_rate": 0.5, "extrapolation": 0.5}),
    "fading": Rule("adamw", {"learning_rate": 1.0, "anneal": 6, "momentum": "asyncpp"}),
}
"""Without a `ByHand`."""


class ByHand:
    """The optimizer of one stage of the oracle, with steps from the formulas.

    Args:
        optimizer: the plain one.
        rule: the formulas.
        s: the staleness of the stage.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rule: Rule, s: float) -> None:
        self.optimizer, self.rule, self.s = optimizer, rule, s
        self.param_groups = optimizer.param_groups
        self.zero_grad = optimizer.zero_grad
        self.previous: dict[Tensor, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return all but the staleness."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        previous = {i: self.previous[p].clone() for i, p in enumerate(parameters) if p in self.previous}
        return {"optimizer": self.optimizer.state_dict(), "previous": previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.param_groups = self.optimizer.param_groups
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.previous = {parameters[i]: step for i, step in state["previous"].items()}

    @torch.no_grad()
    def step(self) -> None:
        """Step, with the optimizer's own numbers put back afterwards."""
        rule, s = self.rule, self.s
        masters = self.optimizer if hasattr(self.optimizer, "take_gradients") else None
        if masters is not None:
            masters.take_gradients()
        own_parameters = (p for group in self.param_groups for p in group["params"])
        parameters = [p for p in getattr(self.optimizer, "parameters", own_parameters) if p.grad is not None]
        if largest := rule.clip if s > 0 else rule.everywhere:
            norm = torch.stack([p.grad.norm() for p in parameters]).square().sum().sqrt()
            for parameter in parameters:
                parameter.grad.mul_(torch.clamp(torch.tensor(largest) / (norm + 1e-6), max=1.0))
        if s == 0 or rule.staleness == "off":
            self.previous.clear()
            self.optimizer.step()
            return
        own = [dict(group) for group in self.param_groups]
        for group in self.param_groups:
            sums = rule.stretch and "betas" not in group
            group["lr"] = group["lr"] * (rule.rate(s) / (1 + s) if sums else rule.rate(s))
            if rule.stretch and "betas" in group:
                group["betas"] = (1 - (1 - group["betas"][0]) / (1 + s), group["betas"][1])
            elif rule.stretch:
                group["momentum"] = 1 - (1 - group["momentum"]) / (1 + s)
        before = [p.clone() for p in parameters]
        self.optimizer.step()
        for group, values in zip(self.param_groups, own, strict=True):
            group.update({name: values[name] for name in ("lr", "betas", "momentum") if name in values})
        for parameter, value in zip(parameters, before, strict=True):
            u = value - parameter
            if rule.lead:
                parameter.sub_(u, alpha=rule.lead * s)
                if parameter in self.previous:
                    parameter.add_(self.previous[parameter], alpha=rule.lead * s)
            self.previous[parameter] = u
        if masters is not None:
            masters.give_weights()


class Masters:
    """By way of fp32 copies of a stage's weights, as DeepSpeed's wrappers step.

    Args:
        weights: those of the stage.
        form: their format.
        make: makes the optimizer of the copies.
    """

    def __init__(self, weights: Iterable[nn.Parameter], form: Format, make: Callable[[Any], ByHand]) -> None:
        self.weights, self.scale = list(weights), form.scale
        self.copies = [nn.Parameter(weight.detach().float()) for weight in self.weights]
        self.inner = make(with_a_parameter(self.copies))
        if form.primed:
            for copy in self.copies:
                copy.grad = torch.zeros_like(copy)
            self.inner.optimizer.step()

    @torch.no_grad()
    def step(self) -> None:
        """With what Reference has summed, without the scale of the loss."""
        for weight, copy in zip(self.weights, self.copies, strict=True):
            copy.grad = None if weight.grad is None else weight.grad.float() / self.scale
        if self.copies:
            self.inner.step()
        for weight, copy in zip(self.weights, self.copies, strict=True):
            weight.copy_(copy)

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.grad = None


def train_oracle_in(name: str, stages: int, micro_batches: int, rule: Rule, frozen: int | None) -> list[list[Tensor]]:
    """As `formats.train_engine` does it; the states of the stages at the end."""
    from ds_ddg.reference import Reference

    form = formats.FORMATS[name]
    net: list[nn.Module] = [*split([layer.to(form.weights) for layer in formats.layers(frozen=frozen)], stages)]
    torch.manual_seed(11)
    optimizers: Any = []
    for k, stage in enumerate(net):
        s = (stages - 1 - k) / micro_batches
        make = lambda weights, s=s: ByHand(formats.OPTIMIZERS[rule.optimizer](weights), rule, s)  # noqa: E731
        optimizers.append(Masters(formats.trainable(stage), form, make))
    if form.autocast:
        net = [formats.Autocast(stage) for stage in net]
    trainer = Reference(net, lambda out, y: formats.loss_fn(out, y) * form.scale, optimizers, micro_batches)
    data = formats.batches((formats.CALLS + formats.REFILL) * micro_batches, form.weights)
    for count in (formats.CALLS, formats.REFILL):
        for _ in range(count):
            trainer.train_batch(data)
        trainer.drain()
    return [toy.state(stage) for stage in net]


def layers() -> list[nn.Module]:
    """Return the toy model without dropout: the stages have random numbers of their own."""
    net = toy.layers()
    for layer in net:
        for module in layer.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return net


def split(net: Iterable[nn.Module], stages: int) -> list[nn.Sequential]:
    """As DeepSpeed's "uniform" splits it."""
    from deepspeed.runtime.utils import partition_uniform

    net = list(net)
    return [nn.Sequential(*net[a:b]) for a, b in itertools.pairwise(partition_uniform(len(net), stages))]


@dataclass
class Result:
    """What is left to compare of one stage."""

    losses: list[float] = field(default_factory=list)
    states: list[list[Tensor]] = field(default_factory=list)
    """At the end of the first calls, after the drain, and after the calls and the drain that follow."""


def train_oracle(
    stages: int, micro_batches: int, rule: Rule, calls: int = CALLS, refill: int = REFILL
) -> list[Result]:
    """Train with a learning rate that is halved every third call."""
    from ds_ddg.reference import Reference

    net = split(layers(), stages)
    plain = [toy.OPTIMIZERS[rule.optimizer](stage.parameters()) for stage in net]
    optimizers: Any = [ByHand(optimizer, rule, (stages - 1 - k) / micro_batches) for k, optimizer in enumerate(plain)]
    trainer = Reference(net, toy.loss_fn, optimizers, micro_batches, schedulers=[halving(it) for it in plain])
    results = [Result() for _ in range(stages)]
    data = toy.batches((calls + refill) * micro_batches)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
        for count in (calls, refill):
            for _ in range(count):
                loss = float(trainer.train_batch(data))
                for result in results:
                    result.losses.append(loss)
            for drained in (False, True):
                if drained:
                    trainer.drain()
                for result, stage in zip(results, net, strict=True):
                    result.states.append(toy.state(stage))
    return results


def halving(optimizer: Any) -> Any:
    """Return a scheduler that halves the learning rate every third call."""
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)


class Loop:
    """A plain loop over the model, with a delayed optimizer.

    Args:
        micro_batches: M.
        rule: the optimizer.
        delay: what is done to the optimizer, given the layers.
    """

    def __init__(
        self, micro_batches: int, rule: Rule, delay: Callable[[nn.Sequential, Any], Any], scheduler_first: bool = False
    ) -> None:
        self.micro_batches = micro_batches
        self.net = nn.Sequential(*layers())
        self.optimizer = OPTIMIZERS[rule.optimizer](self.net.parameters())
        if scheduler_first:
            self.scheduler = halving(self.optimizer)
        assert delay(self.net, self.optimizer) is self.optimizer
        if not scheduler_first:
            self.scheduler = halving(self.optimizer)

    def train(self, data: Iterator[tuple[Tensor, Tensor]], calls: int = CALLS) -> list[float]:
        """Return the loss of each call."""
        losses = []
        for _ in range(calls):
            total = torch.zeros(())
            for _ in range(self.micro_batches):
                inputs, labels = next(data)
                loss = toy.loss_fn(self.net(inputs), labels)
                (loss / self.micro_batches).backward()
                total = total + loss.detach()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            losses.append(float(total / self.micro_batches))
        return losses


@dataclass
class Seen:
    """What the training of one stage left to compare."""

    states: list[list[Tensor]]
    """As of `Result`."""
    groups: list[tuple[Any, ...]]
    """Learning rate, and momentum or betas, that a script sees after each of the first calls."""
    keys: set[str]
    """Of the state of its optimizer."""
    collectives: int
    """Across stages, in the last of the first calls."""
    norm: float | None


def build_engine(stages: int, micro_batches: int, optimizer: str, staleness: Any, **ddg: Any) -> Any:
    """On the ranks of this process group."""
    from deepspeed.pipe import PipelineModule

    import ds_ddg

    net = PipelineModule(layers(), num_stages=stages, loss_fn=toy.loss_fn, partition_method="uniform")
    return ds_ddg.initialize(
        model=net,
        config=toy.config(micro_batches, {"staleness": staleness, **ddg}),
        optimizer=OPTIMIZERS[optimizer],
        model_parameters=list(net.parameters()),
        lr_scheduler=halving,
    )[0]


def train_engines(rank: int, world_size: int, rules: Iterable[Rule], micro_batches: int) -> list[Seen]:
    """One engine after another."""
    found = []
    for rule in rules:
        engine = build_engine(world_size, micro_batches, rule.optimizer, rule.staleness)
        data = toy.batches((CALLS + REFILL) * micro_batches)
        states, groups = [], []
        for count in (CALLS, REFILL):
            for _ in range(count):
                with census() as seen:
                    engine.train_batch(data)
                group = engine.optimizer.param_groups[0]
                groups.append((group["lr"], group["betas"] if "betas" in group else group["momentum"]))
            across = sum(count for (_, group), count in seen.items() if len(group) > 1)
            states.append(toy.state(engine.module))
            engine.drain()
            states.append(toy.state(engine.module))
        keys = {key for state in engine.optimizer.state.values() for key in state}
        found.append(Seen(states, groups, keys, across, engine.get_global_grad_norm()))
    return found


def resume_in(rank: int, world_size: int, name: str, staleness: Any, directory: str) -> list[list[Tensor]]:
    """States after four calls behind a checkpoint: going on, and with another engine that loads it."""
    one, other = (
        formats.build_engine(world_size, name, 2, "adamw", {"staleness": staleness}, dropout=False) for _ in range(2)
    )
    data = list(formats.batches(18, formats.FORMATS[name].weights))
    first, rest = data[:10], data[10:]
    seen = iter(first)
    for _ in range(5):
        one.train_batch(seen)
    one.save_checkpoint(directory)
    other.train_batch(iter(rest[:2]))
    other.load_checkpoint(directory)
    found = []
    for engine in (one, other):
        data_left = iter(rest)
        for _ in range(4):
            engine.train_batch(data_left)
        engine.drain()
        found.append(toy.state(engine.module))
    return found


def build_refused(rank: int, world_size: int, optimizer: str, staleness: Any, ddg: dict[str, Any]) -> str:
    """Return the error that every rank is to raise."""
    try:
        build_engine(world_size, 1, optimizer, staleness, **ddg)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """With weight decay."""
    return toy.OPTIMIZERS["adamw"](parameters)


def change(engine: Any, call: int) -> None:
    """To DeepSpeed's schedule and back, then to more micro-batches."""
    if call in (3, 6):
        engine.schedule = {3: "1f1b", 6: "ddg"}[call]
    if call == 8:
        engine.set_train_batch_size(4 * 3)
