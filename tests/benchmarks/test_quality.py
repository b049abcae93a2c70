"""The grid of ``benchmarks/quality.py``, its problems and the page that is made of it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks import quality, quality_page
from benchmarks.quality_means import Means
from ds_ddg.study.grid import Cell
from ds_ddg.study.training import train

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = quality.grid()


def made_up(cell: Cell) -> dict[str, Any]:
    """A point, or a hundredth of a nat, worse for each stage, half of it with rules; seeds differ by a little."""
    behind = (cell.stages - 1) * (0.5 if cell.rules != "off" else 1.0) + 0.1 * cell.seed
    return {"accuracy": 98.0 - behind} if cell.problem.startswith("digits") else {"nats": 2.0 + 0.01 * behind}


RESULTS = {cell: made_up(cell) for cell in GRID}


def test_grid_has_each_run_once() -> None:
    assert len(GRID) == len(set(GRID))
    assert sum("@" not in cell.problem and cell.learning_rate == 1 for cell in GRID) == 756 + 63 + 9 + 14


@pytest.mark.parametrize("name", ["digits_gn_sgd", "digits_bn_muon", "bytes_adamw", "docs_muon", "bytes_rotation"])
def test_every_kind_of_problem_trains(name: str) -> None:
    """For a few updates, with the delay of as many stages as any run has."""
    result = train(quality.problem(f"{name}@0.03", seed=0), stages=8, micro_batches=2)
    assert "diverged" not in result
    assert math.isfinite(result["train_loss"])


def test_a_length_counts_updates() -> None:
    assert [quality.problem(f"bytes_sgd{at}", 0).calls for at in ("", "@1.25", "@3")] == [800, 1000, 2400]


def test_page_shows_means_and_what_is_met() -> None:
    page = quality_page.page(RESULTS, GRID)
    assert f"from {len(GRID)} of {len(GRID)} runs, of 3 seed(s)" in page
    assert "| sgd | off | 1 | 97.9 (97.8 to 98.0) | 96.9 (96.8 to 97.0) |" in page
    assert "| digits_gn | sgd | 2 | 1 | 1.0 points | 0.5 points | 1 | within |" in page
    assert "| digits_gn | sgd | 4 | 4 | 3.0 points | 1.5 points | 0.5 | missed |" in page
    assert "| digits_gn | sgd | 8 | 1 | 7.0 points | 3.5 points | - | - |" in page
    assert "| bytes | muon | 2 | 1 | 0.5% | 0.2% | 2 | within |" in page
    assert "| digits_gn | sgd | 2 | 96.5 | 97.4 (97.3 to 97.5) | reached |" in page
    assert "| digits_bn | sgd | 8 | 97.7 | 94.4 (94.3 to 94.5) | missed |" in page
    for title in ("nothing was chosen", "Other learning rates", "Longer", "Basis rotation", "Time to the same result"):
        assert f"## {title}" in page.replace("A problem on which ", "")


def test_page_of_a_few_runs_leaves_out_the_rest() -> None:
    page = quality_page.page({cell: RESULTS[cell] for cell in GRID[:3]}, GRID)
    assert "## Digits, GroupNorm" in page
    assert "## Bytes" not in page
    assert "## Longer" not in page


def test_a_longer_training_may_be_enough() -> None:
    """A call takes 1F1B 1.76 times as long at K = M = 4; a tenth more of them leaves 1.60."""
    results = {
        cell: {"nats": 2.01 if cell.stages > 1 and "@" not in cell.problem else 2.0}
        for cell in GRID
        if "bytes" in cell.problem
    }
    page = quality_page.page(results, GRID)
    assert "| adamw | 4 | 2.000 | 2.010 | 2.000 | 2.000 | 1.1 | 1.76 | 1.60 |" in page


def test_a_run_that_diverged_is_the_worst() -> None:
    cell = Cell("digits_gn_sgd", 8, 1, "off", 1.0, 0)
    assert Means({cell: {"diverged": 3}}).values("digits_gn", "sgd", stages=8) == [10.0]
