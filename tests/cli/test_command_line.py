"""The command line as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from ds_ddg.analysis.balance import LayerCost, save
from ds_ddg.cli import main
from ds_ddg.cli.options import progress
from ds_ddg.schedules.plan import Plan
from ds_ddg.schedules.simulator import Cost, replay
from ds_ddg.schedules.timeline import Timeline
from helpers.paths import ROOT


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
at the end engine.drain() finishes what is in flight, which no call of train_batch does

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


def test_plan_shows_that_calls_follow_without_a_gap(capsys: pytest.CaptureFixture[str]) -> None:
    """One call and its drain would look like a schedule with a flush, however many micro-batches it has."""
    answer = run(capsys, "plan --stages 2 --micro-batches 16 --clock")
    assert "B14---- F16 B15---- F17 " in answer.splitlines()[2]
    assert "at the end engine.drain() finishes" in answer
    assert "engine.drain()" not in run(capsys, "plan --stages 2 --schedule 1f1b")


def test_plan_of_two_chunks(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "plan --stages 2 --micro-batches 4 --schedule dualpipev --calls 1 --clock")
    assert "stage 1 | .   F0  F0' F1  F1' F2  B0'---- F2' B0-----" in answer
    assert "' of the stage's second chunk; one column" in answer
    assert "    0      0          0         1          2.5\n" in answer


def test_plan_of_schedules_that_deepspeed_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "plan --stages 3 --micro-batches 6 --schedule zb-h1 --calls 1 --clock")
    assert "stage 2 | .  .  F0 B0 F1 B1 F2 B2 W0 F3 B3 W1" in answer
    assert "; W gradients of the weights, B those of the input; one column" in answer
    assert "not in DeepSpeed: zb-h1 runs in torch.distributed.pipelining (ScheduleInterleavedZeroBubble" in answer
    assert "bubble in steady state: 10.0%" in answer
    answer = run(capsys, "plan --stages 4 --micro-batches 8 --schedule zb-v")
    assert "runs in torch.distributed.pipelining (ScheduleZBVZeroBubble)" in answer
    assert "bubble in steady state: 0.0%" in answer
    answer = run(capsys, "plan --stages 2 --micro-batches 4 --schedule interleaved --chunks 4 --calls 1")
    assert "stage 1 | F0 F1 F0' F1' F0'2 F1'2 F0'3B0'3 F1'3B1'3 F2B0'2" in " ".join(answer.split())
    assert "interleaved, K = 2 stages, M = 4, 4 chunks a stage" in answer
    assert "' of the stage's second chunk, '2 of its third" in answer
    assert "DeepSpeed" not in run(capsys, "plan --stages 2 --schedule 1f1b")


def test_simulate_compares_over_lists(capsys: pytest.CaptureFixture[str]) -> None:
    """The design's numbers: 1F1B takes (M+K-1)/M as long, and slack 1 hides half a tick of latency."""
    answer = json.loads(run(capsys, "simulate --stages 4 --micro-batches 1,4 --link 0,1.5 --slack 0,1 --json"))
    assert list(answer) == ["setups"]
    found = {(r["micro_batches"], r["link"], r["schedule"], r["slack"]): r["efficiency"] for r in answer["setups"]}
    for m, link in product((1, 4), (0, 1.5)):
        assert found[m, link, "one device", None] == 1
        assert found[m, link, "ddg", 0] == round(1 / (1 + link / 2), 4)
        assert found[m, link, "ddg", 1] == 1
        assert found[m, link, "gpipe", None] == round(3 * m / (3 * (m + 3) + 6 * link), 4)
    assert found[1, 1.5, "1f1b", None] == round(3 / (12 + 6 * 1.5), 4)
    assert found[4, 0, "1f1b", None] == round(4 / 7, 4)
    assert 0 < found[4, 1.5, "1f1b", None] < round(4 / 7, 4)
    assert (found[4, 0, "interleaved", None], found[4, 0, "zb-h1", None]) == (round(8 / 11, 4), 0.8)
    assert len(answer["setups"]) == len(found) == 4 * 8


def test_simulate_includes_dualpipev_where_it_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "simulate --stages 2 --micro-batches 2,4 --slack 0")
    rows = [line.split() for line in answer.splitlines()]
    assert [row[1:5] for row in rows if row[3:4] == ["dualpipev"]] == [["4", "0", "dualpipev", "-"]]
    assert "dualpipev needs M >= 2K, so it is not everywhere (K = 2)" in answer


def test_simulate_says_what_deepspeed_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "simulate --stages 2,4 --micro-batches 8,9 --slack 0")
    rows = [line.split() for line in answer.splitlines()]
    marked = [(row[0], row[1], row[3]) for row in rows if row[3:4] and row[3].endswith("*")]
    names = ["interleaved*", "zb-h1*", "zb-v*"]
    assert marked == [(k, "8", name) for k in "2" for name in names] + [("2", "9", "zb-v*")] + [
        ("4", "8", name) for name in names
    ] + [("4", "9", "zb-v*")]
    assert "rounds of equal length, of K or more: not K = 2 with M = 9, K = 4 with M = 9" in answer
    assert "* not in DeepSpeed: interleaved runs in Megatron-LM and torch.distributed.pipelining" in answer
    assert "* not in DeepSpeed: zb-v runs in torch.distributed.pipelining (ScheduleZBVZeroBubble)" in answer
    assert "staleness: in updates" not in answer
    stale = run(capsys, "simulate --stages 4 --micro-batches 2,4 --slack 0")
    assert "staleness: in updates; ddg's is at most 1 from M = (K - 1)(1 + slack) on, at the same speed" in stale
    found = json.loads(run(capsys, "simulate --stages 2 --micro-batches 4 --slack 0 --json"))["setups"]
    assert [row["schedule"] for row in found if not row["in_deepspeed"]] == ["interleaved", "zb-h1", "zb-v"]


def test_simulate_splits_a_backward_as_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """ZB-H1's bubble is (K-1)(F + B - W) = 1 + (2 - 2w) - 2w, here beside the work of 12."""
    save([LayerCost(f"layer{n}", 1.0, 2.0, 1000, 500, 100) for n in range(2)], tmp_path / "profile.json")
    for costs in ("", f"--profile {tmp_path}/profile.json"):
        for share, bubble in ((0.5, 1), (0.25, 2), (0, 3)):
            answer = run(capsys, f"simulate --stages 2 --micro-batches 4 --weight-share {share} --json {costs}")
            times = {row["schedule"]: row["time_per_call"] for row in json.loads(answer)["setups"]}
            assert times["zb-h1"] == 12 + bubble
            assert times["1f1b"] == 15


def test_simulate_names_the_rival(capsys: pytest.CaptureFixture[str]) -> None:
    costs = "--stages 4 --slack 0 --weight-bytes 1G --activation-bytes 1G --memory-limit 80G"
    answer = run(capsys, f"simulate {costs} --micro-batches 4,16").splitlines()
    assert answer[-2].startswith("K = 4, link 0, at most 80.0 GB a stage: take ddg, K = 4 stages, M = 4, ")
    rival = "  a rival that is never stale, not in DeepSpeed: zb-v, K = 4 stages, M = 16: 9.5 GB, 3 per micro-batch; "
    assert answer[-1] == rival + "runs in torch.distributed.pipelining (ScheduleZBVZeroBubble)"
    found = json.loads(run(capsys, f"simulate {costs} --micro-batches 4,16 --json"))
    assert [(row["schedule"], row["micro_batches"]) for row in found["rivals"]] == [("zb-v", 16)]
    assert "rival" not in run(capsys, f"simulate {costs} --micro-batches 4")
    assert json.loads(run(capsys, f"simulate {costs} --micro-batches 4 --json"))["rivals"] == [None]


def test_simulate_with_uneven_stages_against_one_device(capsys: pytest.CaptureFixture[str]) -> None:
    """Work 3 + 6 on one device; the slower stage needs 6 for it: 9/6 on two devices."""
    answer = run(capsys, "simulate --stages 2 --scale 1,2 --slack 0").splitlines()
    header = "stages  micro_batches  link      schedule  slack  time_per_call  speedup  efficiency  staleness"
    assert answer[0] == header + "  versions  activations"
    assert answer[3].split() == ["2", "1", "0", "ddg", "0", "6", "1.5", "0.75", "1", "2", "2"]
    assert answer[7].split() == ["2", "1", "0", "one", "device", "-", "9", "1", "1", "0", "1", "1"]


def test_simulate_recommends_for_a_memory_limit(capsys: pytest.CaptureFixture[str]) -> None:
    """Stash and keep need 4 + 4 GB and messages; without versions 1 + 4; without activations too 1 + 1 and inputs."""
    costs = "--stages 4 --slack 0 --weight-bytes 1G --activation-bytes 1G --bytes 1M"
    for limit, ending in (
        ("8.1G", '"weights": "stash", "activations": "keep": 8.0 GB, 3 per micro-batch'),
        ("5.1G", '"weights": "current", "activations": "keep": 5.0 GB, 3 per micro-batch'),
        ("4.0G", '"weights": "current", "activations": "recompute": 2.0 GB, 4 per micro-batch'),
    ):
        last = run(capsys, f"simulate {costs} --memory-limit {limit}").splitlines()[-1]
        assert last == f"K = 4, link 0, at most {limit[:-1]} GB a stage: take ddg, K = 4 stages, M = 1, {ending}"
    last = run(capsys, f"simulate {costs} --memory-limit 1G").splitlines()[-1]
    assert "nothing fits; the least is 2.0 GB (gpipe" in last
    answer = json.loads(run(capsys, f"simulate {costs} --memory-limit 5.1G --json"))
    assert answer["recommended"][0]["weights"] == "current"
    assert answer["setups"][2]["memory"] == [8.004e9, 6.013e9, 4.011e9, 2.007e9]


def test_simulate_recommends_1f1b_where_it_is_as_fast(capsys: pytest.CaptureFixture[str]) -> None:
    costs = "--stages 2 --micro-batches 1,256 --weight-bytes 1G --activation-bytes 1G --memory-limit 80G"
    assert "take 1f1b, K = 2 stages, M = 256: 4.0 GB" in run(capsys, f"simulate {costs}")


def test_simulate_from_a_profile(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    layers = [LayerCost(f"layer{n}", 1.0, 2.0, 1000, 500, 100) for n in range(3)]
    save(layers, tmp_path / "profile.json")
    command = f"simulate --stages 3 --profile {tmp_path}/profile.json --slack 0 --json"
    ddg = json.loads(run(capsys, command))["setups"][2]
    assert (ddg["time_per_call"], ddg["memory"]) == (3.0, [5800, 5100, 3200])
    slow = json.loads(run(capsys, f"{command} --bandwidth 20"))["setups"][2]
    assert slow["time_per_call"] > 5  # 100 bytes take 5 ms
    assert "--forward and --profile" in run(capsys, f"{command} --forward 2", status=2)


def test_simulate_says_its_unit_and_lists_a_setting_once(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "simulate --stages 2,2 --micro-batches 4,4 --slack 0,0 --forward 0.5 --overhead 0.25")
    rows = [line.split() for line in answer.splitlines()[1:9]]
    marked = ["interleaved*", "zb-h1*", "zb-v*"]
    assert [row[3] for row in rows] == ["gpipe", "1f1b", "dualpipev", "ddg", *marked, "one"]
    assert [row[5] for row in rows[1:4]] == ["15", "16.5", "12"]  # DualPipeV pays the overhead twice
    assert "times in units of which the forward of a stage takes 0.5" in answer


def test_simulate_says_its_unit_of_time_without_a_forward(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "simulate --stages 2 --forward 0 --backward 4")
    assert "times in units of which the backward of a stage takes 4" in answer


def test_simulate_help_has_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["simulate", "--help"])
    answer = " ".join(capsys.readouterr().out.split())
    for text in ("per call (default 1)", "slack of ddg (default 0,1)", "latency of a hop (default 0)"):
        assert text in answer


def test_simulate_replays_once_and_keeps_the_first_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed: list[tuple[str, float]] = []

    def counted(plan: Plan, calls: int, cost: Cost, **more: Any) -> Timeline:
        timeline = replay(plan, calls, cost, **more)
        assert {event.op.stage for event in timeline} == {0}
        replayed.append((f"{plan.name} {plan.micro_batches} {plan.delay(0)}", cost.link))
        return timeline

    monkeypatch.setattr("ds_ddg.analysis.recommend.replay", counted)
    run(capsys, "simulate --stages 3 --micro-batches 1,6 --link 0,0.5")
    assert len(replayed) == len(set(replayed)) == 2 * (7 + 8)


def test_progress_is_for_terminals_and_what_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(progress([1, 2], "counting")) == [1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for number in progress(range(3), "counting"):
        time.sleep(0.6 * (number < 2))
    assert "counting" in capsys.readouterr().err
    assert list(progress([1, 2], "counting")) == [1, 2]
    assert "counting" not in capsys.readouterr().err


def test_simulate_draws_a_sweeps_curves_or_one_timeline(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(capsys, f"simulate --stages 2 --micro-batches 1,4 --link 0,1 --out {tmp_path}/sweep.svg")
    curves = (tmp_path / "sweep.svg").read_text()
    names = ("ddg, slack 1", "1f1b", "dualpipev", "zb-v, not in DeepSpeed")
    for text in ("micro-batches per call, M", "K = 2", "link = 1", *names):
        assert text in curves
    run(capsys, f"simulate --stages 2 --out {tmp_path}/one.svg")
    assert "gpipe, K = 2 stages, M = 1, link 0" in (tmp_path / "one.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan --stages 0", "at least 1 stage and 1 micro-batch, got 0 and 1"),
        ("plan --stages 2 --slack -1", "slack must be 0 or more, got -1"),
        ("plan --stages 2 --schedule 1f1b --slack 1", "--slack 1 has no meaning for 1f1b"),
        ("plan --stages 2 --calls 0", "--calls must be 1 or more, got 0"),
        ("plan --stages 2 --out plan.gif", "must end in .svg, .png or .json"),
        ("plan --stages 2 --out /no/such/folder/plan.json", "there is no folder '/no/such/folder'; make it first"),
        ("simulate --stages 2 --link -1", "cost 'link' must be finite and 0 or more, got -1.0"),
        ("simulate --stages 3 --scale 1,2", "one number for each of 3 stages, got (1.0, 2.0)"),
        ("plan --stages 4 --micro-batches 7 --schedule dualpipev", "at least 8 for 4 stages, got 7"),
        ("plan --stages 4 --schedule gpipe --slack 1", "--slack 1 has no meaning for gpipe"),
        ("plan --stages 4 --schedule 1f1b --chunks 2", "--chunks 2 has no meaning for 1f1b; leave it out"),
        ("plan --stages 4 --schedule interleaved --chunks 1", "at least 2 chunks a stage, got 1"),
        ("plan --stages 4 --micro-batches 11 --schedule zb-h1", "zb-h1 runs micro-batches in M // K rounds"),
        ("simulate --stages 4 --chunks 1", "at least 2 chunks a stage, got 1"),
        ("simulate --stages 4 --weight-share 1.5", "cost 'weight_share' must be in 0 .. 1, got 1.5"),
        ("simulate --stages 3 --weight-bytes 1,2", "--weight-bytes must be one number, or one for each of 3 stages"),
        ("simulate --stages 3 --memory-limit 2G", "--memory-limit needs to know what a stage keeps"),
        ("simulate --stages 3 --memory-limit=-2G --weight-bytes 1", "--memory-limit must be above 0, got -2e+09"),
        ("simulate --stages 3 --bandwidth 10G", "--bandwidth 1e+10 has no effect on empty messages; add --bytes"),
        ("simulate --stages 2 --forward 0 --backward 0", "a forward and a backward take no time"),
        ("simulate --stages 2 --scale 0,0 --link 1", "no stage has any work"),
        ("simulate --stages 3 --overhead -1", "cost 'overhead' must be finite and 0 or more, got -1.0"),
        ("simulate --stages 3 --weight-bytes -1", "weight_bytes must be finite and 0 or more, got [-1.0"),
        ("simulate --stages 3,4 --out sweep.gif", "must end in .svg, .png or .json"),
        ("simulate --stages 3 --out=", "--out '' must end in .svg, .png or .json"),
        ("plan --stages 3 --out=", "--out '' must end in .svg, .png or .json"),
        ("trace . --out=", "--out '' must end in .svg, .png or .json"),
        ("simulate --stages 3 --memory-limit 2G --weight-bytes 1G", "what a stage keeps: add --activation-bytes, or"),
        ("simulate --stages 3 --memory-limit 2G --activation-bytes 1G", "what a stage keeps: add --weight-bytes, or"),
        ("simulate --stages 3 --memory-limit 2G", "add --weight-bytes and --activation-bytes, or --profile"),
        ("simulate --stages 2 --link 1e308", "times add up to more than a float can say"),
        ("simulate --stages 2 --forward 1e308", "the work of a call takes longer than a float can say"),
        ("simulate --stages 1000 --micro-batches 10000", "are 60,003,000 operations to replay, more than 5,000,000"),
        ("plan --stages 2 --calls 10000000", "are 60,000,000 operations to replay, more than 5,000,000"),
    ],
)
def test_bad_values_end_with_a_message(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    error = run(capsys, arguments, status=2)
    assert error.startswith("ds-ddg: error: ")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "arguments are required: command"),
        ("plan", "arguments are required: --stages"),
        ("simulate --stages 2,x", "'2,x' is not a number or a list such as 1,4,16"),
        ("plan --stages two", "invalid int value: 'two'"),
        ("simulate --stages 2 --bytes 5Q", "'5Q' is not a number of bytes such as 25M or 1.5G"),
        ("simulate --stages 2 --weight-bytes 1G,x", "'x' is not a number of bytes such as 25M or 1.5G"),
    ],
)
def test_bad_syntax_ends_as_in_argparse(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "usage: ds-ddg" in error
    assert message in error


def test_module_runs_without_torch() -> None:
    """`-X importtime` lists every module that the command imports."""
    command = [sys.executable, "-X", "importtime", "-m", "ds_ddg", "plan", "--stages", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ddg, K = 2 stages")
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "ds_ddg.schedules.plan" in imported
    assert not {"torch", "deepspeed", "matplotlib", "numpy"} & imported


def test_submodules_are_there_without_an_import_of_torch() -> None:
    code = """
import sys, ds_ddg
assert "torch" not in sys.modules
print(ds_ddg.partition.PipelineModule.__name__, ds_ddg.reference.__name__, ds_ddg.models.__name__)
assert not hasattr(ds_ddg, "nothing")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "PipelineModule ds_ddg.reference ds_ddg.models"
