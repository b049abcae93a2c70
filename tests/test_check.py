"""``ds-ddg check``: the messages of a run without a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_ddg.cli import main

RIGHT = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}


def check(capsys: pytest.CaptureFixture[str], path: Path, config: Any, arguments: str = "", status: int = 0) -> str:
    path = path / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    assert main(["check", str(path), *arguments.split()]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def test_explains_every_setting(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {**RIGHT, "ddg": {"slack": 1, "activations": "recompute", "clip": "global"}}
    answer = json.loads(check(capsys, tmp_path, config, "--stages 3 --json"))
    assert answer["settings"]["slack"] == 1
    assert set(answer["effects"]) == set(answer["settings"])
    assert "4 on stage 0, so up to 2 update(s) stale" in answer["effects"]["enabled"]
    assert "up to 3 version(s)" in answer["effects"]["weights"]
    assert "inputs of up to 5 micro-batch(es)" in answer["effects"]["activations"]
    assert "up to 0.5 tick(s)" in answer["effects"]["slack"]
    assert "clipped to 1 by the norm of the whole pipeline 4 call(s) ago" in answer["effects"]["clip"]
    assert "loss of 2 call(s) ago" in answer["effects"]["loss"]
    assert answer["per_stage"] == [
        {"stage": 0, "delay": 4, "staleness": 2, "versions": 3, "graphs": 1, "inputs": 5},
        {"stage": 1, "delay": 2, "staleness": 1, "versions": 2, "graphs": 1, "inputs": 3},
        {"stage": 2, "delay": 0, "staleness": 0, "versions": 1, "graphs": 1, "inputs": None},
    ]


def test_says_what_was_given_and_what_is_a_default(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    answer = check(capsys, tmp_path, {**RIGHT, "ddg": {"slack": 0}}, "--stages 2 --replicas 3")
    assert "is right for K = 2 stages, M = 2 micro-batches a call, 3 replica(s)" in answer
    assert '"slack": 0\n' in answer
    assert '"weights": "stash" (default)\n' in answer
    assert "is checked when the engine is built" in answer


def test_disabled(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {**RIGHT, "ddg": {"enabled": False}, "zero_optimization": {"stage": 1}}
    assert "DeepSpeed's own 1F1B" in check(capsys, tmp_path, config)


@pytest.mark.parametrize(
    ("config", "arguments", "parts"),
    [
        ({**RIGHT, "ddg": {"slak": 1}}, "", ["\"ddg\": unknown key 'slak' (value 1); known keys: enabled, weights"]),
        ({**RIGHT, "ddg": {"loss": 0, "clip": "all"}}, "", ['{"loss": 0}', "{\"clip\": 'all'}"]),
        ({**RIGHT, "zero_optimization": {"stage": 3}}, "", ["ZeRO stage 3: no pipeline can run it"]),
        (
            {**RIGHT, "optimizer": {"type": "Lamb"}, "fp16": {"enabled": True}, "ddg": {"clip": "global"}},
            "",
            ['"clip": "global" with fp16 and Lamb', 'use "clip": "stage"'],
        ),
        ({"steps_per_print": 5}, "", ["DeepSpeed refuses the config: Either train_batch_size or"]),
        ({**RIGHT, "train_batch_size": 8}, "--replicas 2", ["refuses the config: Check batch", "8 != 4 * 2 * 2"]),
        ("[1]", "", ["must hold a block of settings, {...}, got list"]),
        ("{", "", ["is not JSON"]),
        (RIGHT, "--stages 0", ["--stages must be 1 or more, got 0"]),
    ],
)
def test_refuses_as_a_run_does(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: Any, arguments: str, parts: list[str]
) -> None:
    error = check(capsys, tmp_path, config, arguments, status=2)
    for part in parts:
        assert part in error
