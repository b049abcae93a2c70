"""The command line as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ds_ddg.cli import main


def run(capsys: pytest.CaptureFixture[str], arguments: str, status: int = 0) -> str:
    assert main(arguments.split()) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def test_plan_prints_the_schedule_and_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    expected = """\
ddg, K = 3 stages, M = 2

stage 0 | F0     F1     F2B0   F3B1*  F4B2   F5B3*  B4     B5*
stage 1 | F0     F1B0*  F2B1   F3B2*  F4B3   F5B4*  B5*
stage 2 | F0B0   F1B1*  F2B2   F3B3*  F4B4   F5B5*
F forward, B backward, with the number of the micro-batch; * update

stage  delay  staleness  versions  activations
    0      2          1         2            3
    1      1          1         2            2
    2      0          0         1            1

bubble in steady state: 0.0%
"""
    assert run(capsys, "plan --stages 3 --micro-batches 2") == expected


def test_plan_on_a_clock(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "plan --stages 2 --schedule 1f1b --calls 2 --clock")
    assert "stage 0 | F0 .  .  .  B0--- F1 .  .  .  B1---\nstage 1 | .  F0 B0--- .  .  .  F1 B1--- .  .\n" in answer
    assert answer.endswith("bubble in steady state: 50.0%\n")


def test_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(run(capsys, "plan --stages 2 --calls 2 --json")) == {
        "schedule": "ddg",
        "stages": 2,
        "micro_batches": 1,
        "bubble": 0.0,
        "per_stage": [
            {"stage": 0, "delay": 1, "staleness": 1, "versions": 2, "activations": 2},
            {"stage": 1, "delay": 0, "staleness": 0, "versions": 1, "activations": 1},
        ],
        "operations": [
            ["0F0", "0F1", "0B0", "0U0", "0B1", "0U1"],
            ["1F0", "1B0", "1U0", "1F1", "1B1", "1U1"],
        ],
    }


def test_plan_writes_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(capsys, f"plan --stages 2 --calls 2 --out {tmp_path}/plan.json")
    boxes = [event for event in json.loads((tmp_path / "plan.json").read_text())["traceEvents"] if event["ph"] == "X"]
    assert len(boxes) == 12


def test_simulate_compares_over_lists(capsys: pytest.CaptureFixture[str]) -> None:
    """The design's numbers: 1F1B takes (M+K-1)/M as long, and slack 1 hides half a tick of latency."""
    records = json.loads(run(capsys, "simulate --stages 4 --micro-batches 1,4 --link 0,1.5 --slack 0,1 --json"))
    assert [(r["micro_batches"], r["link"], r["schedule"], r["slack"], r["efficiency"]) for r in records] == [
        (1, 0, "1f1b", None, 0.25),
        (1, 0, "ddg", 0, 1),
        (1, 0, "ddg", 1, 1),
        (1, 1.5, "1f1b", None, round(3 / (12 + 6 * 1.5), 4)),
        (1, 1.5, "ddg", 0, round(1 / 1.75, 4)),
        (1, 1.5, "ddg", 1, 1),
        (4, 0, "1f1b", None, round(4 / 7, 4)),
        (4, 0, "ddg", 0, 1),
        (4, 0, "ddg", 1, 1),
        (4, 1.5, "1f1b", None, records[9]["efficiency"]),
        (4, 1.5, "ddg", 0, round(1 / 1.75, 4)),
        (4, 1.5, "ddg", 1, 1),
    ]
    assert 0 < records[9]["efficiency"] < round(4 / 7, 4)


def test_simulate_with_uneven_stages_against_one_device(capsys: pytest.CaptureFixture[str]) -> None:
    """Work 3 + 6 on one device; the slower stage needs 6 for it: 9/6 on two devices."""
    answer = run(capsys, "simulate --stages 2 --scale 1,2 --slack 0").splitlines()
    header = "stages  micro_batches  link  schedule  slack  time_per_call  speedup  efficiency  staleness  versions"
    assert answer[0] == header + "  activations"
    assert answer[2].split() == ["2", "1", "0", "ddg", "0", "6", "1.5", "0.75", "1", "2", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan --stages 0", "at least 1 stage and 1 micro-batch, got 0 and 1"),
        ("plan --stages 2 --slack -1", "slack must be 0 or more, got -1"),
        ("plan --stages 2 --schedule 1f1b --slack 1", "--slack 1 has no meaning for 1f1b"),
        ("plan --stages 2 --calls 0", "--calls must be 1 or more, got 0"),
        ("plan --stages 2 --out plan.gif", "must end in .svg, .png or .json"),
        ("plan --stages 2 --out /no/such/folder/plan.json", "No such file or directory"),
        ("simulate --stages 2 --link -1", "cost 'link' must be finite and 0 or more, got -1.0"),
        ("simulate --stages 3 --scale 1,2", "one number for each of 3 stages, got [1.0, 2.0]"),
    ],
)
def test_bad_values_end_with_a_message(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    error = run(capsys, arguments, status=2)
    assert error.startswith("ds-ddg: error: ")
    assert message in error


@pytest.mark.parametrize("arguments", ["", "plan", "simulate --stages 2,x", "plan --stages two"])
def test_bad_syntax_ends_as_in_argparse(capsys: pytest.CaptureFixture[str], arguments: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    assert "usage: ds-ddg" in capsys.readouterr().err


def test_module_runs_without_torch() -> None:
    """`-X importtime` lists every module that the command imports."""
    command = [sys.executable, "-X", "importtime", "-m", "ds_ddg", "plan", "--stages", "2"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ddg, K = 2 stages")
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "ds_ddg.plan" in imported
    assert not {"torch", "deepspeed", "matplotlib", "numpy"} & imported
