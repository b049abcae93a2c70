"""Records of several ranks, and machines, put together; what the command makes of them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ds_ddg.analysis.trace_reader import read
from ds_ddg.cli import main
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.schedules.plan import Plan
from ds_ddg.schedules.simulator import Cost, replay
from ds_ddg.schedules.timeline import Timeline

COST = Cost(0.03, 0.06, 0.001, link=0.01)


def write(folder: Path, plan: Plan, timeline: Timeline, run: int = 1, skew: float = 0.0) -> Path:
    """As ranks would: stage k on a machine of its own whose monotonic clock starts 1000 k later."""
    folder.mkdir(exist_ok=True)
    for stage, row in enumerate(timeline.rows):
        lag = 1000.0 * stage
        about = {"run": run, "stage": stage, "stages": plan.num_stages, "replica": 0, "slice": 0}
        clock = {"wall": 5e8 + skew * stage, "monotonic": lag, "machine": f"m{stage}"}
        settings = {"schedule": plan.name, "micro_batches": plan.micro_batches, "slack": 0, "changes": 1}
        lines: list[Any] = [{"rank": {**about, **clock}}, {"plan": settings}]
        gaps = [0.0, *(event.start - before.end for before, event in pairwise(row))]
        lines += [
            [str(op), start + lag, end + lag, {"gradient": gap / 2}]
            for (op, start, end), gap in zip(row, gaps, strict=True)
        ]
        path = folder / f"stage{stage}-replica0-slice0.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plan = DDGPlan(3)
    return write(tmp_path / "trace", plan, replay(plan, 20, COST, drain=True))


def test_ranks_come_together_on_one_clock(folder: Path) -> None:
    expected = replay(DDGPlan(3), 20, COST, drain=True)
    run = read(folder)
    for ours, its in zip(run.timeline.rows, expected.rows, strict=True):
        assert [event.op for event in ours] == [event.op for event in its]
        assert [event.start for event in ours] == pytest.approx([event.start for event in its], abs=1e-5)
    assert run.disorder <= 0
    assert run.timeline.period() == pytest.approx(expected.period(), rel=1e-4)


def test_a_wrong_clock_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = DDGPlan(3)
    folder = write(tmp_path / "trace", plan, replay(plan, 20, COST), skew=-0.5)
    assert read(folder).disorder == pytest.approx(0.49, abs=1e-3)  # but for the latency of the link
    assert main(["trace", str(folder)]) == 0
    assert "start up to 490.0" in capsys.readouterr().out


def test_shares_of_the_steady_state(folder: Path) -> None:
    for share in read(folder).shares():
        assert share.milliseconds == pytest.approx({"F": 30, "B": 60, "U": 1}, rel=1e-3)
        assert share.busy == pytest.approx(0.091 / 0.1043, abs=0.03)  # a latency of 10 ms costs 4/3 of it, K = 3
        assert share.gaps["gradient"] == pytest.approx(share.gaps["other"])  # half of each gap
        assert share.gaps["gradient"] == pytest.approx((1 - share.busy) / 2)
        assert share.busy + sum(share.gaps.values()) == pytest.approx(1)


def test_plan_beside_measurement(folder: Path) -> None:
    measured, planned = read(folder).last(4)
    for timeline in (measured, planned):
        assert [op.micro_batch for op, _, _ in timeline.rows[0] if op.kind == "F"] == [16, 17, 18, 19]
    assert planned.rows[2][-1].op.micro_batch == pytest.approx(measured.rows[2][-1].op.micro_batch, abs=2)
    assert measured.makespan > planned.makespan


@pytest.mark.parametrize("ended", [1, 5, 6])
def test_a_run_shorter_than_asked_is_shown_from_its_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ended: int
) -> None:
    """Also one that was killed within a call; and nobody waits for a replay of as many ticks as were asked for."""
    plan = DDGPlan(2, 3)
    events = [e for e in replay(plan, 2, COST) if e.op.micro_batch < ended]
    folder = write(tmp_path / "trace", plan, Timeline(tuple(events), 2))
    measured, planned = read(folder).last(10**9)
    assert [op.micro_batch for op, _, _ in measured.rows[0] if op.kind == "F"] == list(range(ended))
    assert [op.micro_batch for op, _, _ in planned.rows[0] if op.kind == "F"] == list(range(ended))
    assert min(op.micro_batch for op, _, _ in planned) == 0
    assert main(["trace", str(folder)]) == 0
    answer = capsys.readouterr().out
    assert f"the last {ended} micro-batch(es)" in answer
    assert "clocks" not in answer  # rounding is no disorder


def test_files_of_an_older_run_are_left_out(folder: Path) -> None:
    plan = DDGPlan(5)
    write(folder, plan, replay(plan, 6, COST))  # run 1 had more stages
    plan = DDGPlan(2)
    write(folder, plan, replay(plan, 6, COST), run=2)
    assert read(folder).plan.num_stages == 2


def test_a_cut_line_is_left_out_and_a_broken_one_named(folder: Path) -> None:
    path = folder / "stage1-replica0-slice0.jsonl"
    whole = path.read_text()
    path.write_text(whole + '["1F99", 3.')
    assert read(folder).stages[1][-1][0].op.micro_batch == 19
    path.write_text(whole + "nonsense\n")
    with pytest.raises(ValueError, match=r"stage1-replica0-slice0.jsonl, line 63, is not JSON"):
        read(folder)
    path.write_text(whole + '["1X99", 1, 2, {}]\n')
    with pytest.raises(ValueError, match=r"line 63, is no record of ds_ddg: .*'1X99' is not an operation"):
        read(folder)


def test_older_files_come_first(folder: Path) -> None:
    path = folder / "stage2-replica0-slice0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.with_suffix(".older.jsonl").write_text("".join(lines[:30]))
    path.write_text("".join(lines[:2] + lines[30:]))
    assert [event.op for event, _ in read(folder).stages[2]] == list(DDGPlan(3).stream(2, 20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/nowhere"], 'has no records; train with "ddg": {"trace": '),
        (["{}/trace", "--replica", "1"], "has no records of replica 1; it has those of 0"),
        (["{}/trace", "--ticks", "0"], "--ticks must be 1 or more, got 0"),
        (["{}/missing"], "has records of stages [0, 2] of replica 0, of 3 stages; copy the files of all ranks"),
    ],
)
def test_what_cannot_be_read_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    plan = DDGPlan(3)
    missing = write(folder.parent / "missing", plan, replay(plan, 3))
    (missing / "stage1-replica0-slice0.jsonl").unlink()
    assert main(["trace", *(text.format(folder.parent) for text in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_other_replicas_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in list(folder.iterdir()):
        record = path.read_text().replace('"replica": 0', '"replica": 2')
        path.with_name(path.name.replace("replica0", "replica2")).write_text(record)
    assert main(["trace", str(folder), "--replica", "2"]) == 0
    assert main(["trace", str(folder), "--replica", "1"]) == 2
    assert "has no records of replica 1; it has those of 0, 2" in capsys.readouterr().err


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["trace", str(folder), "--ticks", "3", "--out", f"{tmp_path}/both.svg"]) == 0
    answer = capsys.readouterr().out
    assert answer.startswith("ddg, K = 3 stages, M = 1: 60 operations of stage 0, steady for ")
    assert answer.count("stage 2 | ") == 2
    assert "F17" in answer
    assert "F16" in answer  # of later stages
    assert "measured: ddg" in (tmp_path / "both.svg").read_text()
    assert main(["trace", str(folder), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [row["stage"] for row in record["per_stage"]] == [0, 1, 2]
    assert record["per_stage"][0]["forward_ms"] == pytest.approx(30, rel=1e-3)
    assert main(["trace", str(folder), "--out", f"{tmp_path}/perfetto.json"]) == 0
    assert json.loads((tmp_path / "perfetto.json").read_text())["traceEvents"]
