from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers.distributed import GetRanks, RanksFailedError, spawn


def sum_over_ranks(rank: int, world_size: int, offset: float) -> torch.Tensor:
    total = torch.full((3,), rank + offset)
    dist.all_reduce(total)
    return total


def name_and_seed(rank: int, world_size: int) -> tuple[int, int, str, str, float]:
    return rank, world_size, os.environ["RANK"], os.environ["DS_ACCELERATOR"], torch.rand(()).item()


def deepspeed_sees_the_group(rank: int, world_size: int) -> tuple[int, int, float]:
    import deepspeed.comm

    total = torch.tensor(float(rank))
    deepspeed.comm.all_reduce(total)
    return deepspeed.comm.get_rank(), deepspeed.comm.get_world_size(), total.item()


def raise_on(rank: int, world_size: int, bad: int) -> None:
    print(f"rank {rank} speaks")
    if rank == bad:
        raise ValueError(f"stage {rank} is unhappy")
    dist.barrier()


def raise_everywhere(rank: int, world_size: int) -> None:
    time.sleep(0.3 * rank)
    raise ValueError(f"unknown key on rank {rank}")


def die_on(rank: int, world_size: int, bad: int, how: int) -> int:
    if rank == bad:
        if how < 0:
            os.kill(os.getpid(), -how)
        os._exit(how)
    return rank


def wait_in_vain(rank: int, world_size: int) -> int:
    if rank == 0:
        dist.recv(torch.empty(1), src=1)
    return rank


def sleep_unless(rank: int, world_size: int, bad: int) -> None:
    if rank == bad:
        raise ValueError("gone")
    time.sleep(60)


def return_a_lambda(rank: int, world_size: int) -> Any:
    return lambda: None


def leave_traces(rank: int, world_size: int) -> int:
    os.environ["DDG_TRACE"] = "1"
    dist.new_group([0])
    return os.getpid()


def find_traces(rank: int, world_size: int) -> tuple[int, bool, int]:
    return os.getpid(), "DDG_TRACE" in os.environ, len(dist.distributed_c10d._world.pg_map)


def test_results_come_back_by_rank(ranks: GetRanks) -> None:
    seeds = set()
    for rank, (got, world_size, variable, accelerator, seed) in enumerate(ranks(3).run(name_and_seed)):
        assert (got, world_size, variable, accelerator) == (rank, 3, str(rank), "cpu")
        seeds.add(seed)
    assert len(seeds) == 1


def test_spawn_joins_the_ranks() -> None:
    for total in spawn(sum_over_ranks, 2, 0.5):
        assert torch.equal(total, torch.full((3,), 2.0))


def test_deepspeed_uses_the_same_group(ranks: GetRanks) -> None:
    assert ranks(2).run(deepspeed_sees_the_group) == [(0, 2, 1.0), (1, 2, 1.0)]


def test_processes_are_reused_without_traces(ranks: GetRanks) -> None:
    before = ranks(2).run(leave_traces)
    assert before == ranks(2).pids
    assert ranks(2).run(find_traces) == [(pid, False, 1) for pid in before]
    assert torch.equal(ranks(2).run(sum_over_ranks, 1.0)[1], torch.full((3,), 3.0))


def test_an_exception_is_reported_and_ends_the_peers() -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailedError, match="rank 1 raised ValueError: stage 1 is unhappy") as info:
        spawn(raise_on, 3, 1)
    assert time.monotonic() - start < 8
    assert info.value.first == 1
    report = str(info.value)
    assert "in raise_on" in report
    assert "rank 0 speaks" in report
    assert [outcome.state for outcome in info.value.outcomes] == ["raised"] * 3


def test_expected_failure_returns_every_ranks_error(ranks: GetRanks) -> None:
    outcomes = ranks(3).run(raise_everywhere, expect_failure=True)
    for rank, outcome in enumerate(outcomes):
        assert (outcome.rank, outcome.state, outcome.exit_code) == (rank, "raised", 1)
        assert (outcome.exc_type, outcome.message) == ("ValueError", f"unknown key on rank {rank}")


def test_expected_failure_that_does_not_happen(ranks: GetRanks) -> None:
    with pytest.raises(AssertionError, match="expected to fail on 2 ranks, but every rank returned"):
        ranks(2).run(sum_over_ranks, 0.0, expect_failure=True)


@pytest.mark.parametrize("how", [3, -signal.SIGKILL])
def test_a_dead_rank_is_told_by_its_exit_code(how: int) -> None:
    outcomes = spawn(die_on, 2, 1, how, expect_failure=True)
    assert [(outcome.state, outcome.exit_code) for outcome in outcomes] == [("returned", 0), ("died", how)]


def test_timeout_kills_and_shows_where_a_rank_hangs(ranks: GetRanks) -> None:
    start = time.monotonic()
    outcomes = ranks(2).run(wait_in_vain, timeout=2, expect_failure=True)
    assert time.monotonic() - start < 8
    assert [outcome.state for outcome in outcomes] == ["hung", "returned"]
    assert outcomes[0].exit_code == -signal.SIGKILL
    assert "in wait_in_vain" in outcomes[0].log


def test_ranks_that_ignore_a_failure_are_killed_after_grace(ranks: GetRanks) -> None:
    pool = ranks(2)
    pool.run(sum_over_ranks, 0.0)
    before = pool.pids
    with pytest.raises(RanksFailedError) as info:
        pool.run(sleep_unless, 1, grace=0.5)
    assert [outcome.state for outcome in info.value.outcomes] == ["hung", "raised"]
    assert pool.pids == []
    pool.run(sum_over_ranks, 0.0)
    assert not set(before) & set(pool.pids)
    for pid in before:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_result_that_cannot_travel_is_a_failure(ranks: GetRanks) -> None:
    outcomes = ranks(2).run(return_a_lambda, expect_failure=True)
    assert all("pickle" in outcome.message for outcome in outcomes)
