"""What the recipes look at before the training: numbers, processes, folders, DeepSpeed's config."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.distributed import GetRanks

pytest.importorskip("transformers")

from recipes import checks

RECIPES = {"resnet.train": (), "bert.pretrain": (), "bert.finetune": ("--model", "somewhere")}


def parsed(monkeypatch: pytest.MonkeyPatch, recipe: str, *words: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["recipe.py", *RECIPES[recipe], *words])
    return importlib.import_module(f"recipes.{recipe}").parse_arguments()


@pytest.mark.parametrize(
    ("recipe", "option", "low"),
    [
        *((recipe, option, low) for recipe in RECIPES for option, low in (("epochs", 1), ("stages", 1), ("seed", 0))),
        ("resnet.train", "image-size", 1),
        ("resnet.train", "workers", 0),
        *(("bert.pretrain", option, 1) for option in ("vocabulary", "layers", "hidden", "heads")),
        ("bert.pretrain", "length", 4),
        ("bert.finetune", "length", 4),
    ],
)
def test_numbers_too_small_to_make_sense(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: str, option: str, low: int
) -> None:
    assert getattr(parsed(monkeypatch, recipe, f"--{option}", str(low)), option.replace("-", "_")) == low
    for wrong in (low - 1, -5):
        with pytest.raises(SystemExit) as stopped:
            parsed(monkeypatch, recipe, f"--{option}", str(wrong))
        assert stopped.value.code == 2
        assert f"argument --{option}: must be at least {low}, got {wrong}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parsed(monkeypatch, recipe, f"--{option}", "many")
    assert f"argument --{option}: invalid int value: 'many'" in capsys.readouterr().err


def test_other_numbers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed(monkeypatch, "bert.pretrain", "--dropout", "0.1").dropout == 0.1
    for option, wrong, message in (
        ("dropout", "1", "must be 0 or more and less than 1, got 1"),
        ("dropout", "nan", "must be 0 or more and less than 1, got nan"),
        ("dropout", "no", "invalid float value: 'no'"),
        ("checkpoint-every", "0", "must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            parsed(monkeypatch, "bert.pretrain", "--checkpoint-dir", "somewhere", f"--{option}", wrong)
        assert f"argument --{option}: {message}" in capsys.readouterr().err


def test_stages_have_to_fit_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.checks.dist.get_world_size", lambda: 4)
    assert [checks.stages(asked) for asked in (None, 4, 2, 1)] == [4, 4, 2, 1]
    for asked in (3, 8):
        with pytest.raises(SystemExit) as stopped:
            checks.stages(asked)
        assert str(stopped.value) == (
            f"--stages {asked} needs a multiple of {asked} processes, one for each stage of a pipeline, got 4; start "
            f"as many (--num_gpus {asked}), or use --stages 1 or 2 or 4"
        )


def unwritable(rank: int, world_size: int, folder: str) -> list[str]:
    """What is said where a folder cannot be written, on one rank or on all."""
    here = Path(folder)
    file = here / f"file{rank}"
    file.write_text("in the way")
    fine, trace = here / "new" / "folder", {"ddg": {"trace": str(here / "trace")}}
    checks.folders(trace, {"--save": fine / "shared", "--checkpoint-dir": None}, {"--output-dir": fine / "first"})
    cases: list[tuple[Any, Any, Any]] = [
        ({"ddg": {}}, {}, {"--output-dir": Path("/proc/nope")}),
        ({"ddg": {}}, {"--save": file / "below" if rank else fine}, {}),
        ({"ddg": {}}, {"--checkpoint-dir": Path("/proc")}, {}),
        ({"ddg": {"trace": "/proc/nope"}}, {}, {}),
    ]
    said = []
    for case in cases:
        with pytest.raises(SystemExit) as stopped:
            checks.folders(*case)
        said.append(str(stopped.value))
    return said


def test_folders_are_made_and_really_written_to(ranks: GetRanks, tmp_path: Path) -> None:
    first, second = ranks(2).run(unwritable, str(tmp_path))
    assert first == second
    assert first[0] == (
        "rank 0: --output-dir: cannot write to '/proc/nope' (No such file or directory); name a folder that can be "
        "made and written"
    )
    assert first[1].startswith(f"rank 1: --save: cannot write to '{tmp_path}/file1/below' (Not a directory); ")
    assert first[2].startswith("rank 0, 1: --checkpoint-dir: cannot write to '/proc' (")
    assert first[3].startswith('rank 0, 1: "ddg": {"trace"}: cannot write to \'/proc/nope\' (')
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.name.startswith("file")}
    assert left == {"new", "new/folder", "new/folder/shared", "new/folder/first", "trace"}, "nothing is left behind"


def wrong_configs(rank: int, world_size: int) -> list[str]:
    import torch
    from deepspeed.pipe import LayerSpec, PipelineModule

    layers = [LayerSpec(torch.nn.Linear, 2, 2) for _ in range(3)]
    net = PipelineModule(layers, num_stages=2, loss_fn=torch.nn.functional.mse_loss)
    fine = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "ddg": {}}
    assert checks.deepspeed_config(fine, net).train_batch_size == 8
    said = []
    for wrong in ({"train_batch_size": 7}, {"zero_optimization": {"stage": 2}}, {"zero_optimization": {"stage": "x"}}):
        with pytest.raises(SystemExit) as stopped:
            checks.deepspeed_config({**fine, **wrong}, net)
        said.append(str(stopped.value))
    return said


def test_refusals_of_either_are_said_without_a_traceback(ranks: GetRanks) -> None:
    for batch, stage, kind in ranks(2).run(wrong_configs):
        assert batch.startswith("--deepspeed_config: Check batch related parameters. ")
        assert batch.endswith("7 != 4 * 2 * 1")
        assert stage.startswith("DDG cannot train this set-up:\n- ZeRO stage 2: no pipeline can run it; set")
        assert kind.startswith("--deepspeed_config: 1 validation error for DeepSpeedZeroConfig\nstage\n")
