"""Random walks through the life of an engine, against the oracle after every step.

A seed decides the set-up and what happens in it: calls, drains, evaluations, another M, another schedule, checkpoints
saved and loaded, each with micro-batches in flight, and mostly with rules for stale gradients. To look for more:
``DS_DDG_TEST_WALKS=100-200 pytest`` this file.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import toy
from helpers.distributed import Ranks
from helpers.modes import DEFAULT, MODE_BLOCKS
from helpers.stale_runs import ByHand, Discount, Rule

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # A stage of the oracle whose first gradient has not come back has not stepped its optimizer yet.
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler"),
]

STEPS = 28
FIRST, END = map(int, os.environ.get("DS_DDG_TEST_WALKS", "0-20").split("-"))

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.002, momentum=0.9, weight_decay=0.01),
    "nesterov": partial(torch.optim.SGD, lr=0.002, momentum=0.9, nesterov=True),
    "adamw": partial(torch.optim.AdamW, lr=0.003, weight_decay=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.0005, momentum=0.3),
}
slower = partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.8)


@dataclass(frozen=True)
class Walk:
    stages: int
    micro_batches: int
    ddg: dict[str, Any]
    optimizer: str
    clip: float
    tuples: bool
    scheduled: bool
    steps: tuple[tuple[str, Any], ...]
    """What is done, each with its argument."""
    rule: Rule
    """What is done about stale gradients."""


def walk(seed: int) -> Walk:
    rng = random.Random(seed)
    clip = rng.choice((0.0, 0.0, 0.05))
    weight = {"train": 14, "drain": 2, "evaluate": 3, "micro_batches": 2, "switch": 3, "save": 1.5, "load": 1.5}
    if clip:
        del weight["switch"]  # DeepSpeed's schedule clips by another norm
    steps: list[tuple[str, Any]] = []
    schedule, saved = "ddg", False
    for _ in range(STEPS):
        what = rng.choices(list(weight), list(weight.values()))[0]
        what = "train" if what == "load" and not saved else what
        saved |= what == "save"
        if what == "switch":
            schedule = {"ddg": "1f1b", "1f1b": "ddg"}[schedule]
        argument = {
            "switch": schedule,
            "micro_batches": rng.choice((1, 2, 3, 4)),
            "evaluate": rng.choice((None, 1, 3)),
        }
        steps.append((what, argument.get(what)))
    return Walk(
        stages=rng.choice((2, 3, 3, 4)),
        micro_batches=rng.choice((1, 1, 2, 3)),
        ddg={**rng.choice(MODE_BLOCKS), "slack": rng.choice((0, 0, 1, 2))},
        optimizer=rng.choice(list(OPTIMIZERS)),
        clip=clip,
        # DeepSpeed's own schedule cannot send these.
        tuples=rng.random() < 0.5 and not any(what == "switch" for what, _ in steps),
        scheduled=rng.random() < 0.5,
        steps=(*steps, ("drain", None)),
        rule=rule(random.Random(f"rules {seed}")),
    )


def rule(rng: random.Random) -> Rule:
    discount, lead, stretch = rng.choice((0.0, 0.5, 1.0)), rng.choice((0.0, 0.5, 1.0)), rng.random() < 0.5
    if rng.random() < 0.3:
        return Rule("", "off")
    block = {"learning_rate": discount, "extrapolation": lead, "momentum": "stretch" if stretch else "keep"}
    return Rule("", block, Discount(discount), stretch, lead)


@dataclass
class Seen:
    """After one step."""

    result: Any
    """Of a call: whose loss, the loss, and the calls so far; of an evaluation: the loss."""
    state: list[Tensor]
    rate: float


def follow(rank: int, world_size: int, path: Walk, directory: str) -> list[Seen]:
    from deepspeed.pipe import PipelineModule

    import ds_ddg

    net = PipelineModule(
        toy.layers(path.tuples), num_stages=path.stages, loss_fn=toy.loss_fn, partition_method="uniform"
    )
    torch.manual_seed(11)
    engine, *_ = ds_ddg.initialize(
        model=net,
        config=toy.config(
            path.micro_batches, {**path.ddg, "staleness": path.rule.staleness}, gradient_clipping=path.clip
        ),
        optimizer=OPTIMIZERS[path.optimizer],
        model_parameters=list(net.parameters()),
        lr_scheduler=slower if path.scheduled else None,
    )
    data, held_out = toy.batches(10**6, seed=3), toy.batches(10**6, seed=4)

    def train(_: None) -> tuple[int, float, int]:
        loss = float(engine.train_batch(data))
        return engine.loss_step, loss, engine.global_steps

    does: dict[str, Callable[[Any], Any]] = {
        "train": train,
        "drain": lambda _: engine.drain(),
        "evaluate": lambda count: float(engine.eval_batch(held_out, num_micro_batches=count)),
        "micro_batches": lambda count: engine.set_train_batch_size(4 * count),
        "switch": lambda name: setattr(engine, "schedule", name),
        "save": lambda _: engine.save_checkpoint(directory) and None,
        "load": lambda _: engine.load_checkpoint(directory) and None,
    }
    return [
        Seen(does[what](argument), toy.state(net), engine.optimizer.param_groups[0]["lr"])
        for what, argument in path.steps
    ]


class Oracle:
    """Takes the same steps; DeepSpeed's schedule is one without delays."""

    def __init__(self, path: Walk) -> None:
        made = partial(toy.reference, path.stages, tuples=path.tuples, micro_batches=path.micro_batches)
        self.reference = made(clip=path.clip, **path.ddg)
        self.stages: list[nn.Module] = self.reference.stages
        self.optimizers = [
            ByHand(OPTIMIZERS[path.optimizer](stage.parameters()), path.rule, 0.0) for stage in self.stages
        ]
        self.schedulers = [slower(by_hand.optimizer) for by_hand in self.optimizers] if path.scheduled else []
        self.reference.optimizers, self.reference.schedulers = self.optimizers, self.schedulers
        self.own = list(self.reference.delays), self.reference.backward
        self.data, self.held_out = toy.batches(10**6, seed=3), toy.batches(10**6, seed=4)
        self.losses: list[float] = []
        self.calls = 0
        self.saved: Any = None
        self.age()

    def age(self) -> None:
        for by_hand, delay in zip(self.optimizers, self.reference.delays, strict=True):
            by_hand.s = delay / self.reference.micro_batches

    def train(self, _: None) -> int:
        self.losses.append(float(self.reference.train_batch(self.data)))
        self.calls += 1
        return self.calls

    def drain(self, _: None) -> None:
        self.reference.drain()

    def evaluate(self, count: int | None) -> float:
        count = count or self.reference.micro_batches
        model = nn.Sequential(*self.stages).eval()
        with torch.no_grad():
            losses = [toy.loss_fn(model(x), y) for x, y in (next(self.held_out) for _ in range(count))]
        model.train()
        return float(sum(losses) / count)

    def micro_batches(self, count: int) -> None:
        self.reference.drain()
        self.reference.micro_batches = count
        self.age()

    def switch(self, name: str) -> None:
        self.reference.drain()
        undelayed = [0] * len(self.stages), self.reference._gradient_now
        self.reference.delays, self.reference.backward = self.own if name == "ddg" else undelayed
        self.age()

    def save(self, _: None) -> None:
        self.reference.drain()
        parts = (*self.stages, *self.optimizers, *self.schedulers)
        self.saved = self.calls, copy.deepcopy([part.state_dict() for part in parts])

    def load(self, _: None) -> None:
        self.reference.drain()
        self.calls, states = copy.deepcopy(self.saved)
        for part, state in zip((*self.stages, *self.optimizers, *self.schedulers), states, strict=True):
            part.load_state_dict(state)

    def follow(self, path: Walk) -> list[list[Seen]]:
        """After each step, by stage."""
        seen = []
        for what, argument in path.steps:
            result = getattr(self, what)(argument)
            rates = (optimizer.param_groups[0]["lr"] for optimizer in self.optimizers)
            states = map(toy.state, self.stages)
            seen.append([Seen(result, state, rate) for state, rate in zip(states, rates, strict=True)])
        return seen


@pytest.mark.proves(
    "random sequences of calls, drains, evaluations, other M, schedules and checkpoints", modes=DEFAULT
)
@pytest.mark.parametrize("seed", range(FIRST, END))
def test_walk(ranks: Callable[[int], Ranks], tmp_path: Path, seed: int) -> None:
    path = walk(seed)
    oracle = Oracle(path)
    expected = oracle.follow(path)
    got = ranks(path.stages).run(follow, path, str(tmp_path), timeout=120)
    loaded = False  # from then on the number of a loss says no more which one it is
    for number, (what, argument) in enumerate(path.steps):
        loaded |= what == "load"
        for k in range(path.stages):
            mine, its = got[k][number], expected[number][k]
            where = f"stage {k} after step {number}, {what} {argument or ''}, of {path}"
            off = [i for i, (a, b) in enumerate(zip(mine.state, its.state, strict=True)) if not torch.equal(a, b)]
            assert not off, f"tensors {off} differ: {where}"
            assert mine.rate == its.rate, where
            if what == "train":
                call, loss, calls = mine.result
                assert calls == its.result, where
                assert loaded or loss == oracle.losses[call], where
            if what == "evaluate":
                assert mine.result == pytest.approx(its.result, rel=1e-6), where  # another order of the sum
