"""docs/rivals.md: its tables are what the commands beside them print."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ds_ddg.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "rivals.md").read_text(encoding="utf-8")
SCHEDULES = {
    "1f1b": ("1f1b", None),
    "dualpipev": ("dualpipev", None),
    "interleaved": ("interleaved", None),
    "zb-h1": ("zb-h1", None),
    "zb-v": ("zb-v", None),
    "ddg": ("ddg", 0),
    "ddg, slack 1": ("ddg", 1),
}


def table(first: str) -> list[dict[str, str]]:
    """Return the rows of the table whose first column is `first`, by column."""
    lines = PAGE[PAGE.index(f"\n| {first} |") :].strip().split("\n\n")[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def predicted(capsys: pytest.CaptureFixture[str], command: str, stages: int, micro_batches: int) -> dict[str, str]:
    """Return the efficiency by schedule that `command` predicts, as the page writes it, and ddg's staleness."""
    assert main([*command.split()[1:], "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["setups"]
    here = [row for row in rows if (row["stages"], row["micro_batches"]) == (stages, micro_batches)]
    found = {(row["schedule"], row["slack"]): row for row in here}
    cells = {name: f"{found[key]['efficiency']:.3f}" if key in found else "-" for name, key in SCHEDULES.items()}
    return {**cells, "ddg's staleness": str(found["ddg", 0]["staleness"])}


def test_table_over_stages_and_micro_batches(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = re.findall(r"`(ds-ddg simulate --stages 4,8 [^`]*)`", PAGE)
    rows = table("K")
    assert len(rows) == 2 * 5
    for row in rows:
        expected = predicted(capsys, command, int(row.pop("K")), int(row.pop("M")))
        assert row == {name: expected[name] for name in row}


def test_table_of_other_costs(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = re.findall(r"`(ds-ddg simulate --stages 4 [^`]*)`", PAGE)
    rows = table("option")
    assert len(rows) == 5
    for row in rows:
        option = row.pop("option").strip("`")
        expected = predicted(capsys, f"{command} {option}", 4, 8)
        assert row == {name: expected[name] for name in row}
