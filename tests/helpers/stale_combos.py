"""Rules for stale gradients together with the other settings, one at a time; `ByHand` steps the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ds_ddg.staleness.apply import PREVIOUS_STEP
from helpers import formats, muon_runs, resuming, stale_runs, toy
from helpers.stale_runs import RULES, ByHand, Discount, Rule
from helpers.stale_runs import layers as plain_layers
from helpers.versus import Setup, nothing, trainable

STAGES = 3
WIDTH = 12


@dataclass(frozen=True)
class Combination:
    """One way to train."""

    rule: Rule
    setup: Setup
    """Without what `rule` says."""
    micro_batches: int = 1
    slack: int = 0

    @property
    def engines(self) -> Setup:
        """How the engine trains."""
        ddg = {"staleness": self.rule.staleness, "slack": self.slack, **self.setup.ddg}
        optimizer = self.setup.optimizer or partial(make, self.rule.optimizer)
        return replace(
            self.setup, micro_batches=self.micro_batches, ddg=ddg, optimizer=optimizer, oracle_before=nothing
        )

    @property
    def oracles(self) -> Setup:
        """How the oracle does."""
        engines, stages = self.engines, self.setup.stages
        delays = ((stages - 1 - k) * (1 + self.slack) for k in range(stages))
        ddg = {"clip_by" if name == "clip" else name: value for name, value in self.setup.ddg.items()}
        return replace(
            engines,
            arguments=None,
            ddg={"slack": self.slack, **{name: ddg[name] for name in ddg if name in ORACLES}},
            optimizer=lambda parameters: ByHand(
                engines.optimizer(parameters), self.rule, next(delays) / self.micro_batches
            ),
            oracle_before=self.setup.oracle_before,
        )


ORACLES = ("weights", "activations", "clip_by")


def make(name: str, parameters: Any) -> torch.optim.Optimizer:
    """Make the optimizer of that name; it can be sent to the ranks."""
    return toy.OPTIMIZERS[name](parameters)


def by_hand(it: Setup, rule: Rule) -> Setup:
    """Return `it` as the oracle is to run it, with the steps of `rule`; without slack."""
    delays = iter(range(it.stages - 1, -1, -1))
    return replace(
        it,
        ddg={},
        optimizer=lambda parameters: ByHand(it.optimizer(parameters), rule, next(delays) / it.micro_batches),
    )


def images() -> Iterator[Any]:
    return toy.batches(10**6)


def vectors() -> Iterator[Any]:
    generator = torch.Generator().manual_seed(3)
    for _ in itertools.count():
        yield torch.randn(4, WIDTH, generator=generator), torch.randn(4, 5, generator=generator)


def setup(**more: Any) -> Setup:
    """Return a run of convolutions, normalisations over the batch, and dropout, with the optimizer of the rule."""
    common = {"layers": toy.layers, "batches": images, "loss_fn": toy.loss_fn, "stages": STAGES, "optimizer": None}
    return Setup(**{**common, "calls": 8, **more})


# -- groups of parameters ---------------------------------------------------------------------------------------------


def two_kinds(module: nn.Module, key: str) -> list[dict[str, Any]]:
    """Return matrices and the rest, with other numbers."""
    halves = [[p for p in trainable(module) if (p.dim() > 1) is wanted] for wanted in (True, False)]
    momenta: list[Any] = [(0.8, 0.95), (0.95, 0.99)] if key == "betas" else [0.7, 0.9]
    return [
        {"params": half, "lr": lr, key: momentum, "weight_decay": decay}
        for half, lr, momentum, decay in zip(halves, (0.02, 0.005), momenta, (0.1, 0.0), strict=True)
    ]


# -- schedulers -------------------------------------------------------------------------------------------------------

ONE_CYCLE = {
    "cycle_min_lr": 0.002,
    "cycle_max_lr": 0.02,
    "cycle_first_step_size": 4,
    "cycle_min_mom": 0.8,
    "cycle_max_mom": 0.95,
}


def torchs_one_cycle(optimizer: Any) -> Any:
    """Cycle learning rate and momentum."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=40, base_momentum=0.6)


def deepspeeds_one_cycle(optimizer: Any) -> Any:
    """Cycle learning rate and betas."""
    from deepspeed.runtime.lr_schedules import OneCycle

    return OneCycle(optimizer, **ONE_CYCLE)


def with_scheduler(net: nn.Module, it: Setup) -> dict[str, Any]:
    return {"optimizer": it.optimizer, "model_parameters": it.parameters(net), "lr_scheduler": torchs_one_cycle}


def schedule_oracle(make: Callable[[Any], Any], oracle: Any, call: int) -> None:
    if call == 0:
        oracle.schedulers = [make(by_hand.optimizer) for by_hand in oracle.optimizers]


# -- between calls ----------------------------------------------------------------------------------------------------


def drain_and_evaluate(engine: Any, call: int) -> None:
    if call == 4:
        engine.drain()
    if call in (4, 6):
        engine.eval_batch(toy.batches(2, seed=9))


def drain_oracle(oracle: Any, call: int) -> None:
    if call == 4:
        oracle.drain()


SYNC_STEPS = 3


def begin_on_1f1b(oracle: Any, call: int) -> None:
    if call == 0:
        oracle.later = oracle.delays, [by_hand.s for by_hand in oracle.optimizers]
        oracle.delays = [0] * STAGES
        for by_hand in oracle.optimizers:
            by_hand.s = 0.0
    if call == SYNC_STEPS:
        oracle.drain()
        oracle.delays, ages = oracle.later
        for by_hand, age in zip(oracle.optimizers, ages, strict=True):
            by_hand.s = age


def another_optimizer(engine: Any, call: int) -> None:
    if call == 5:
        engine._configure_optimizer(partial(make, "adamw"), trainable(engine.module))


def another_of_the_oracle(oracle: Any, call: int) -> None:
    if call == 5:
        oracle.drain()
        oracle.optimizers = [
            ByHand(make("adamw", trainable(stage)), by_hand.rule, by_hand.s)
            for stage, by_hand in zip(oracle.stages, oracle.optimizers, strict=True)
        ]


# -- optimizers -------------------------------------------------------------------------------------------------------


def adagrad(parameters: Any) -> torch.optim.Optimizer:
    """ZeRO puts another in its place."""
    return torch.optim.Adagrad(parameters, lr=0.02)


MUON = Rule("muon", "auto", Discount(0.75, 1.0), lead=1.0)
AHEAD = replace(MUON, staleness={"rules": "auto", "extrapolation": 0.5}, lead=0.5)
MUON_BF16 = {
    "layers": muon_runs.bf16_layers,
    "batches": muon_runs.bf16_batches,
    "loss_fn": formats.loss_fn,
    "optimizer": muon_runs.InBf16,
    "config": {**muon_runs.CONFIG, **muon_runs.BF16},
}


# -- layers -----------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Takes one of two ways, by its input: the other has no gradient then."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.ways[int(x.mean() > 0)](x)
        return output


def branches() -> list[nn.Module]:
    torch.manual_seed(7)
    return [Branches(), toy.Residual(WIDTH), Branches(), toy.Residual(WIDTH), nn.Linear(WIDTH, 5), nn.Identity()]


class Adapted(nn.Module):
    """A frozen linear layer with a small trained one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.base(x) + self.up(self.down(x))


def adapted() -> list[nn.Module]:
    torch.manual_seed(7)
    return [nn.Linear(WIDTH, WIDTH).requires_grad_(False), *(Adapted() for _ in range(4)), nn.Linear(WIDTH, 5)]


A, S = RULES["A"], RULES["S"]
CLIPPED = 0.05
PLAIN = {"loss_fn": nn.functional.mse_loss, "batches": vectors}
TAKEN = replace(S, staleness="auto", clip=0.0)
"""The clip is that of the config."""

SCHEDULE = {
    "current": Combination(A, setup(ddg={"weights": "current"})),
    "current, recompute": Combination(
        S, setup(ddg={"weights": "current", "activations": "recompute"}), micro_batches=2
    ),
    "recompute": Combination(A, setup(ddg={"activations": "recompute"}), micro_batches=2),
    "slack": Combination(A, setup(), slack=1),
    "slack, a clip": Combination(S, setup(), micro_batches=2, slack=2),
    "exact loss": Combination(A, setup(ddg={"loss": "exact"})),
    "sync_steps": Combination(A, setup(ddg={"sync_steps": SYNC_STEPS}, oracle_before=begin_on_1f1b)),
    "sync_steps, a clip": Combination(S, setup(ddg={"sync_steps": SYNC_STEPS}, oracle_before=begin_on_1f1b)),
    "a drain, evaluation, and on": Combination(
        A, setup(before=drain_and_evaluate, oracle_before=drain_oracle), micro_batches=2
    ),
}
CLIPPING = {
    "gradient_clipping": Combination(A, setup(clip=CLIPPED)),
    "gradient_clipping in place of a clip": Combination(TAKEN, setup(clip=CLIPPED)),
    "gradient_clipping and a smaller clip": Combination(
        replace(S, everywhere=0.1), setup(config={"gradient_clipping": 0.1})
    ),
    "global": Combination(A, setup(clip=CLIPPED, ddg={"clip": "global"})),
}
OPTIMIZERS = {
    "groups": Combination(A, setup(parameters=partial(two_kinds, key="betas"))),
    "groups, a clip": Combination(TAKEN, setup(clip=CLIPPED, parameters=partial(two_kinds, key="momentum"))),
    "OneCycleLR, betas": Combination(
        A, setup(arguments=with_scheduler, oracle_before=partial(schedule_oracle, torchs_one_cycle))
    ),
    "OneCycleLR, momentum": Combination(
        S, setup(arguments=with_scheduler, oracle_before=partial(schedule_oracle, torchs_one_cycle))
    ),
    "DeepSpeed's OneCycle": Combination(
        A,
        setup(
            config={"scheduler": {"type": "OneCycle", "params": ONE_CYCLE}},
            oracle_before=partial(schedule_oracle, deepspeeds_one_cycle),
        ),
    ),
    "late": Combination(A, setup(before=another_optimizer, oracle_before=another_of_the_oracle)),
    "Adagrad, ZeRO-1": Combination(
        Rule("adagrad", {"learning_rate": 1.0}, Discount(1.0)), setup(optimizer=adagrad, config=formats.ZERO_1)
    ),
}
FROM_CONFIG = {
    "Muon": Combination(MUON, muon_runs.setup_of(stages=4, clip=0.5)),
    "Muon, extrapolated": Combination(AHEAD, muon_runs.setup_of(stages=2), micro_batches=2),
    "Muon, bf16": Combination(MUON, muon_runs.setup_of(stages=3, **MUON_BF16)),
}
MISSING = {
    "unused in some calls": Combination(A, setup(layers=branches, **PLAIN)),
    "unused in some calls, a clip": Combination(S, setup(layers=branches, **PLAIN)),
    "adapters beside a frozen base": Combination(A, setup(layers=adapted, **PLAIN)),
}
COMBINATIONS = {
    '"staleness" with the settings of the schedule': SCHEDULE,
    '"staleness" with gradient clipping': CLIPPING,
    '"staleness" with parameter groups, cycled momentum, late optimizers, Adagrad in ZeRO-1': OPTIMIZERS,
    '"staleness" with the JSON\'s Muon, fp32 and bf16': FROM_CONFIG,
    '"staleness" with parameters without a gradient, or frozen': MISSING,
}
"""By the feature that they prove."""

REPLICAS = {
    "": Combination(A, setup(stages=2, layers=plain_layers)),
    ", a clip": Combination(S, setup(stages=2, layers=plain_layers), micro_batches=2),
}
"""On two stages with two replicas each."""


# -- checkpoints ------------------------------------------------------------------------------------------------------

AHEAD_OF = {"learning_rate": 0.5, "extrapolation": 1.0}


@dataclass
class HandOver:
    """What one stage made of a checkpoint of other rules, or of another number of micro-batches."""

    states: list[list[Tensor]]
    """Some calls later: of an engine that had done nothing before, and of one that had trained."""
    keeps: list[bool]
    """Whether the optimizer had a u_{t-1} after the load: of both."""


def hand_over(
    rank: int, world_size: int, directory: str, config: dict[str, Any], saved: str, loaded: str, micro_batches: int
) -> HandOver:
    """Train with rules `saved` ("on", "off"; "deepspeed": on, then in DeepSpeed's engine), and go on by `loaded`."""
    staleness = {"on": AHEAD_OF, "deepspeed": AHEAD_OF, "off": "off"}
    made = partial(resuming.engine, world_size, optimizer="adamw", **config)
    data = toy.batches(100)
    writer = made(1, ddg={"staleness": staleness[saved]})
    for _ in range(5):
        writer.train_batch(data)
    writer.save_checkpoint(directory)
    if saved == "deepspeed":
        writer = made(1, ddg=None)
        writer.load_checkpoint(directory)
        for _ in range(2):
            writer.train_batch(data)
        writer.save_checkpoint(directory)
    result = HandOver([], [])
    for trained_before in (0, 5):
        engine = made(micro_batches, ddg={"staleness": staleness[loaded]})
        for _ in range(trained_before):
            engine.train_batch(data)
        engine.load_checkpoint(directory)
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        result.keeps.append(any(PREVIOUS_STEP in state for state in inner.state.values()))
        torch.manual_seed(5)
        rest = toy.batches(100, seed=7)
        for _ in range(4):
            engine.train_batch(rest)
        engine.drain()
        result.states.append(toy.state(engine.module))
    return result


# -- one optimizer, two engines ---------------------------------------------------------------------------------------


def past_the_hooks(rank: int, world_size: int) -> str:
    """Replace the step of the optimizer by one that runs no hooks; return the error of the first update."""
    engine = stale_runs.build_engine(world_size, 1, "adamw", "auto")
    engine.optimizer.step = type(engine.optimizer).step.__wrapped__.__get__(engine.optimizer)
    data = toy.batches(4)
    try:
        for _ in range(4):
            engine.train_batch(data)
    except Exception as error:
        return f"{error} {error.__cause__}"
    return "nothing was refused"


def second_engine(rank: int, world_size: int, ddg: dict[str, Any] | None) -> tuple[list[Tensor], bool]:
    """Train with an optimizer that an engine with rules has had before, or that none has, if `ddg` is None.

    Returns:
        The weights, and whether the optimizer keeps a u_{t-1}.
    """
    from deepspeed.pipe import PipelineModule

    import ds_ddg

    net = PipelineModule(plain_layers(), num_stages=world_size, loss_fn=toy.loss_fn, partition_method="uniform")
    optimizer = make("adamw", net.parameters())
    for block in ({"staleness": "auto"}, ddg) if ddg is not None else ({},):
        engine, *_ = ds_ddg.initialize(model=net, config=toy.config(1, block), optimizer=optimizer)
    data = toy.batches(8)
    for _ in range(8):
        engine.train_batch(data)
    return toy.state(engine.module), any(PREVIOUS_STEP in state for state in optimizer.state.values())
