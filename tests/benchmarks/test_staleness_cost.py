"""The benchmark of what rules for stale gradients cost: that it runs, and counts bytes; times decide nothing."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import staleness_cost
from benchmarks.staleness_cost import OPTIMIZERS


@pytest.mark.usefixtures("one_thread")
def test_prints_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    staleness_cost.main(["--width", "8", "--turns", "2", "--steps", "1"])
    said = capsys.readouterr().out.strip().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said if line.startswith("| ")]
    steps = [row for row in rows if row[0] in OPTIMIZERS]
    assert [row[:2] for row in steps] == [
        [name, rules] for name in OPTIMIZERS for rules in ("off", "auto")[: 1 if name == "BasisRotation" else 2]
    ]
    assert [row[0] for row in rows[-3:]] == ["plain", "delayed, K = 1", "delayed, K = 8"]
    turns = json.loads(said[-1])["turns"]
    assert turns.keys() == {*OPTIMIZERS, "loop"}
    assert all(len(times) == 2 for found in turns.values() for times in found.values())


@pytest.mark.parametrize(("name", "extra"), [("SGD, momentum", 4), ("AdamW", 4), ("Muon", 4)])
def test_counts_what_the_rules_keep(name: str, extra: int) -> None:
    plain, ruled = (staleness_cost.updates(name, rules, 8) for rules in ("off", "auto"))
    for step, _ in (plain, ruled):
        step()
    off, auto = (staleness_cost.state_bytes(optimizer) for _, optimizer in (plain, ruled))
    assert auto - off == pytest.approx(extra)


def test_a_state_is_counted_by_its_numbers() -> None:
    weight = torch.nn.Parameter(torch.zeros(10))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones(10)
    optimizer.step()
    assert staleness_cost.state_bytes(optimizer) == 4


def test_a_turn_is_a_mean_over_its_steps() -> None:
    calls: list[str] = []
    does = {name: lambda name=name: calls.append(name) for name in ("a", "b")}  # type: ignore[misc]
    found = staleness_cost.in_turns(does, turns=1, steps=2)
    assert calls == ["a", "a", "b", "b", "b", "b", "a", "a"], "a turn that does not count, then in the other order"
    assert {name: len(times) for name, times in found.items()} == {"a": 1, "b": 1}
    assert staleness_cost.spread([3.0, 1.0, 2.0]) == "2.0 (1.0 to 3.0)"
