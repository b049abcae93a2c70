"""What the recipes print: no warning where all is well, and in a file a line now and then."""

from __future__ import annotations

import fcntl
import io
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from benchmarks.ports import free_port
from helpers.paths import ROOT
from recipes import console
from recipes.console import progress_bar

ALARM = re.compile(r"warning|\[INFO\]|\bINFO\b|Traceback", re.I)
LINES = 40
"""At most; the recipes' own are about 20, most of them DeepSpeed's list of layers."""


def run(recipe: str, output: Path, *words: str) -> tuple[str, str]:
    """Run a recipe as docs/recipes.md says, without a terminal; its stdout and stderr."""
    command = ["-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", "2", "--master_port", str(free_port())]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, f"recipes/{recipe}.py", *words, "--output-dir", str(output)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["ddg", "1f1b"])
def test_a_training_says_only_what_it_has_to(tmp_path: Path, schedule: str) -> None:
    config = ROOT / "configs" / "resnet20_digits.json"
    words = ("--deepspeed_config", str(config), "--epochs", "1", "--schedule", schedule)
    check(*run("resnet/train", tmp_path, *words))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bert_trainings_say_only_what_they_have_to(tmp_path: Path) -> None:
    documents = (f"cat number {number} sat on the mat and looked at dog {number}\n\n" for number in range(1000))
    (tmp_path / "text").write_text("".join(documents))
    size = f"--layers 2 --hidden 16 --vocabulary 100 --length 8 --text {tmp_path}/text".split()
    config = ROOT / "configs" / "bert_pretrain.json"
    check(*run("bert/pretrain", tmp_path, *size, "--deepspeed_config", str(config), "--epochs", "1"))
    config = ROOT / "configs" / "bert_finetune.json"
    model = ("--model", str(tmp_path / "model"), "--length", "8")
    check(*run("bert/finetune", tmp_path / "fine", *model, "--deepspeed_config", str(config), "--epochs", "1"))


@pytest.mark.slow
def test_a_gpt_training_says_only_what_it_has_to(tmp_path: Path) -> None:
    documents = (f"cat number {number} sat on the mat and looked at dog {number}\n\n" for number in range(1000))
    (tmp_path / "text").write_text("".join(documents))
    size = f"--layers 2 --hidden 16 --vocabulary 300 --length 8 --text {tmp_path}/text".split()
    config = ROOT / "configs" / "gpt_pretrain.json"
    check(*run("gpt/pretrain", tmp_path, *size, "--deepspeed_config", str(config), "--epochs", "1"))


def check(stdout: str, stderr: str) -> None:
    for text in (stdout, stderr):
        assert [line for line in text.splitlines() if ALARM.search(line)] == []
        assert "\r" not in text
        assert len(text.splitlines()) < LINES
    assert "loss" in stderr.splitlines()[-1], "how the training went"


@pytest.mark.parametrize(("rows", "columns", "moves"), [(30, 100, True), (0, 0, False)])
def test_a_bar_moves_on_a_terminal_of_known_size(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, moves: bool
) -> None:
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with os.fdopen(writer, "w") as stream, os.fdopen(reader, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(1000, shown=True) as bar:
            bar.update(1000)
        stream.flush()
        seen = screen.read(4096).decode()
    assert ("\r  0%|" in seen) == moves
    assert ("0.00 of 1.00k samples" in seen) != moves


def test_a_bar_is_lines_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(1000, shown=True) as bar:
        for _ in range(10):
            bar.update(100)
    first, last = stream.getvalue().splitlines()
    assert "0.00 of 1.00k samples" in first
    assert "1.00k of 1.00k samples" in last


def test_lines_come_while_the_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    with progress_bar(3, shown=True) as bar:
        bar.update(1)
        bar.update(1)
    assert [line.split()[0] for line in stream.getvalue().splitlines()][:3] == ["0.00", "1.00", "2.00"]


def test_another_rank_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(3, shown=False) as bar:
        bar.update(3)
    assert stream.getvalue() == ""
