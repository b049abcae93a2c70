"""``ds-ddg study``: the command, its table and picture, and what it says of mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ds_ddg.cli import main

SOURCE = """
import torch
from torch import nn
from ds_ddg.study.problem import Problem

def problem(seed, lr=0.01):
    torch.manual_seed(seed)
    x = torch.randn(4, 3)
    return Problem(
        layers=[nn.Linear(3, 3) for _ in range(4)],
        loss_fn=nn.functional.mse_loss,
        batches=lambda micro_batches: iter([(x, x + 1)] * 100),
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=lr),
        calls=3,
        evaluate=lambda model: {"distance": float((model(x) - x).abs().mean())},
    )

def diverges(seed):
    return problem(seed, lr=1e30)

def wrong(seed):
    return 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path


def test_a_table_and_a_picture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "study mine.py:problem --stages 1,2 --seeds 0,1 --results r.jsonl --out r.png"
    assert main(command.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["K", "M", "rules", "seeds", "train_loss", "distance"]
    assert [line.split()[:4] for line in lines[1:]] == [
        ["1", "1", "off", "2"],
        ["2", "1", "off", "2"],
        ["2", "1", "auto", "2"],
    ]
    assert (folder / "r.png").read_bytes().startswith(b"\x89PNG")
    assert len((folder / "r.jsonl").read_text().splitlines()) == 6


def test_json_has_mean_and_spread(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "study mine.py:problem --stages 4 --rules off --seeds 0,1 --results r.jsonl --json"
    assert main(command.split()) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    losses = [json.loads(line)["train_loss"] for line in (folder / "r.jsonl").read_text().splitlines()]
    assert row["train_loss"] == [sum(losses) / 2, min(losses), max(losses)]
    assert row["diverged"] == 0


def test_runs_that_diverge_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            ["study", "mine.py:diverges", "--stages", "1,2", "--rules", "off", "--seeds", "0", "--results", "r.jsonl"]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert "diverged" in lines[0]
    assert all(line.split()[4] == "1" for line in lines[1:])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("mine.py:wrong --results r.jsonl", r"must return a ds_ddg.study.problem.Problem, got int"),
        ("mine.py:nothing --results r.jsonl", r"has no function 'nothing'; it has "),
        ("mine.py --results r.jsonl", r"'mine.py' is not FILE.py:FUNCTION"),
        ("mine.py:problem --results r.json", r"must end in .jsonl"),
        ("mine.py:problem --results none/r.jsonl", r"there is no folder 'none'"),
        ("mine.py:problem --results r.jsonl --out r.json", r"must end in .svg or .png"),
        ("mine.py:problem --results r.jsonl --rules on", r"staleness"),
        ("mine.py:problem --results r.jsonl --rules {a", r"is not JSON"),
        ("mine.py:problem --results r.jsonl --jobs 0", r"--jobs must be 1 or more, got 0"),
        ("mine.py:problem --results r.jsonl --stages 9", r"9"),
    ],
)
def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, said: str) -> None:
    assert main(["study", *arguments.split()]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert printed[-1].startswith("ds-ddg: error: ")
    assert said in printed[-1]
