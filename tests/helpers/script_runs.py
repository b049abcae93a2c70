"""Training scripts under the launcher, and how they end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ds_ddg
from benchmarks.ports import free_port

NOISE = re.compile(r"terminate called|Traceback|Error\b|exception|core dumped|Aborted|Segmentation|\bleaked\b", re.I)


def launch(script: Path, how: str, ddg: str = "slack") -> tuple[int, str, float]:
    """Run the script on two ranks as a user starts it; return exit status, output and seconds."""
    return launched([str(script), how, ddg], script.parent)


def launched(command: list[str], folder: Path) -> tuple[int, str, float]:
    """Run a script with its arguments on two ranks, started in `folder`; return exit status, output and seconds."""
    binaries = Path(sys.executable).parent
    root = Path(ds_ddg.__file__).parents[1]
    launcher = [str(binaries / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    environment = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(root),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    start = time.monotonic()
    process = subprocess.Popen(
        [*launcher, *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher and, as it never leaves its session, every rank
        output, _ = process.communicate()
        pytest.fail(f"the launcher did not end:\n{output}")
    return process.returncode, output, time.monotonic() - start
