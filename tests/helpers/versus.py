"""One training run twice, by the engine on K ranks and by the oracle in this process: equal to the last bit.

    versus(ranks, Setup(layers=my_layers, batches=my_batches, stages=3, ddg={"weights": "current"}))

What a `Setup` holds must be picklable: module-level functions, `functools.partial` of them, plain values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from helpers import toy
from helpers.distributed import GetRanks

Made = tuple[list[tuple[int, float]], list[list[Tensor]]]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def nothing(trainer: Any, call: int) -> None:
    pass


def trainable(module: nn.Module) -> list[Any]:
    return [p for p in module.parameters() if p.requires_grad]


@dataclass(frozen=True)
class Setup:
    """One way to train."""

    layers: Callable[[], list[Any]]
    """Maker of the modules, the same at each call; stages have nearly equal numbers of them."""
    batches: Callable[[], Iterator[Any]]
    """Maker of the micro-batches, as many as needed."""
    stages: int = 2
    micro_batches: int = 2
    ddg: dict[str, Any] = field(default_factory=dict)
    loss_fn: Any = nn.functional.mse_loss
    optimizer: Callable[[Any], torch.optim.Optimizer] = sgd
    """Maker of the optimizer of a stage's trainable parameters, or of what `parameters` makes of the stage."""
    parameters: Callable[[nn.Module], list[Any]] = trainable
    clip: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)
    """Further keys of the DeepSpeed config."""
    module: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `PipelineModule`."""
    arguments: Callable[[Any, Setup], dict[str, Any]] | None = None
    """Maker of what `initialize` gets, from the module, in place of a callable optimizer and parameters."""
    ready: Callable[[Any], None] | None = None
    """A function called with the new engine."""
    before: Callable[[Any, int], None] = nothing
    """A function called with the engine before each call."""
    oracle_before: Callable[[Any, int], None] = nothing
    """A function that does the same to the oracle."""
    calls: int = 10
    refill: int = 3

    def __str__(self) -> str:
        mode = "-".join(str(value) for value in self.ddg.values())
        return f"K{self.stages}-M{self.micro_batches}" + (f"-{mode}" if mode else "")

    def reference(self) -> Any:
        """Make the oracle, its layers shared out as DeepSpeed's "uniform" does."""
        from deepspeed.runtime.utils import partition_uniform

        from ds_ddg.reference import Reference
        from ds_ddg.weights.optimizer_wrappers import with_a_parameter

        net = self.layers()
        torch.manual_seed(11)
        parts = partition_uniform(len(net), self.stages)
        stages = [nn.Sequential(*net[a:b]) for a, b in itertools.pairwise(parts)]
        optimizers = [self.optimizer(with_a_parameter(self.parameters(stage))) for stage in stages]
        loss_fn = self.loss_fn or (lambda outputs, labels: outputs)
        return Reference(stages, loss_fn, optimizers, self.micro_batches, clip=self.clip, **self.ddg)

    def engine(self) -> Any:
        """Make the engine of this rank."""
        from deepspeed.pipe import PipelineModule

        import ds_ddg

        module = {"num_stages": self.stages, "partition_method": "uniform", "loss_fn": self.loss_fn, **self.module}
        net = PipelineModule(self.layers(), **module)
        torch.manual_seed(11)
        if self.arguments is None:
            arguments = {"optimizer": self.optimizer, "model_parameters": self.parameters(net)}
        else:
            arguments = self.arguments(net, self)
        config = toy.config(self.micro_batches, self.ddg, **{"gradient_clipping": self.clip, **self.config})
        return ds_ddg.initialize(model=net, config=config, **arguments)[0]


def run(trainer: Any, setup: Setup, data: Iterator[Any], modules: list[nn.Module], before: Any) -> list[Made]:
    """Train, drain, train from the empty pipeline, drain; return losses with their calls, and states, by module."""
    losses: list[tuple[int, float]] = []
    states: list[list[list[Tensor]]] = [[] for _ in modules]
    for calls in (range(setup.calls), range(setup.calls, setup.calls + setup.refill)):
        for call in calls:
            before(trainer, call)
            loss = trainer.train_batch(data)
            losses.append((getattr(trainer, "loss_step", call), float(loss)))
        for module, seen in zip(modules, states, strict=True):
            seen.append(toy.state(module))
        trainer.drain()
        for module, seen in zip(modules, states, strict=True):
            seen.append(toy.state(module))
    return [(losses, seen) for seen in states]


def run_engine(rank: int, world_size: int, setup: Setup) -> Made:
    engine = setup.engine()
    if setup.ready is not None:
        setup.ready(engine)
    return run(engine, setup, setup.batches(), [engine.module], setup.before)[0]


def run_oracle(setup: Setup) -> list[Made]:
    """Run the oracle, by stage, on one thread as on the ranks: their number decides how a matrix product adds up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        oracle = setup.reference()
        data = ((batch[0], batch[1] if len(batch) > 1 else None) for batch in setup.batches())
        return run(oracle, setup, data, oracle.stages, setup.oracle_before)
    finally:
        torch.set_num_threads(threads)


def gaps(ours: Made, its: Made) -> list[str]:
    """Return a line for everything that differs."""
    losses = dict(its[0])
    found = [f"loss of call {t}: {loss!r}, expected {losses[t]!r}" for t, loss in ours[0] if loss != losses[t]]
    moments = ("filled", "drained", "refilled", "drained again")
    for moment, mine, expected in zip(moments, ours[1], its[1], strict=True):
        assert len(mine) == len(expected), "other parameters or buffers"
        for i, (a, b) in enumerate(zip(mine, expected, strict=True)):
            if not torch.equal(a, b):
                found.append(f"{moment}: tensor {i} {tuple(b.shape)} off by up to {float((a - b).abs().max()):g}")
    return found


def versus(ranks: GetRanks, setup: Setup, timeout: float = 90) -> list[Made]:
    """Do both runs, and fail unless they agree; return what the oracle made, by stage."""
    __tracebackhide__ = True
    expected = run_oracle(setup)
    by_rank = ranks(setup.stages).run(run_engine, setup, timeout=timeout)
    found = [f"stage {k}, {gap}" for k in range(setup.stages) for gap in gaps(by_rank[k], expected[k])]
    assert not found, "\n".join([f"{setup} differs from the oracle:", *found[:8], f"... {len(found)} in all"])
    # A run that trains nothing would agree as well.
    start = [toy.state(stage) for stage in replace(setup).reference().stages]
    for k, stage in enumerate(setup.reference().stages):
        moved = any(not torch.equal(a, b) for a, b in zip(start[k], expected[k][1][-1], strict=True))
        assert moved == bool(trainable(stage) or list(stage.buffers())), f"stage {k} does not train"
    return expected


def farthest(ours: Made, its: Made) -> float:
    losses = dict(its[0])
    far = [abs(loss - losses[call]) for call, loss in ours[0]]
    for mine, expected in zip(ours[1], its[1], strict=True):
        far += [float((a - b).abs().max()) for a, b in zip(mine, expected, strict=True)]
    return max(far)
