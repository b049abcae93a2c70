"""One pipeline over two nodes: the numbers of one node, and a clear end where the nodes cannot reach each other."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from benchmarks.ports import free_port
from helpers.paths import LAUNCHER_VARIABLES, ROOT, SCRIPTS
from helpers.two_nodes import ADDRESSES, INTERFACE, run_on, two_nodes

PATIENCE = 200.0
SCRIPT = [str(SCRIPTS / "repeating_loader.py"), "--steps", "3", "--deepspeed_config", str(SCRIPTS / "ds.json")]


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[str, str]]:
    with two_nodes() as names:
        yield names


def launcher(*words: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *words, "-m", "ds_ddg.run", *SCRIPT]


def environment(**more: str) -> dict[str, str]:
    # Without what a launcher of these tests, or a setting of this shell, might say.
    inherited = {k: v for k, v in os.environ.items() if k not in (*LAUNCHER_VARIABLES, "GLOO_SOCKET_IFNAME")}
    own = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**inherited, **own, **more}


def torchrun(node: int) -> list[str]:
    shared = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", ADDRESSES[0], "--master-port", "29500"]
    return launcher(*shared, "--node-rank", str(node))


def srun(node: int) -> list[str]:
    """Start a process without a launcher, so that rank 0 itself holds what the ranks find each other by."""
    variables = [f"MASTER_ADDR={ADDRESSES[0]}", "MASTER_PORT=29500", "WORLD_SIZE=2", f"RANK={node}", "LOCAL_RANK=0"]
    return ["env", *variables, sys.executable, "-m", "ds_ddg.run", *SCRIPT]


def on_both(nodes: Sequence[str], start: Callable[[int], list[str]], **more: str) -> list[tuple[int, str]]:
    return run_on(nodes, [start(node) for node in range(2)], environment(**more), PATIENCE)


def reports(outputs: Sequence[str]) -> dict[int, Any]:
    lines = (line for output in outputs for line in output.splitlines() if line.startswith('{"rank"'))
    return {report["rank"]: report for report in map(json.loads, lines)}


@pytest.mark.timeout(2 * PATIENCE)
def test_two_nodes_train_as_one(nodes: tuple[str, str]) -> None:
    ended = on_both(nodes, torchrun, GLOO_SOCKET_IFNAME=INTERFACE)
    assert [status for status, _ in ended] == [0, 0], ended
    apart = reports([output for _, output in ended])

    one_node = launcher("--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    [(status, output)] = run_on(nodes[:1], [one_node], environment(), PATIENCE)
    assert status == 0, "on one node a loopback address is right\n" + output
    together = reports([output])

    assert sorted(apart) == sorted(together) == [0, 1]
    for rank in (0, 1):
        assert apart[rank]["engine"] == "DDGEngine"
        assert apart[rank]["losses"] == together[rank]["losses"]


@pytest.mark.timeout(2 * PATIENCE)
@pytest.mark.parametrize("start", [torchrun, srun])
def test_a_loopback_address_between_nodes_is_named(nodes: tuple[str, str], start: Callable[[int], list[str]]) -> None:
    for status, output in on_both(nodes, start):
        assert status != 0
        assert "gloo would use a loopback address" in output
        assert f"interfaces there: {INTERFACE}" in output
        assert f"export GLOO_SOCKET_IFNAME={INTERFACE}" in output
        assert "Connection refused" not in output
