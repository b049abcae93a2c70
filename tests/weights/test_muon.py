"""DeepSpeed's Muon: which parameters it takes, whatever the split, and that it trains as the oracle does."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import muon_runs
from helpers.distributed import GetRanks
from helpers.modes import MODE_BLOCKS
from helpers.versus import versus

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("ddg", MODE_BLOCKS, ids=lambda ddg: "-".join(ddg.values()))
@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 1), (2, 2), (4, 1), (4, 2)])
@pytest.mark.proves("Muon: matrices and convolutions, AdamW for the rest", modes="ddg")
def test_equals_the_oracle(ranks: GetRanks, stages: int, micro_batches: int, ddg: dict[str, Any]) -> None:
    """Also on stages without a matrix, and with nothing else."""
    versus(ranks, muon_runs.setup_of(stages=stages, micro_batches=micro_batches, ddg=ddg, clip=0.5))


def together(by_rank: list[Any]) -> dict[str, bool]:
    """Join what the ranks chose; each name has one value."""
    joined: dict[str, bool] = {}
    for chosen in by_rank:
        for name, muon in chosen.items():
            assert joined.setdefault(name, muon) == muon, name
    return joined


def expected(tied: bool) -> dict[str, bool]:
    residual = {f"3.{name}": name in ("up.weight", "down.weight") for name in RESIDUAL}
    inner = {f"1.{name}": muon for name, muon in muon_runs.KINDS.items()} | {"2.weight": True, "2.bias": False}
    words = "tied_modules.words" if tied else "0"
    ends = {f"{words}.table.weight": False, f"{words}.types.weight": False}
    if not tied:
        ends |= {"4.pool.weight": True, "4.pool.bias": False, "4.classes.weight": False, "4.classes.bias": False}
    return {**ends, **inner, **residual}


RESIDUAL = ["norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "down.bias"]


@pytest.mark.parametrize("tied", [False, True])
def test_chooses_by_structure_whatever_the_split(ranks: GetRanks, tied: bool) -> None:
    """Names tell nothing here; the output layer is on the last stage but one where that has no weights."""
    for stages in (1, 3, 6):
        assert together(ranks(stages).run(muon_runs.flags, tied, {})) == expected(tied), f"K = {stages}"


@pytest.mark.parametrize("tied", [False, True])
def test_a_scripts_own_flags_win(ranks: GetRanks, tied: bool) -> None:
    table = "tied_modules.words.table.weight" if tied else "0.table.weight"
    asked = {table: True, "1.positions": True, "2.weight": False}
    for stages in (1, 3):
        assert together(ranks(stages).run(muon_runs.flags, tied, asked)) == expected(tied) | asked


def test_a_vector_cannot_be_muons(ranks: GetRanks) -> None:
    errors = ranks(2).run(muon_runs.flags, False, {"2.bias": True})
    assert all("use_muon is True for a parameter that is no matrix" in error for error in errors)
    assert any("(12,)" in error for error in errors)
