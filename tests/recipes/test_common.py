"""What the recipes share: processes, arguments, config; the example of the documentation."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.paths import ROOT
from recipes import common

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
