"""Checkpoints of the recipes: few, whole, and refused where the settings are others."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.distributed import GetRanks
from helpers.recipe_runs import FakeEngine, make_calls
from recipes import common
from recipes.checkpoints import Checkpoints
from recipes.progress import Progress


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
