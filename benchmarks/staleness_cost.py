"""What the rules for stale gradients cost in time and memory, and what ``ds_ddg.delayed`` costs in a loop.

    python benchmarks/staleness_cost.py                  # some minutes; the machine may do other work
    python benchmarks/staleness_cost.py --turns 5 --width 128

A transformer, one process, one thread, fp32. For each optimizer two of it update two copies of the weights, one plain
and one by the rules that "auto" chooses for stage 0 of 8 (for SGD without the clip, which is that of any clipping);
gradients are given. They take turns of some steps each, every other turn in the opposite order. Likewise a plain
training loop, and the same as on 1 and on 8 stages with ``ds_ddg.delayed``; there a step is forward, backward, update.

Counted is processor time, which is what one thread takes on an idle core, but for what others do to its caches. Prints
markdown tables of the medians of all turns, with the lowest and the highest, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

import torch
from torch import Tensor, nn

from benchmarks.report import machine, table

STAGES, LENGTH, BATCH = 8, 32, 4
Turns = dict[str, list[float]]
"""Milliseconds of a step in each turn, by what took it."""


def network(width: int) -> nn.Sequential:
    """Make a block of a transformer for each stage."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(STAGES))
    )


def muon(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """Return DeepSpeed's, which has AdamW for what is no matrix."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    both = list(parameters)
    matrices, rest = ([p for p in both if (p.dim() == 2) is wanted] for wanted in (True, False))
    adam = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
    return MuonWithAuxAdam(
        [
            {"params": matrices, "use_muon": True, "lr": 0.02, "momentum": 0.9, "weight_decay": 0.01},
            {"params": rest, "use_muon": False, **adam},
        ]
    )


def rotation(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    from ds_ddg.staleness.rotation import BasisRotation

    return BasisRotation(parameters)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "Muon": muon,
    "BasisRotation": rotation,
}


def updates(name: str, rules: str, width: int) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """Return what does one step of an optimizer, and the optimizer."""
    from ds_ddg.schedules.ddg import DDGPlan
    from ds_ddg.staleness.apply import StaleSteps
    from ds_ddg.staleness.choose import choose
    from ds_ddg.staleness.rules import Settings, Staleness
    from ds_ddg.weights.muon_step import stepping

    parameters = list(network(width).parameters())
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
    optimizer, plan = OPTIMIZERS[name](iter(parameters)), DDGPlan(STAGES)
    if rules == "auto":
        chosen = choose(Settings(rules="auto", clip=0.0), optimizer, plan).rules
        StaleSteps(optimizer, chosen, lambda parameters: {Staleness.of(plan, 0): parameters})

    def step() -> None:
        with stepping(optimizer):
            optimizer.step()

    return step, optimizer


def training(stages: int | None, width: int) -> Callable[[], None]:
    """Return what does one step of a training, with gradients as late as on `stages` stages."""
    import ds_ddg

    net = network(width)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    if stages is not None:
        ds_ddg.delayed(optimizer, stages, model=net)
    inputs = torch.randn(BATCH, LENGTH, width, generator=torch.Generator().manual_seed(2))

    def step() -> None:
        net(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def in_turns(does: Mapping[str, Callable[[], None]], turns: int, steps: int) -> Turns:
    """Time each of `does`, after a turn that does not count."""
    found: Turns = {name: [] for name in does}
    for turn in range(turns + 1):
        for name in does if turn % 2 == 0 else reversed(does):
            start = time.process_time()
            for _ in range(steps):
                does[name]()
            if turn > 0:
                found[name].append(1e3 * (time.process_time() - start) / steps)
    return found


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Return the bytes of state that the optimizer keeps for each number of the weights."""
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    weights = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return sum(tensor.numel() * tensor.element_size() for tensor in kept) / weights


def spread(values: list[float]) -> str:
    """Return the median with the lowest and the highest."""
    return f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="of the transformer, a multiple of 4")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    options = parser.parse_args(arguments)
    os.environ.setdefault("LOG_LEVEL", "ERROR")
    torch.set_num_threads(1)
    found: dict[str, Turns] = {}
    rows = []
    for name in OPTIMIZERS:
        modes = ("off",) if name == "BasisRotation" else ("off", "auto")  # for that one "auto" does nothing
        made = {rules: updates(name, rules, options.width) for rules in modes}
        found[name] = in_turns({rules: step for rules, (step, _) in made.items()}, options.turns, options.steps)
        rows += [
            [name, rules, spread(found[name][rules]), f"{state_bytes(optimizer):.1f}"]
            for rules, (_, optimizer) in made.items()
        ]
    loops = {"plain": None, "delayed, K = 1": 1, f"delayed, K = {STAGES}": STAGES}
    does = {name: training(stages, options.width) for name, stages in loops.items()}
    found["loop"] = in_turns(does, options.turns, options.steps)
    weights = sum(p.numel() for p in network(options.width).parameters())
    print(f"{weights:,} weights, {options.turns} turns of {options.steps} steps\n")
    print(table(["optimizer", "staleness", "ms a step", "bytes of state a weight"], rows))
    print("\n" + table(["training loop, AdamW", "ms a step"], [[name, spread(found["loop"][name])] for name in loops]))
    print("\n" + json.dumps({"benchmark": "staleness_cost", "weights": weights, "turns": found, **machine()}))


if __name__ == "__main__":
    main()
