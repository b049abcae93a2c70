"""A stage is gone without a word: the others learn it from the broken connection."""

from __future__ import annotations

import re
import time
from datetime import timedelta

import pytest
import torch

from helpers.distributed import GetRanks
from helpers.failing import (
    BAD_CALL,
    SOON,
    TIMEOUT,
    End,
    assert_lost,
    batches,
    catch,
    die_later,
    misbehaving,
)


def lose_a_stage(rank: int, world_size: int, stage: int, deed: str, other: str) -> None:
    engine = misbehaving(world_size, stage, deed, other)
    data = batches()
    for _ in range(8):
        engine.train_batch(data)


@pytest.mark.parametrize(
    ("deed", "other"), [("die later", ""), ("die", "nap")], ids=["while neighbours wait", "while neighbours compute"]
)
@pytest.mark.parametrize(("num_stages", "stage"), [(3, 1), (4, 3)], ids=["middle", "last of four"])
def test_killed_rank_ends_the_others(ranks: GetRanks, num_stages: int, stage: int, deed: str, other: str) -> None:
    outcomes = ranks(num_stages).run(
        lose_a_stage, stage, deed, other, timeout=TIMEOUT, grace=SOON, expect_failure=True
    )
    assert_lost(outcomes, stage)


def lose_a_stage_in_evaluation(rank: int, world_size: int, stage: int) -> None:
    engine = misbehaving(world_size, stage, "die")
    for _ in range(BAD_CALL):
        engine.train_batch(batches())
    engine.eval_batch(batches())


def test_killed_rank_in_evaluation(ranks: GetRanks) -> None:
    outcomes = ranks(3).run(lose_a_stage_in_evaluation, 1, timeout=TIMEOUT, grace=SOON, expect_failure=True)
    assert_lost(outcomes, 1)


def evaluate_and_lose(rank: int, world_size: int, num_stages: int, schedule: str, culprit: int, where: str) -> None:
    deed = "die later" if rank == culprit and where == "forward" else ""
    stage, ddg = culprit // (world_size // num_stages), {"enabled": schedule != "not enabled"}
    engine = misbehaving(num_stages, stage, deed, ddg=ddg)
    if schedule == "1f1b":
        engine.schedule = schedule
    for _ in range(BAD_CALL):
        engine.train_batch(batches())
    with pytest.MonkeyPatch.context() as patch:
        if rank == culprit and where == "barrier":
            patch.setattr("deepspeed.comm.barrier", die_later)
        engine.eval_batch(batches())


LOST_IN_EVALUATION = [
    ("ddg", "barrier", 2, 2, 0),
    ("ddg", "barrier", 3, 3, 1),
    ("ddg", "barrier", 4, 2, 3),
    ("1f1b", "barrier", 3, 3, 1),
    ("1f1b", "forward", 2, 2, 0),
    ("1f1b", "forward", 3, 3, 1),
    ("not enabled", "barrier", 4, 2, 3),
    ("not enabled", "forward", 3, 3, 1),
]


@pytest.mark.parametrize(("schedule", "where", "num_ranks", "num_stages", "culprit"), LOST_IN_EVALUATION)
def test_a_rank_lost_in_evaluation_is_named(
    ranks: GetRanks, schedule: str, where: str, num_ranks: int, num_stages: int, culprit: int
) -> None:
    """In DeepSpeed's barrier and messages, too, of which any rank may be the one that is waited for."""
    outcomes = ranks(num_ranks).run(
        evaluate_and_lose, num_stages, schedule, culprit, where, timeout=TIMEOUT, grace=SOON, expect_failure=True
    )
    stage = culprit // (num_ranks // num_stages)
    named = re.compile(rf"stage {stage} \(rank {culprit}\)( and .*)? (is|are) lost: ")
    report = "\n".join(map(str, outcomes))
    for outcome in outcomes:
        assert "one of ranks" not in outcome.message, report
        if outcome.rank != culprit:
            assert (outcome.state, outcome.exc_type) == ("raised", "StageError"), report
            assert named.search(outcome.message), report


def evaluate_while_one_is_stuck(rank: int, world_size: int, schedule: str, culprit: int) -> End:
    import deepspeed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ds_ddg.comm.channels.default_pg_timeout", timedelta(seconds=3))
        engine = misbehaving(world_size, 0, "", ddg={"enabled": schedule != "not enabled"})
        if schedule == "1f1b":
            engine.schedule = schedule
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=3))
        if rank == culprit:
            patch.setattr(deepspeed.comm, "barrier", lambda: time.sleep(8.0))
        return catch(lambda: engine.eval_batch(batches()))


@pytest.mark.parametrize("schedule", ["ddg", "1f1b", "not enabled"])
@pytest.mark.parametrize(("num_ranks", "culprit"), [(2, 1), (3, 1)])
def test_a_rank_stuck_in_evaluation_is_not_mistaken(
    ranks: GetRanks, schedule: str, num_ranks: int, culprit: int
) -> None:
    """Nobody is lost, and who waits in vain cannot know for whom."""
    ends = ranks(num_ranks).run(evaluate_while_one_is_stuck, schedule, culprit, timeout=TIMEOUT)
    for rank, end in enumerate(ends):
        if rank != culprit:
            assert end.kind == "StageError", ends
            assert re.match("another rank (did not answer|is lost, or gave up waiting); it is not known", end.text), (
                ends
            )
            assert "one of ranks" not in end.text, ends


def fail_on_deepspeeds_schedule(rank: int, world_size: int) -> None:
    engine = misbehaving(world_size, 0, "explode")
    engine.schedule = "1f1b"
    for _ in range(8):
        engine.train_batch(batches())


def test_failure_on_deepspeeds_own_schedule_is_told_by_name(ranks: GetRanks) -> None:
    """There the others learn it when the process ends, and then read why it did."""
    outcomes = ranks(3).run(fail_on_deepspeeds_schedule, timeout=TIMEOUT, grace=SOON, expect_failure=True)
    assert outcomes[0].exc_type == "ArithmeticError", outcomes[0]
    for outcome in outcomes[1:]:
        assert outcome.exc_type == "StageError", outcome
        assert f"stage 0 (rank 0) failed in call {BAD_CALL}: ArithmeticError" in outcome.message
