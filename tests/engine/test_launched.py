"""Failures and clean ends as a user sees them: the `deepspeed` launcher and a script."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers.script_runs import NOISE, launch

SCRIPT = """\
import os
import signal
import sys
import time

import deepspeed
import torch
from deepspeed.pipe import PipelineModule

import ds_ddg

# DeepSpeed would compile a C++ kernel for `inference_all_reduce`, which training never calls: 45 s on first use.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
how, ddg = sys.argv[-2], sys.argv[-1]
deepspeed.init_distributed(dist_backend="gloo")
rank = torch.distributed.get_rank()

class Slow(torch.nn.Linear):
    def forward(self, x):
        time.sleep(0.6)
        return super().forward(x)


last = Slow if "slow" in how else torch.nn.Linear  # the first stage is done long before the last
layers = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), last(4, 4)]
net = PipelineModule(layers, num_stages=2, loss_fn=torch.nn.functional.mse_loss)
config = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "ddg": {"trace": __file__} if ddg == "trace" else {ddg: 1},
}
engine, *_ = ds_ddg.initialize(model=net, config=config, model_parameters=net.parameters())
data = iter([(torch.ones(2, 4), torch.zeros(2, 4))] * 100)
for step in range(10):
    if how == "killed" and step == 5 and rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    engine.train_batch(data)
print(f"rank {rank} trained {engine.global_steps} calls")
if "destroy engine" in how:
    engine.destroy()
if "destroy group" in how:
    torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("launched") / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize(
    "how", ["just end", "destroy group", "destroy engine", "slow", "slow, destroy group", "slow, destroy engine"]
)
def test_script_ends_cleanly_with_micro_batches_in_flight(script: Path, how: str) -> None:
    status, output, _ = launch(script, how)
    assert status == 0, output
    for rank in range(2):
        assert f"rank {rank} trained 10 calls" in output
    assert not NOISE.search(output), output


def test_script_that_loses_a_rank(script: Path) -> None:
    status, output, _ = launch(script, "killed")
    assert status != 0, output
    assert "stage 0 (rank 0) is lost" in output
    assert "trained" not in output


def test_script_with_a_bad_key(script: Path) -> None:
    status, output, _ = launch(script, "just end", ddg="slak")
    assert status != 0, output
    for rank in range(2):
        assert f"[rank{rank}]: ValueError: \"ddg\": unknown key 'slak'" in output, output
    assert "trained" not in output


def test_script_whose_engine_cannot_be_finished(script: Path) -> None:
    """Its channels are open already: torch once ended such a process with an assertion of its own, and a dump."""
    status, output, _ = launch(script, "just end", ddg="trace")
    assert status == 1, output
    for rank in range(2):
        assert re.search(rf'\[rank{rank}\]: ValueError: "ddg": {{"trace": .*}} cannot be written', output), output
    assert "terminate called" not in output
