"""``ds-ddg partition``: the command, its files, and what it says of a user's mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ds_ddg.analysis.balance import LayerCost, balance, load, save
from ds_ddg.cli import main
from helpers.paths import ROOT
from helpers.timed_layers import costs

SOURCE = """
import torch
from neighbour import WIDTH
from torch import nn

print("a word from the user's file")

def with_loss():
    return [nn.Linear(3, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 5)], (torch.ones(2, 3), torch.ones(2, 5)), nn.MSELoss()

def without_loss():
    return with_loss()[:2]

def wrong():
    return 7

def wide():
    return [nn.Linear(4, 4)], (torch.ones(2, 3), None)

class Own(nn.Module):
    def forward(self, x):
        return x.nothing

def own():
    return [Own()], (torch.ones(2, 3), None)

def takes(width):
    return without_loss()

def fails():
    return {}["a"]
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "neighbour.py").write_text("WIDTH = 4\n")
    (tmp_path / "layers_of_test.py").write_text(SOURCE)
    return str(tmp_path / "layers_of_test.py")


def run(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main(["partition", *arguments]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def test_command_measures_splits_and_saves(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = str(tmp_path / "profile.json")
    answer = json.loads(run(capsys, f"{source}:with_loss", "--stages", "2", "--json", "--out", saved))
    assert answer["stages"] == 2
    assert [name for stage in answer["per_stage"] for name in stage["layers"]] == [
        "Linear",
        "ReLU",
        "Linear + MSELoss",
    ]
    assert [c.parameter_bytes for c in load(saved)] == [64, 0, 100]
    assert json.loads(run(capsys, saved, "--stages", "2", "--json")) == answer
    assert run(capsys, saved, "--stages", "3") == f"{balance(load(saved), 3)}\n"
    assert "2 Linear\n" not in run(capsys, f"{source}:without_loss", "--stages", "1")


def test_costs_survive_a_file(tmp_path: Path) -> None:
    layers = [LayerCost("Überschicht", 0.1, 0.30000000000000004, 1, 2, 3), LayerCost("<lambda>", 0, 0)]
    save(layers, tmp_path / "profile.json")
    assert load(tmp_path / "profile.json") == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a profile of layers.*JSONDecodeError.*write one with ds-ddg partition"),
        ("[]", "is not a profile of layers.*keys name, forward_ms, backward_ms"),
        ('{"stages": []}', "is not a profile of layers.*KeyError"),
        ('{"layers": [{"name": "a"}]}', "missing 2 required positional arguments: 'forward_ms' and 'backward_ms'"),
        ('{"layers": [{"name": "a", "forward_ms": "1", "backward_ms": 1}]}', "is not a profile of layers"),
        ('{"layers": [{"name": "a", "forward_ms": -1, "backward_ms": 1}]}', "layer 'a': forward_ms must be finite"),
        ('{"layers": []}', "1 stages for 0 layers"),
    ],
)
def test_command_refuses_what_is_no_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    error = run(capsys, str(path), "--stages", "1", status=2)
    assert error.startswith("ds-ddg: error: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{source}:missing --stages 1", "has no function 'missing'; it has with_loss, without_loss, wrong, wide"),
        ("{source}:wrong --stages 1", "must return (layers, sample) or (layers, sample, loss_fn), got int"),
        ("{source}:with_loss --stages 4", "4 stages for 3 layers; use 1 to 3 stages"),
        ("{source}:with_loss --stages 0", "--stages must be 1 or more, got 0"),
        ("{source}:with_loss --stages 1 --out profile.txt", "--out 'profile.txt' must end in .json"),
        ("{source} --stages 1", "is neither FILE.py:FUNCTION nor a saved profile, which ends in .json"),
        ("/no/such.py:layers --stages 1", "No such file or directory"),
        ("/no/such.json --stages 1", "No such file or directory"),
    ],
)
def test_command_ends_with_a_message(
    source: str, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    error = run(capsys, *arguments.format(source=source).split(), status=2)
    assert "ds-ddg: error: " in error
    assert message in error


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("wide", r"layer 0 \(Linear\) failed on \(2, 3\) torch.float32: .*cannot be multiplied.*the sample must be"),
        ("own", r"layer 0 \(Own\) failed on .*no attribute 'nothing'.*layers_of_test.py, line \d+: return x.nothing"),
        ("takes", r"takes is called without arguments: missing a required argument: 'width'; give each a default"),
        (
            "fails",
            r'layers_of_test.py failed with KeyError: .a. \(.*_test.py, line \d+: return \{\}\["a"\]\)',
        ),
    ],
)
def test_an_error_of_the_users_function_is_one_message(
    source: str, capsys: pytest.CaptureFixture[str], function: str, message: str
) -> None:
    error = run(capsys, f"{source}:{function}", "--stages", "1", status=2).splitlines()[-1]
    assert error.startswith("ds-ddg: error: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def layers(:\n", "broken.py failed with SyntaxError: invalid syntax (broken.py, line 1)"),
        ("x = 1\nimport no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module' ("),
        ("x = 1\nimport no_such_module\n", "broken.py, line 2: import no_such_module)"),
    ],
)
def test_a_broken_file_is_named_before_deepspeed_is_loaded(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "broken.py").write_text(text)
    error, imported = imported_by(tmp_path, "broken.py:layers")
    assert message in error
    assert not {"torch", "deepspeed"} & imported


def test_nothing_is_measured_or_imported_for_missing_files(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(SOURCE)
    for arguments, message in (
        ("missing.py:layers", "No such file or directory: 'missing.py'"),
        ("model.py:wide --out no/profile.json", "--out 'no/profile.json': there is no folder 'no'; make it first"),
    ):
        error, imported = imported_by(tmp_path, arguments)
        assert message in error
        assert not {"torch", "deepspeed"} & imported


def imported_by(folder: Path, arguments: str) -> tuple[str, set[str]]:
    """The error that the command ends with, and every module that it has imported."""
    command = [sys.executable, "-X", "importtime", "-m", "ds_ddg", "partition", *arguments.split(), "--stages", "1"]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    return lines[-1], {line.split("|")[-1].strip() for line in lines}


def test_a_fresh_process_prints_nothing_but_the_answer(source: str) -> None:
    """DeepSpeed writes its own lines to stdout on import."""
    command = [sys.executable, "-m", "ds_ddg", "partition", f"{source}:with_loss", "--stages", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["parts"] == [0, 3]
    assert "a word from the user's file" in done.stderr


def test_a_saved_profile_is_split_without_torch(tmp_path: Path) -> None:
    save(costs(1, 2, 3), tmp_path / "profile.json")
    command = [sys.executable, "-X", "importtime", "-m", "ds_ddg", "partition", "profile.json", "--stages", "2"]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "efficiency (mean / slowest): 100.0%" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "ds_ddg.analysis.balance" in imported
    assert not {"torch", "deepspeed", "matplotlib", "numpy"} & imported
