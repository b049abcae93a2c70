"""The toy model trained by the engine and by the oracle, in every setting of the schedule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from helpers import toy

CALLS, REFILL = 10, 3


@dataclass(frozen=True)
class Case:
    """One way to train: what both the engine and the oracle need to know."""

    stages: int
    micro_batches: int = 1
    slack: int = 0
    weights: str = "stash"
    activations: str = "keep"
    tuples: bool = False
    optimizer: str = "sgd"
    clip: float = 0.0

    def __str__(self) -> str:
        kind = "tuple" if self.tuples else "tensor"
        name = f"K{self.stages}-M{self.micro_batches}-slack{self.slack}-{self.weights}-{self.activations}-{kind}"
        return f"{name}-{self.optimizer}" + (f"-clip{self.clip}" if self.clip else "")

    @property
    def ddg(self) -> dict[str, Any]:
        """Return the ``ddg`` block of the config."""
        return {"weights": self.weights, "activations": self.activations, "slack": self.slack}

    def data(self, seed: int = 3) -> Iterator[tuple[Tensor, Tensor]]:
        """Return as many micro-batches as `train` takes."""
        return toy.batches((CALLS + REFILL) * self.micro_batches, seed=seed)

    def engine(self, **more: Any) -> Any:
        """Make the engine of this rank; `more` goes to `toy.engine`."""
        settings = {"ddg": self.ddg, "tuples": self.tuples, "gradient_clipping": self.clip, **more}
        return toy.engine(self.stages, self.micro_batches, self.optimizer, **settings)

    def reference(self) -> Any:
        """Make the oracle."""
        settings = {"micro_batches": self.micro_batches, "clip": self.clip, **self.ddg}
        return toy.reference(self.stages, self.optimizer, self.tuples, **settings)

    def known(self, losses: list[Tensor]) -> list[Tensor]:
        """Return what each call of the engine returns, of the losses of all calls: the newest known without a wait."""
        delay = -(-(self.stages - 1) * (1 + self.slack) // self.micro_batches)
        filled = [max(t - delay, 0) for t in range(CALLS)]
        # A drain waits for the loss of the last call before it.
        refilled = [max(t - delay, CALLS - 1) for t in range(CALLS, CALLS + REFILL)]
        return [losses[t] for t in (*filled, *refilled)]


@dataclass
class Course:
    """The results of one stage's training to compare."""

    losses: list[Tensor] = field(default_factory=list)
    """The loss that every call returned."""
    rates: list[float] = field(default_factory=list)
    """The learning rate after every call."""
    states: dict[str, list[Tensor]] = field(default_factory=dict)
    """Parameters and buffers at four moments."""


def train(trainer: Any, data: Iterator[Any], stages: list[tuple[nn.Module, Any]]) -> list[Course]:
    """Train, drain, train on from the empty pipeline, drain; `stages`: the modules and optimizers to watch."""
    courses = [Course() for _ in stages]

    def snapshot(moment: str) -> None:
        for course, (module, _) in zip(courses, stages, strict=True):
            course.states[moment] = toy.state(module)

    for calls, moment in ((CALLS, "filled"), (REFILL, "refilled")):
        for _ in range(calls):
            loss = trainer.train_batch(data).clone()
            for course, (_, optimizer) in zip(courses, stages, strict=True):
                course.losses.append(loss)
                course.rates.append(optimizer.param_groups[0]["lr"])
        snapshot(moment)
        trainer.drain()
        snapshot(f"{moment}, then drained")
    return courses


def train_engine(rank: int, world_size: int, case: Case, more: dict[str, Any]) -> Course:
    engine = case.engine(**more)
    with warnings.catch_warnings():
        # A call without a gradient moves the learning rate and not the weights on purpose: torch must not complain.
        warnings.filterwarnings("error", message=".*lr_scheduler.*")
        return train(engine, case.data(), [(engine.module, engine.optimizer)])[0]


def train_oracle(
    case: Case, scheduler: Callable[[Any], Any] | None = None, data: Iterator[Any] | None = None
) -> list[Course]:
    """Train the oracle and return its results by stage; `scheduler` makes a scheduler from an optimizer."""
    oracle = case.reference()
    oracle.schedulers = [scheduler(optimizer) for optimizer in oracle.optimizers] if scheduler else []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
        return train(oracle, data or case.data(), list(zip(oracle.stages, oracle.optimizers, strict=True)))


def differences(got: Course, expected: Course) -> list[str]:
    """Return a line for everything that is not equal to the last bit."""
    found = [
        f"call {t}: {what} {float(ours)!r}, expected {float(its)!r}"
        for what, all_ours, all_its in (
            ("loss", got.losses, expected.losses),
            ("learning rate", got.rates, expected.rates),
        )
        for t, (ours, its) in enumerate(zip(all_ours, all_its, strict=True))
        if float(ours) != float(its)
    ]
    for moment, state in expected.states.items():
        for i, (ours, its) in enumerate(zip(got.states[moment], state, strict=True)):
            if not torch.equal(ours, its):
                gap = float((ours - its).abs().max())
                found.append(f"{moment}: tensor {i} {tuple(its.shape)} off by up to {gap:g}")
    return found


def assert_exact(case: Case, ours: list[Course], oracles: list[Course]) -> None:
    """Assert that the results `ours`, by rank, equal the oracle's, by stage."""
    __tracebackhide__ = True
    found = [
        f"stage {k}, {difference}"
        for k, (got, its) in enumerate(zip(ours, oracles, strict=True))
        for difference in differences(got, replace(its, losses=case.known(its.losses)))
    ]
    shown = [*found[:8], f"... {len(found)} in all"]
    assert not found, "\n".join([f"{case} differs from the oracle:", *shown])
