"""A grid of runs: which there are, and that an interrupted one goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ds_ddg.study.grid import Cell, cells, read, run
from ds_ddg.study.problem import Problem

MADE: list[tuple[str, int]] = []


def problem(name: str, seed: int) -> Problem:
    """Return a training whose data is its seed, and note that it was asked for."""
    MADE.append((name, seed))
    x = torch.full((4, 3), 1.0 + seed)
    return Problem(
        layers=[nn.Linear(3, 3) for _ in range(4)],
        loss_fn=nn.functional.mse_loss,
        batches=lambda micro_batches: iter([(x, x)] * 100),
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
        calls=3,
    )


def test_without_delay_there_is_one_run_for_all_rules() -> None:
    found = cells(["a"], [1, 2], [1], ["off", "auto"], [1.0], [0, 1])
    assert [cell[1:4] + cell[5:] for cell in found] == [
        (1, 1, "off", 0),
        (2, 1, "off", 0),
        (2, 1, "auto", 0),
        (1, 1, "off", 1),
        (2, 1, "off", 1),
        (2, 1, "auto", 1),
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": [0]}, "stages must be 1 or more, got 0"),
        ({"micro_batches": [2, -1]}, "micro-batches must be 1 or more, got -1"),
        ({"seeds": [-1]}, "seeds must be 0 or more, got -1"),
        ({"learning_rates": [0.0]}, "must be above 0, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(change: dict[str, list[int]], said: str) -> None:
    given = {"stages": [1], "micro_batches": [1], "rules": ["off"], "learning_rates": [1.0], "seeds": [0]}
    with pytest.raises(ValueError, match=said):
        cells(["a"], **{**given, **change})  # type: ignore[arg-type]


def test_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    todo = cells(["a"], [1, 4], [1], ["off", '{"learning_rate": 1}'], [1.0], [0])
    MADE.clear()
    first = next(iter(run(problem, todo, path)))
    assert len(MADE) == 1
    rest = dict(run(problem, todo, path))
    assert len(MADE) == 3
    assert first[0] not in rest
    results = read(path)
    assert set(results) == set(todo)
    assert results[todo[1]]["train_loss"] != results[todo[2]]["train_loss"]
    assert not list(run(problem, todo, path))


def test_several_jobs_give_the_same_numbers(tmp_path: Path) -> None:
    todo = cells(["a"], [2], [1], ["off", "auto"], [1.0, 2.0], [0])
    alone = dict(run(problem, todo, tmp_path / "one.jsonl"))
    together = dict(run(problem, todo, tmp_path / "two.jsonl", jobs=2))
    assert {cell: result["train_loss"] for cell, result in alone.items()} == {
        cell: result["train_loss"] for cell, result in together.items()
    }


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({**Cell("a", 1, 1, "off", 1.0, 0)._asdict(), "train_loss": 1.0}) + '\n{"a": 1}\n')
    with pytest.raises(ValueError, match=r"other\.jsonl, line 2, is no result of a study"):
        read(path)
