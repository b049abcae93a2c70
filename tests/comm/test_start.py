"""The start of the process group: nothing is compiled for it, and hosts are compared before gloo connects them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

import ds_ddg
from ds_ddg.comm import start
from ds_ddg.comm.hosts import Host
from ds_ddg.comm.start import BACKEND, check_before_gloo
from helpers.paths import LAUNCHER_VARIABLES, ROOT

SCRIPT = """
import deepspeed

deepspeed.init_distributed()
from deepspeed.ops.op_builder.builder import OpBuilder
print("ranks:", deepspeed.comm.get_world_size(), "compiled:", sorted(OpBuilder._loaded_ops))
"""


def test_a_script_starts_without_a_compilation(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    alone = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-m", "ds_ddg.run", "script.py"],
        cwd=tmp_path,
        env={**alone, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "ranks: 1 compiled: []" in done.stdout, done.stdout + done.stderr


def test_a_swap_restores_what_it_replaces() -> None:
    usual = BACKEND.build_shm_op, dist.init_process_group
    with ds_ddg.swap():
        with ds_ddg.swap():
            assert BACKEND.build_shm_op() is None
        assert BACKEND.build_shm_op() is None
    assert (BACKEND.build_shm_op, dist.init_process_group) == usual


@pytest.mark.parametrize(("seconds", "rank", "said"), [(0.5, 0, True), (0.5, 1, False), (0.0, 0, False)])
def test_a_long_compilation_is_announced(
    monkeypatch: pytest.MonkeyPatch, seconds: float, rank: int, said: bool
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(start, "_SILENCE", 0.1)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(start.logger, "warning", lines.append)
    monkeypatch.setattr(start.OpBuilder, "jit_load", lambda builder, verbose=True: time.sleep(seconds) or builder.name)
    with ds_ddg.swap(), ds_ddg.swap():  # as under ds_ddg.run
        assert start.OpBuilder.jit_load(SimpleNamespace(name="fused_adam"), verbose=False) == "fused_adam"
    time.sleep(0.2)
    assert lines == ["DeepSpeed is compiling fused_adam for this machine, which takes about a minute, once"] * said


def hosts_heard(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Let the default group have this back end, and two ranks that gloo could not connect."""

    def all_gather_object(found: list[Any], own: Host) -> None:
        found[:] = [own, Host("other", "elsewhere", "its name resolves to 127.0.1.1", ("eth0",))]

    monkeypatch.setattr(start.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(start.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(start.dist, "all_gather_object", all_gather_object)


def test_hosts_are_compared_if_another_back_end_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts_heard(monkeypatch, "nccl")
    with pytest.raises(RuntimeError, match=r"other \(rank 1\): its name resolves to 127.0.1.1"):
        check_before_gloo()


def test_hosts_that_gloo_has_connected_are_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts_heard(monkeypatch, "gloo")
    check_before_gloo()


def test_other_ways_to_start_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **more: seen.append((*args, more)))
    store = dist.HashStore()
    with ds_ddg.swap():
        dist.init_process_group("nccl", timeout=timedelta(seconds=5), device_id="cuda:0")
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    assert seen == [
        ("nccl", None, timedelta(seconds=5), -1, -1, None, {"device_id": "cuda:0"}),
        ("gloo", None, None, 1, 0, store, {}),
    ]
