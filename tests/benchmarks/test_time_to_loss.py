"""The benchmark of time to a loss: the parts that need no training."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import launch, reached, time_to_loss


def a_run(schedule: str, losses: list[float], ms: float, seed: int = 0, unknown: int = 0, **more: Any) -> reached.Run:
    """Calls of `ms` each; the last `unknown` losses never come."""
    known = len(losses) - unknown
    return {
        "recipe": "resnet",
        "stages": 2,
        "micro_batches": 1,
        "seed": seed,
        "schedule": schedule,
        "total_calls": len(losses),
        "total_seconds": len(losses) * ms / 1e3,
        "held_out": ["test_accuracy", 0.5],
        "losses": losses[:known],
        "seconds": [(call + 1 + unknown) * ms / 1e3 for call in range(known)],
        **more,
    }


def test_the_smoothed_loss_looks_back_only() -> None:
    curve = reached.smoothed(a_run("1f1b", [float(20 - call) for call in range(20)], 1000))
    assert (curve.calls[0], curve.seconds[0], curve.losses[0]) == (1, 2.0, 19.5)
    assert (curve.calls[-1], curve.seconds[-1], curve.losses[-1]) == (19, 20.0, 1.5)


@pytest.mark.parametrize(
    ("losses", "place"),
    [
        ([5, 4, 3, 2], 2),
        ([5, 3, 4, 2, 2], 3),  # it has to stay there
        ([1, 2, 1], 0),
        ([3, 2, 4], None),
        ([3], 0),
    ],
)
def test_reached_for_good(losses: list[float], place: int | None) -> None:
    curve = reached.Curve(list(range(len(losses))), [0.0] * len(losses), losses)
    assert reached.reached(curve, 3) == place


def test_the_target_is_the_worst_runs_loss_of_any_schedule() -> None:
    good = [float(10 - call) for call in range(10)]
    bad = [loss + 0.5 for loss in good]
    for losses in ((good, bad), (bad, good)):
        runs = [a_run("1f1b", losses[0], 2), a_run("ddg", losses[1], 1, unknown=1)]
        assert reached.target(runs, 0.5) == 6.5, "the fifth call's"
    ddg = a_run("ddg", bad, 1, unknown=1)
    assert reached.target([a_run("1f1b", good, 2), ddg], 1.0) == 2.5, "the last that is known"


def test_rows_separate_the_cost_of_delay_from_the_bubbles() -> None:
    losses = [float(10 - call) for call in range(10)]
    runs = [a_run("1f1b", losses, 2000), a_run("ddg", [loss + 1 for loss in losses], 1000, unknown=1)]
    half, _, end = reached.rows(runs)
    assert (half["share"], half["target"], half["seeds"]) == (0.5, 7.0, [0])
    assert half["1f1b"] == {"seconds": [8.0], "calls": [4]}
    assert half["ddg"] == {"seconds": [6.0], "calls": [5]}, "its loss comes a call late"
    assert half["gains"] == {"seconds": [8 / 6], "calls": [0.8]}
    assert (end["target"], end["ddg"]["calls"], end["1f1b"]["calls"]) == (3.0, [9], [8])


def test_a_run_that_leaves_its_target_again_is_reported() -> None:
    back = [9.0, 8, 7, 6, 5, 6, 7, 8, 9, 9]
    down = [float(10 - call) for call in range(10)]
    runs = [a_run("1f1b", down, 2), a_run("ddg", back, 1), a_run("1f1b", down, 2, seed=1), a_run("ddg", down, 1, 1)]
    half = reached.rows(runs)[0]
    assert half["ddg"]["calls"] == [None, 5]
    assert half["gains"]["seconds"] == [2.0], "of the other seed"
    about = dict.fromkeys(("command", "cores", "platform", "python", "torch", "deepspeed"), "x")
    page = reached.page({"about": about, "runs": runs}, "picture.png")
    assert "Not reached by every run, such seeds are left out: resnet, K = 2, M = 1, after 50%" in page
    assert "| resnet | 2 | 1 | 6 | 50% | 0.0 (0.0 to 0.0) | 0.0 (0.0 to 0.0, 1 never) | 2.00 (2.00 to 2.00) |" in page


def test_the_page_says_where_ddg_is_not_faster(tmp_path: Path) -> None:
    losses = [float(10 - call) for call in range(10)]
    runs = [a_run("1f1b", losses, 1000), a_run("ddg", losses, 1500)]
    about = {"command": "c", "cores": 2, "platform": "p", "python": "3", "torch": "2", "deepspeed": "0"}
    text = time_to_loss.write({"about": about, "runs": runs}, tmp_path / "benchmarks")
    assert "sooner in 0 of 3 rows" in text
    assert "not in: resnet, K = 2, M = 1, after 50%; resnet, K = 2, M = 1, after 75%;" in text
    assert "| resnet | 2 | 1 | 1 | 1000 (1000 to 1000) | 1500 (1500 to 1500) | 0.67 (0.67 to 0.67) |" in text
    assert (tmp_path / "time_to_loss.md").read_text() == text
    assert "(benchmarks/time_to_loss.png)" in text
    assert (tmp_path / "benchmarks" / "time_to_loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "benchmarks" / "time_to_loss.json").read_text())["runs"] == runs


def test_another_m_is_the_same_batch() -> None:
    config = {"train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 2, "optimizer": {}}
    assert time_to_loss.with_micro_batches(config, 0) == config
    one = time_to_loss.with_micro_batches(config, 1)
    assert (one["train_micro_batch_size_per_gpu"], one["gradient_accumulation_steps"]) == (32, 1)
    with pytest.raises(SystemExit, match="a batch of 32 samples cannot be split"):
        time_to_loss.with_micro_batches(config, 5)


def test_schedules_take_turns_and_the_recipe_is_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def start(command: list[str], stages: int, log: Path) -> int:
        started.append(command)
        output = Path(command[-1])
        line = {"seconds": 3.0, "test_accuracy": 0.5}
        (output / "metrics.json").write_text(json.dumps(line))
        (output / "losses.csv").write_text("call,loss,seconds\n0,2.5,0.25\n1,1.5,0.5\n")
        return 0

    monkeypatch.setattr(launch, "_launch", start)
    options = argparse.Namespace(recipe=["resnet"], stages=[4], micro_batches=[0, 1], seeds=[0, 1], epochs=0)
    runs = time_to_loss.run(time_to_loss.trainings(options), tmp_path)["runs"]
    assert [run["schedule"] for run in runs] == ["1f1b", "ddg", "ddg", "1f1b"] * 2
    assert [run["micro_batches"] for run in runs] == [2] * 4 + [1] * 4
    assert (runs[0]["losses"], runs[0]["seconds"], runs[0]["total_calls"]) == ([2.5, 1.5], [0.25, 0.5], 2)
    assert [run["total_calls"] for run in runs if run["schedule"] == "ddg"] == [4, 4, 5, 5]
    script, _, config, *rest = started[-1]
    assert script == "recipes/resnet/train.py"
    assert json.loads(Path(config).read_text())["train_micro_batch_size_per_gpu"] == 32
    assert rest[:-2] == ["--schedule", "1f1b", "--seed", "1", "--epochs", "5"]
