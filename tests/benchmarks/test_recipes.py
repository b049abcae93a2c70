"""The benchmark that compares runs of the recipes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import launch
from helpers.paths import ROOT


def load_benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_recipes", ROOT / "benchmarks" / "recipes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


benchmark = load_benchmark()


def test_the_benchmarks_table(tmp_path: Path) -> None:
    values = {"1f1b": [0.99, 0.98], "ddg": [0.98, 0.98]}
    runs = {
        benchmark.Run("resnet", 2, seed, schedule, ()): {
            "test_accuracy": values[schedule][seed],
            "samples_per_second": 100.0 if schedule == "ddg" else 50.0,
        }
        for seed in (1, 0)
        for schedule in values
    }
    row = benchmark.row("resnet", 2, runs)
    assert (row["1f1b"], row["ddg"]) == (values["1f1b"], values["ddg"])
    assert row["differences"] == pytest.approx([-1.0, 0.0])
    assert row["as_good"], "half a point is the limit"
    last = benchmark.markdown([row]).splitlines()[-1]
    assert last == (
        "| resnet | 2 | 2 | test accuracy | 0.985 (0.98 to 0.99) | 0.98 (0.98 to 0.98) "
        "| -0.50 (-1.00 to +0.00) points | -0.5: within | 50, 100 |"
    )
    bert = benchmark.RECIPES["bert"]
    assert bert.difference(103.1, 100.0) == pytest.approx(3.1)
    assert (bert.as_good(2.9), bert.as_good(3.1), bert.as_good(-5)) == (True, False, True)

    document = tmp_path / "page.md"
    document.write_text(f"above\n{benchmark.START}\nold\n{benchmark.END}\nbelow\n")
    benchmark.write_between_markers(document, "| new |")
    assert document.read_text() == f"above\n{benchmark.START}\n\n| new |\n\n{benchmark.END}\nbelow\n"
    document.write_text("no markers")
    with pytest.raises(ValueError, match="has no place for the table"):
        benchmark.write_between_markers(document, "| new |")
    assert (ROOT / "docs" / "recipes.md").read_text().count(benchmark.START) == 1


def test_the_benchmark_repeats_no_run_of_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def start(command: list[str], stages: int, log: Path) -> int:
        started.append(command)
        (Path(command[-1]) / "metrics.json").write_text(json.dumps({"run": len(started)}))
        return 0

    monkeypatch.setattr(launch, "_launch", start)
    run = benchmark.Run("resnet", 2, 0, "ddg", ())
    assert [run.metrics(tmp_path)["run"], run.metrics(tmp_path)["run"]] == [1, 1]
    assert benchmark.Run("resnet", 2, 1, "ddg", ()).metrics(tmp_path)["run"] == 2
    assert benchmark.Run("resnet", 2, 0, "ddg", ("--epochs", "1")).metrics(tmp_path)["run"] == 3
    assert started[-1][3:-2] == ["--schedule", "ddg", "--seed", "0", "--epochs", "1"]


def test_the_benchmark_says_why_a_run_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(command: list[str], stages: int, log: Path) -> int:
        log.write_text("line\n" * 100 + "ValueError: too bad\n")
        return 1

    monkeypatch.setattr(launch, "_launch", start)
    with pytest.raises(SystemExit, match=r"(?s)deepspeed --quiet --num_gpus 4 recipes/.*exit status 1.*too bad"):
        benchmark.Run("bert", 4, 0, "1f1b", ()).metrics(tmp_path)
