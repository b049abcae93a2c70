"""Runs a recipe as a user would, with the ``deepspeed`` launcher, and reads what it has written."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ports import free_port

__all__ = ["ROOT", "metrics"]

ROOT = Path(__file__).resolve().parents[1]
LAST_LINES = 30


def metrics(command: Sequence[str], stages: int, output: Path) -> dict[str, Any]:
    """Return the metrics of an earlier run of the same command into `output`, or of a new one.

    Args:
        command: the recipe's script, from the project's folder, and its arguments but for ``--output-dir``.
        stages: number of processes.
        output: folder for what the recipe writes and for its log.

    Raises:
        SystemExit: the run failed; with the log's end.
    """
    told = shlex.join(["deepspeed", "--quiet", "--num_gpus", str(stages), *command]) + "\n"
    found, made_by, log = output / "metrics.json", output / "command.txt", output / "log.txt"
    if not (found.is_file() and made_by.is_file() and made_by.read_text() == told):
        output.mkdir(parents=True, exist_ok=True)
        found.unlink(missing_ok=True)
        made_by.write_text(told)
        status = _launch([*command, "--output-dir", str(output)], stages, log)
        if status or not found.is_file():
            last = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
            raise SystemExit(f"{told.strip()}: exit status {status}; the end of {log}:\n{last}")
    result: dict[str, Any] = json.loads(found.read_text())
    return result


def _launch(command: Sequence[str], stages: int, log: Path) -> int:
    launcher = ["-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", str(stages), "--master_port"]
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **os.environ}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with log.open("w") as stream:
        return subprocess.run(
            [sys.executable, *launcher, str(free_port()), *command],
            cwd=ROOT,
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
