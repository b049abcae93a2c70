"""The record of a recipe's run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.recipe_runs import FakeEngine, make_calls
from recipes.progress import Progress


def finished(progress: Progress, folder: Path, capsys: pytest.CaptureFixture[str], **metrics: Any) -> dict[str, Any]:
    progress.finish(folder, "A run", draw=list(progress.held_out), **metrics)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((folder / "metrics.json").read_text()) == line
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    header, *losses = (row.split(",") for row in (folder / "losses.csv").read_text().splitlines())
    assert header == ["call", "loss", "seconds"]
    assert {int(call): float(loss) for call, loss, _ in losses} == progress.losses
    seconds = [float(at) for _, _, at in losses]
    assert seconds == sorted(seconds)
    assert all(0 < at <= progress.seconds + 1e-6 for at in seconds)
    return line


def test_a_loss_was_known_when_it_came_not_at_its_calls_end(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("recipes.progress.time.perf_counter", lambda: float(next(clock)))
    progress = Progress(FakeEngine(), 6)  # type: ignore[arg-type]
    make_calls(progress, 4)
    assert progress.losses == {0: 10.0, 1: 9.0}
    # The clock goes on by one with each look: two looks a call in training, at the loss and at the end.
    assert progress.state_dict()["loss_seconds"].tolist() == [1.0, 7.0]


@pytest.mark.parametrize("calls_per_epoch", [4, None])
def test_the_last_line(
    alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], calls_per_epoch: int | None
) -> None:
    engine = FakeEngine()
    progress = Progress(engine, 12, calls_per_epoch, seed=3)  # type: ignore[arg-type]
    make_calls(progress, 8)
    engine.global_samples = 64
    progress.evaluated({"perplexity": 300.0, "accuracy": 0.25})
    make_calls(progress, 4)
    engine.global_samples = 96
    progress.evaluated({"perplexity": 7.5, "accuracy": 0.5})
    line = finished(progress, tmp_path, capsys, steps=12)
    assert line.pop("samples_per_second") > 0
    assert line.pop("seconds") >= 0
    assert line == {
        "schedule": "ddg",
        "stages": 4,
        "micro_batches": 2,
        "batch_size": 8,
        "seed": 3,
        "steps": 12,
        "perplexity": 7.5,
        "accuracy": 0.5,
        # Of an epoch's four calls the last two losses never come; without epochs it is the newest one.
        "train_loss": 1.5 if calls_per_epoch else 1.0,
    }
    assert progress.losses == {call: 10.0 - call for call in range(10)}
    assert engine.monitor.events == [
        ("Eval/Samples/perplexity", 300.0, 64),
        ("Eval/Samples/accuracy", 0.25, 64),
        ("Eval/Samples/perplexity", 7.5, 96),
        ("Eval/Samples/accuracy", 0.5, 96),
    ]


def test_nothing_trained(alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(FakeEngine(), 0, 4)  # type: ignore[arg-type]
    progress.evaluated({"accuracy": 0.5})
    line = finished(progress, tmp_path, capsys)
    assert (line["accuracy"], line["train_loss"], line["samples_per_second"]) == (0.5, None, None)
