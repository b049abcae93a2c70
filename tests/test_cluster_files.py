"""What docs/clusters.md offers besides the Slurm script: what the image is made of."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT

DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text()
COPIED = [path for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.M) for path in line.split()[:-1]]


def test_what_the_image_copies_is_sent_to_the_daemon() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    assert "*" in ignored
    assert sorted(line[1:] for line in ignored if line.startswith("!")) == sorted(COPIED)
    assert ".venv" not in COPIED


@pytest.mark.parametrize("path", COPIED)
def test_what_the_image_copies_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_what_the_image_copies_can_be_installed_and_run(tmp_path: Path) -> None:
    for path in COPIED:
        copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copy
        copy(ROOT / path, tmp_path / path)
    build = "import setuptools.build_meta as build; print(build.prepare_metadata_for_build_wheel('.'))"
    for command in (["-c", build], ["recipes/resnet/train.py", "--help"]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    assert "Provides-Extra: recipes" in metadata.read_text()
    assert (tmp_path / "configs" / "resnet20_digits.json").is_file(), "what the image starts by itself"


def test_the_image_runs_as_a_user_of_its_own() -> None:
    user = DOCKERFILE.index("USER trainer")
    assert DOCKERFILE.index("useradd") < user < DOCKERFILE.index("CMD")
    assert "RUN" not in DOCKERFILE[user:]
