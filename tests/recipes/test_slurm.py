"""``cluster/train.sbatch`` with stand-ins for Slurm's commands: the tasks, and how the job queues itself again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.ports import free_port
from helpers.paths import LAUNCHER_VARIABLES, ROOT

BATCH = ROOT / "cluster" / "train.sbatch"
CONFIG = ROOT / "configs" / "resnet20_digits.json"
PATIENCE = 240.0

SRUN = """\
#!/bin/bash
while [[ $1 == -* ]]; do shift; done
unset RANK LOCAL_RANK
tasks=()
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks+=($!)
done
status=0
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
"""

SCONTROL = """\
#!/bin/bash
if [[ $1 == show ]]; then
    printf '127.0.0.1\\nworker-2\\n'
else
    echo "$@" >> "$(dirname "$0")/scontrol.log"
fi
"""

TASK = """\
#!/bin/bash
echo "task RANK=$RANK LOCAL_RANK=$LOCAL_RANK WORLD_SIZE=$WORLD_SIZE MASTER_ADDR=$MASTER_ADDR" \
    "LOCAL_WORLD_SIZE=$LOCAL_WORLD_SIZE OMP_NUM_THREADS=$OMP_NUM_THREADS: $*"
sleep ${TASK_SECONDS:-0}
exit ${TASK_STATUS:-0}
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder with Slurm's commands, and one in the place of Python."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "task": TASK}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


@contextlib.contextmanager
def job(cluster: Path, *words: str, python: str, **more: str) -> Iterator[subprocess.Popen[str]]:
    inherited = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    environment = {
        **inherited,
        "PATH": f"{cluster}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": python,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "worker-[1-2]",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "CHECKPOINTS": str(cluster / "checkpoints"),
        **more,
    }
    process = subprocess.Popen(
        ["bash", str(BATCH), *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_each_task_knows_its_place(cluster: Path) -> None:
    with job(cluster, "train.py", "--epochs", "a b", python="task", SLURM_CPUS_PER_TASK="8") as process:
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert sorted(output.splitlines()) == [
        f"task RANK={rank} LOCAL_RANK={rank} WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 LOCAL_WORLD_SIZE=2 OMP_NUM_THREADS=1: "
        f"train.py --epochs a b --checkpoint-dir {cluster}/checkpoints --resume"
        for rank in range(2)
    ]


def test_a_failure_is_the_jobs(cluster: Path) -> None:
    with job(cluster, "train.py", python="task", TASK_STATUS="3") as process:
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3, output
    assert not (cluster / "scontrol.log").exists()


@pytest.mark.parametrize("status", ["0", "4"])
def test_the_job_queues_again_before_its_time_is_up(cluster: Path, status: str) -> None:
    with job(cluster, "train.py", python="task", TASK_SECONDS="2", TASK_STATUS=status) as process:
        assert process.stdout is not None
        first = process.stdout.readline()  # it is under way, the trap set
        time.sleep(0.2)  # and waiting
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=PATIENCE)
    assert (cluster / "scontrol.log").read_text() == "requeue 7\n"
    assert "goes on from" in output
    assert (first + output).count("task RANK=1") == 1, "the training goes on until Slurm ends it"
    assert process.returncode == int(status)


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE)
def test_a_recipe_trains_and_goes_on(cluster: Path) -> None:
    recipe = [str(ROOT / "recipes" / "resnet" / "train.py"), "--deepspeed_config", str(CONFIG), "--epochs", "1"]
    ended = []
    for _ in range(2):
        output_dir = cluster / "output"
        words = [*recipe, "--output-dir", str(output_dir)]
        with job(cluster, *words, python=sys.executable, MASTER_PORT=str(free_port())) as process:
            output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
        ended.append(output)
    metrics = json.loads((output_dir / "metrics.json").read_text())
    assert (metrics["stages"], metrics["epochs"]) == (2, 1)
    assert "going on from" not in ended[0]
    assert "going on from" in ended[1]
