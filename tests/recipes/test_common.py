"""What the recipes share: arguments, config, the record of a run, checkpoints; the benchmark that compares runs."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import launch
from helpers.distributed import GetRanks
from helpers.paths import ROOT
from recipes import common
from recipes.checkpoints import Checkpoints
from recipes.progress import Progress


def load_benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_recipes", ROOT / "benchmarks" / "recipes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


benchmark = load_benchmark()


class FakeMonitor:
    enabled = True

    def __init__(self) -> None:
        self.events: list[tuple[str, float, int]] = []

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        self.events += events


class FakeEngine:
    """As much of an engine as `Progress` and `Checkpoints` use."""

    num_stages = 4
    unreadable = ""

    def __init__(self) -> None:
        self.ddg = SimpleNamespace(enabled=True)
        self.monitor = FakeMonitor()
        self.global_samples = 0
        self.saved: list[Any] = []

    def gradient_accumulation_steps(self) -> int:
        return 2

    def train_batch_size(self) -> int:
        return 8

    def save_checkpoint(self, directory: str, client_state: dict[str, Any]) -> None:
        calls = client_state["progress"]["calls"]
        (Path(directory) / f"global_step{calls}").mkdir(exist_ok=True)
        (Path(directory) / "latest").write_text(f"global_step{calls}")
        self.saved.append(client_state)

    def load_checkpoint(self, directory: str, tag: str) -> tuple[str, Any]:
        if self.unreadable == tag:
            raise ValueError(f"cannot load {directory}/{tag}; nothing was changed")
        return directory, next(s for s in self.saved if tag == f"global_step{s['progress']['calls']}")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the only rank."""
    monkeypatch.setattr("recipes.progress.dist.get_rank", lambda: 0)
    for module in ("common", "checkpoints"):
        monkeypatch.setattr(f"recipes.{module}.gather", lambda value: [value])


# -- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize(
    ("kind", "gpus", "processes", "expected"),
    [
        ("cuda", 1, 2, [0, 0]),
        ("cuda", 2, 4, [0, 0, 1, 1]),
        ("cuda", 2, 3, [0, 0, 1]),
        ("cuda", 2, 2, None),
        ("cuda", 4, 2, None),
        ("cpu", 1, 2, None),
    ],
)
def test_processes_share_gpus_where_there_are_too_few(
    monkeypatch: pytest.MonkeyPatch, kind: str, gpus: int, processes: int, expected: list[int] | None, launcher: str
) -> None:
    accelerator = SimpleNamespace(device_count=lambda: gpus, device_name=lambda: kind)
    monkeypatch.setattr(common, "get_accelerator", lambda: accelerator)
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(launcher, str(processes))
    ranks = []
    for rank in range(processes):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert common.share_gpus() == ("gloo" if expected else None)
        ranks.append(int(os.environ["LOCAL_RANK"]))
    assert ranks == (expected or list(range(processes)))


# -- arguments and config ---------------------------------------------------------------------------------------------


def parsed(monkeypatch: pytest.MonkeyPatch, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    common.add_arguments(parser)
    monkeypatch.setattr(sys, "argv", ["recipe.py", *words])
    return common.parse(parser)


def test_a_launchers_arguments_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parsed(monkeypatch, "--local_rank=1", "--deepspeed", "--deepspeed_config", "ds.json")
    assert (args.local_rank, args.deepspeed_config, args.seed, args.resume) == (1, "ds.json", 0, False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read '.*ds.json' as JSON: .*No such file"),
        ("{", "cannot read '.*ds.json' as JSON: "),
        ("[1]", "'.*ds.json' must hold a JSON object, got list"),
        ('{"a": 1, "a": 2}', r"cannot read '.*ds.json' as JSON: Duplicate keys in DeepSpeed config: \['a'\]"),
    ],
)
def test_a_config_that_cannot_be_read(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "ds.json").write_text(content)
    with pytest.raises(SystemExit, match=message):
        common.read_config(str(tmp_path / "ds.json"), None)
    with pytest.raises(SystemExit, match="--deepspeed_config is required"):
        common.read_config(None, None)


def test_the_schedule_of_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"ddg": {"enabled": True, "slack": 1}}))
    assert common.read_config(str(path), "1f1b")["ddg"] == {"enabled": False, "slack": 1}
    assert common.read_config(str(path), None)["ddg"] == {"enabled": True, "slack": 1}
    path.write_text("{}")
    assert common.read_config(str(path), "ddg") == {"ddg": {"enabled": True}}
    assert common.read_config(str(path), None) == {"ddg": {}}
    path.write_text('{  # comments, as DeepSpeed takes them\n  "ddg": null\n}')
    assert common.read_config(str(path), "1f1b") == {"ddg": {"enabled": False}}


@pytest.mark.parametrize(
    ("block", "message"),
    [({"slac": 1}, r"unknown key 'slac' \(value 1\); known keys: "), (5, r"must be a block of settings .*, got 5")],
)
def test_a_wrong_ddg_block_is_named_with_its_file(tmp_path: Path, block: Any, message: str) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"ddg": block}))
    with pytest.raises(SystemExit, match=rf'--deepspeed_config .*ds.json: "ddg":? {message}'):
        common.read_config(str(tmp_path / "ds.json"), "ddg")


def test_the_schedule_is_known_before_there_is_an_engine() -> None:
    assert [common.schedule_of({"ddg": block}) for block in ({}, {"enabled": False})] == ["ddg", "1f1b"]


def test_auto_in_the_scheduler_is_the_length_of_the_run() -> None:
    config = {"scheduler": {"params": {"total_num_steps": "auto", "warmup_num_steps": 4}}, "train_batch_size": "auto"}
    assert common.fill_scheduler(config, 70)
    assert config["scheduler"] == {"params": {"total_num_steps": 70, "warmup_num_steps": 4}}
    assert config["train_batch_size"] == "auto"
    assert not common.fill_scheduler(config, 80)
    assert config["scheduler"] == {"params": {"total_num_steps": 70, "warmup_num_steps": 4}}
    assert not common.fill_scheduler({}, 70)


def test_every_config_is_one_that_ds_ddg_takes() -> None:
    from ds_ddg.config import DDGConfig

    for path in (ROOT / "configs").glob("*.json"):
        config = common.read_config(str(path), None)
        assert DDGConfig.parse(config["ddg"]).enabled
        assert {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "scheduler"} <= set(
            config
        )


def test_seeds_of_different_places_differ() -> None:
    places = [(seed, epoch, rank) for seed in range(4) for epoch in range(4) for rank in range(4)]
    assert len({common.seed_from(*place) for place in places}) == len(places)
    assert common.seed_from(1, 2, 3) == common.seed_from(1, 2, 3)


# -- the record of a run ----------------------------------------------------------------------------------------------


def make_calls(progress: Progress, calls: int, delay: int = 2) -> None:
    """As an engine would: the loss of call n is 10 - n and comes `delay` calls late."""
    for _ in range(calls):
        with progress:
            of = max(0, progress.calls - delay)
            progress.update(torch.tensor(10.0 - of), of)


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


# -- checkpoints ------------------------------------------------------------------------------------------------------


def arguments(directory: Path | None, **more: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{"checkpoint_dir": directory, "checkpoint_every": None, "resume": False, "seed": 0, **more}
    )


def test_checkpoints_are_few_and_restore_the_record(alone: None, tmp_path: Path) -> None:
    engine = FakeEngine()
    progress = Progress(engine, 20, 5)  # type: ignore[arg-type]
    (tmp_path / "global_step_of_another_kind").mkdir()
    checkpoints = Checkpoints(arguments(tmp_path), engine, progress, every=6)  # type: ignore[arg-type]
    checkpoints.restore()
    random_numbers = []
    for _ in range(20):
        make_calls(progress, 1)
        if progress.calls == 7:
            progress.evaluated({"accuracy": 0.1})
        checkpoints.save_if_due()
        random_numbers.append(float(torch.rand(())))
        if progress.calls == 18:
            seconds = progress.seconds
    kept = {path.name for path in tmp_path.glob("global_step*")}
    assert kept == {"global_step18", "global_step20", "global_step_of_another_kind"}, "the end is saved, too"

    (tmp_path / "latest").write_text("global_step18")
    again = Progress(engine, 20, 5)  # type: ignore[arg-type]
    torch.manual_seed(99)
    Checkpoints(arguments(tmp_path, resume=True), engine, again, every=6).restore()  # type: ignore[arg-type]
    assert float(torch.rand(())) == random_numbers[17], "dropout goes on as it would have"
    assert again.seconds == seconds > 0
    make_calls(again, 2)
    assert (again.calls, again.losses, again.held_out) == (progress.calls, progress.losses, progress.held_out)
    for record, folder in ((progress, "whole"), (again, "parts")):
        record.finish(tmp_path / folder, "A run", draw=[])
    whole, parts = ((tmp_path / folder / "losses.csv").read_text().splitlines() for folder in ("whole", "parts"))
    assert whole[:17] == parts[:17], "a resumed run knows when it had the losses before"


def test_without_a_folder_nothing_is_saved(alone: None, tmp_path: Path) -> None:
    engine = FakeEngine()
    progress = Progress(engine, 3)  # type: ignore[arg-type]
    checkpoints = Checkpoints(arguments(None), engine, progress, every=1)  # type: ignore[arg-type]
    checkpoints.restore()
    make_calls(progress, 3)
    checkpoints.save_if_due()
    assert not engine.saved


CONFIG = {
    "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
    "scheduler": {"params": {"total_num_steps": 6}},
    "steps_per_print": 10,
    "ddg": {"enabled": True, "trace": "here"},
}


def saved_run(folder: Path, calls: int = 6, **settings: Any) -> FakeEngine:
    """A run that has saved after each two calls."""
    engine = FakeEngine()
    progress = Progress(engine, calls, 2, model="net")  # type: ignore[arg-type]
    checkpoints = Checkpoints(arguments(folder), engine, progress, every=2, **settings)  # type: ignore[arg-type]
    checkpoints.restore()
    for _ in range(calls):
        make_calls(progress, 1)
        checkpoints.save_if_due()
    return engine


def resume(folder: Path, engine: FakeEngine, calls: int = 6, eval_only: bool = False, **settings: Any) -> Progress:
    progress = Progress(engine, calls, 2, model="net")  # type: ignore[arg-type]
    args = arguments(folder, resume=True, eval_only=eval_only)
    Checkpoints(args, engine, progress, every=2, **settings).restore()  # type: ignore[arg-type]
    return progress


def test_other_settings_are_refused_by_name(alone: None, tmp_path: Path) -> None:
    engine = saved_run(tmp_path, epochs=3, image_size=None, config=CONFIG)
    other = {
        **CONFIG,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "steps_per_print": 3,
        "csv_monitor": {"enabled": True},
        "ddg": {"weights": "current", "loss": "exact"},
    }
    with pytest.raises(SystemExit) as stopped:
        resume(tmp_path, engine, epochs=3, image_size=64, config=other)
    assert str(stopped.value) == (
        f"rank 0: the checkpoints in {tmp_path} are of a run with image_size None, now 64; "
        "config.optimizer.params.lr 0.05, now 0.1; config.ddg.weights 'stash', now 'current'; "
        "config.gradient_clipping not set, now 1.0; config.bf16.enabled not set, now True: use the same, or start "
        "anew in another --checkpoint-dir"
    )


def test_what_only_reports_may_change(alone: None, tmp_path: Path) -> None:
    engine = saved_run(tmp_path, epochs=3, config=CONFIG)
    other = {
        **CONFIG,
        "steps_per_print": 3,
        "wall_clock_breakdown": True,
        "tensorboard": {"enabled": True},
        "ddg": {"slack": 0, "loss": "exact"},  # the rest is what it was, the defaults
    }
    assert resume(tmp_path, engine, epochs=3, config=other).calls == 6


def test_more_epochs_unless_the_scheduler_depends_on_them(alone: None, tmp_path: Path) -> None:
    engine = saved_run(tmp_path / "fixed", epochs=None, config=CONFIG)
    assert resume(tmp_path / "fixed", engine, calls=8, epochs=None, config=CONFIG).calls == 6
    with pytest.raises(SystemExit, match=r"global_step6 is past the end of this run of 4 calls: raise --epochs"):
        resume(tmp_path / "fixed", engine, calls=4, epochs=None, config=CONFIG)

    engine = saved_run(tmp_path / "auto", epochs=3, config=CONFIG)
    longer = {**CONFIG, "scheduler": {"params": {"total_num_steps": 8}}}
    reason = (
        r'epochs 3, now 4 \(they set the "auto" of the scheduler, so the learning rate of every call\); '
        r"config.scheduler.params.total_num_steps 6, now 8: use the same"
    )
    with pytest.raises(SystemExit, match=reason):
        resume(tmp_path / "auto", engine, calls=8, epochs=4, config=longer)
    # Nothing is trained, so how it was does not matter.
    assert resume(tmp_path / "auto", engine, calls=8, eval_only=True, epochs=4, config=longer).calls == 6


def test_checkpoints_of_an_earlier_version(alone: None, tmp_path: Path) -> None:
    engine = saved_run(tmp_path, epochs=3, config=CONFIG)
    settings = tmp_path / "settings.json"
    kept = json.loads(settings.read_text())
    earlier = {key: value for key, value in kept.items() if key not in ("epochs", "config")}
    settings.write_text(json.dumps({**earlier, "model": "other"}))
    with pytest.raises(SystemExit, match=r"of a run with model 'other', now 'net': use"):
        resume(tmp_path, engine, epochs=3, config=CONFIG)
    settings.write_text(json.dumps(earlier))
    assert resume(tmp_path, engine, epochs=3, config=CONFIG).calls == 6
    assert json.loads(settings.read_text()) == kept, "from here on all of them count"
    settings.write_text("{")
    with pytest.raises(SystemExit, match=r"settings.json, which says what run .* cannot be read: Expecting"):
        resume(tmp_path, engine, epochs=3, config=CONFIG)


def test_a_damaged_checkpoint_is_not_loaded(alone: None, tmp_path: Path) -> None:
    """The engine says what is wrong with it, on every rank; the recipe, what to do."""
    engine = saved_run(tmp_path)
    engine.unreadable = "global_step6"
    there = rf"there is also global_step4: to go on from it, write its name into {tmp_path}/latest"
    with pytest.raises(SystemExit, match=rf"^cannot load {tmp_path}/global_step6; nothing was changed; {there}$"):
        resume(tmp_path, engine)
    (tmp_path / "latest").write_text("global_step4")
    assert resume(tmp_path, engine).calls == 4
    (tmp_path / "latest").write_text("")
    with pytest.raises(SystemExit, match=r"latest names '', which is not there; there is also global_step6: to go on"):
        resume(tmp_path, engine)


def test_what_another_time_left_is_not_among_the_newest(alone: None, tmp_path: Path) -> None:
    """A save that was cut off, before the run went on from an earlier one; two whole ones are kept all the same."""
    engine = FakeEngine()
    progress = Progress(engine, 20, 5)  # type: ignore[arg-type]
    (tmp_path / "global_step99").mkdir()
    checkpoints = Checkpoints(arguments(tmp_path), engine, progress, every=2)  # type: ignore[arg-type]
    for _ in range(6):
        make_calls(progress, 1)
        checkpoints.save_if_due()
    assert {path.name for path in tmp_path.glob("global_step*")} == {"global_step4", "global_step6", "global_step99"}


def fail_on_rank_1(rank: int, error: Exception) -> None:
    with common.on_every_rank():
        if rank == 1:
            raise error


def disagree(rank: int, world_size: int, folder: str) -> list[str]:
    """What is said where ranks differ."""
    said = []
    progress = Progress(FakeEngine(), 3, seed=0)  # type: ignore[arg-type]
    mine = Path(folder) / str(rank)
    if rank == 0:
        (mine / "global_step2").mkdir(parents=True)
        (mine / "latest").write_text("global_step2")
        (mine / "settings.json").write_text(json.dumps(progress.settings))
    checkpoints = Checkpoints(arguments(mine, resume=True), FakeEngine(), progress, every=1)  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as stopped:
        checkpoints.restore()
    said.append(str(stopped.value))
    with pytest.raises(SystemExit) as stopped:
        fail_on_rank_1(rank, FileNotFoundError("no such file"))
    said.append(str(stopped.value))
    # A mistake in the code keeps its traceback, and the other ranks do not wait.
    with pytest.raises(KeyError if rank == 1 else SystemExit) as failed:
        fail_on_rank_1(rank, KeyError("name"))
    said.append(str(failed.value))
    return said


def test_all_ranks_stop_if_they_differ(ranks: GetRanks, tmp_path: Path) -> None:
    first, second = ranks(2).run(disagree, str(tmp_path))
    assert first[0].endswith("is not the same folder on all machines: by rank it has ['global_step2', None]")
    assert second[0] == first[0].replace(f"{tmp_path}/0", f"{tmp_path}/1")
    assert first[1] == second[1] == "rank 1: no such file"
    assert (first[2], second[2]) == ("rank 1: 'name'", "'name'")


# -- the example of the documentation ---------------------------------------------------------------------------------


def run_example(rank: int, world_size: int, code: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "docs/recipes.md", "exec"), {"__name__": "__main__"})
    return printed.getvalue()


def documented_example() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.S)
    return code


def test_the_example_in_the_documentation_learns(ranks: GetRanks) -> None:
    for printed in ranks(2).run(run_example, documented_example()):
        step, loss = re.search(r"loss of call (\d+), counted from 0: ([\d.]+)$", printed.strip()).groups()  # type: ignore[union-attr]
        assert step == "98", "one call ago"
        assert float(loss) < 0.5


def test_the_example_in_the_documentation_can_be_measured(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(documented_example())
    (command,) = set(re.findall(r"`ds-ddg (partition mine.py.*?)`", (ROOT / "docs" / "recipes.md").read_text()))
    run = subprocess.run(
        [sys.executable, "-m", "ds_ddg", *command.split()],
        cwd=tmp_path,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    first, last = run.stdout.splitlines()[1:3]
    assert re.match(r" +0 +0 Linear \.\. \d Block ", first)
    assert re.match(r" +1 +\d Block \.\. 7 Linear \+ cross_entropy ", last)


# -- the benchmark ----------------------------------------------------------------------------------------------------


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
