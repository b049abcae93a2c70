"""Interleaved 1F1B: torch's order, the bubble of the paper, and what it keeps, counted."""

from __future__ import annotations

from itertools import product

import pytest
from torch.distributed.pipelining import ScheduleInterleaved1F1B

from ds_ddg.analysis.timeline_plot import clock
from ds_ddg.schedules.interleaved import InterleavedPlan
from ds_ddg.schedules.plan import BACKWARD, FORWARD, UPDATE, Op
from ds_ddg.schedules.simulator import Cost, replay
from ds_ddg.schedules.synchronous import OneFOneBPlan
from helpers.torch_pipelining import torch_order

SIZES = list(product((*range(1, 13), 16, 20), (2, 3, 4)))
"""Micro-batches and chunks."""


@pytest.mark.parametrize("k", range(1, 9))
def test_order_is_torchs_and_so_is_what_is_refused(k: int) -> None:
    for m, v in SIZES:
        if InterleavedPlan.refusal(k, m):
            with pytest.raises(ValueError, match="multiple of the number of rounds"):
                torch_order(ScheduleInterleaved1F1B, k, m, v)
            continue
        theirs = torch_order(ScheduleInterleaved1F1B, k, m, v)
        plan = InterleavedPlan(k, m, v)
        for stage in range(k):
            assert plan.call(stage, 0) == [*theirs[stage], Op(UPDATE, stage, m - 1)], (k, m, v, stage)
            later = [op._replace(micro_batch=op.micro_batch + 2 * m) for op in plan.call(stage, 0)]
            assert plan.call(stage, 2) == later


@pytest.mark.parametrize("k", range(1, 9))
def test_replay_ends_and_keeps_what_the_plan_says(k: int) -> None:
    for m, v in SIZES:
        if InterleavedPlan.refusal(k, m):
            continue
        plan = InterleavedPlan(k, m, v)
        timeline = replay(plan, 3)
        for stage in range(k):
            assert timeline.peak_activations(stage) == plan.activations(stage), plan
            assert (timeline.peak_versions(stage), timeline.staleness(stage)) == (1, 0), plan
            assert (plan.versions(stage), plan.staleness(stage)) == (1, 0)
            ops = list(plan.stream(stage, 3))
            for kind, chunk in product((FORWARD, BACKWARD), range(v)):
                assert [op.micro_batch for op in ops if (op.kind, op.chunk) == (kind, chunk)] == list(range(3 * m))


@pytest.mark.parametrize("k", range(1, 9))
def test_bubble_is_that_of_the_paper(k: int) -> None:
    """1F1B's bubble is (K-1)/M of the work; this one's is (K-1)/(vM) of it, so (K-1)/(vM + K-1) of the whole time."""
    for rounds, v in product((1, 2, 4), (2, 3, 4)):
        m = rounds * k
        timeline = replay(InterleavedPlan(k, m, v), 4)
        assert timeline.bubble == pytest.approx((k - 1) / (v * m + k - 1))
        assert timeline.period() == pytest.approx(3 * m + 3 * (k - 1) / v)


def test_picture_of_the_paper() -> None:
    """Figure 4 of Narayanan et al., for two stages; a column for a forward of one chunk."""
    assert clock(replay(InterleavedPlan(2, 4), 1)).splitlines() == [
        "stage 0 | F0  F1  F0' F1' F2  .   B0'---- F3  B1'---- F2' B0----- F3' B1----- .   B2'---- "
        ".   B3'---- B2----- B3-----",
        "stage 1 | .   F0  F1  F0' B0'---- F1' B1'---- F2  B0----- F3  B1----- F2' B2'---- F3' B3'---- "
        "B2----- B3----- .   .",
    ]


def test_parts_go_round_the_stages() -> None:
    plan = InterleavedPlan(3, 3, chunks=3)
    texts = ("0F4", "2F4", "0F4'", "0F4'2", "2F4'2", "2B4'2", "0B4'2", "2B4'", "0B4", "1U4")
    assert {text: [str(need) for need in plan.needs(Op.parse(text))] for text in texts} == {
        "0F4": [],
        "2F4": ["1F4"],
        "0F4'": ["2F4"],
        "0F4'2": ["2F4'"],
        "2F4'2": ["1F4'2"],
        "2B4'2": ["2F4'2"],
        "0B4'2": ["0F4'2", "1B4'2"],
        "2B4'": ["2F4'", "0B4'2"],
        "0B4": ["0F4", "1B4"],
        "1U4": ["1B4", "1B4'", "1B4'2"],
    }


def test_latency_and_overhead_count_for_every_chunk() -> None:
    """Half of the bubble for twice as many messages and passes: with slow links, or short stages, 1F1B is faster."""
    for cost in (Cost(link=3), Cost(overhead=1)):
        assert replay(InterleavedPlan(4, 8), 4, cost).period() > replay(OneFOneBPlan(4, 8), 4, cost).period()


def test_one_chunk_is_1f1b_and_rounds_must_be_even() -> None:
    with pytest.raises(ValueError, match="at least 2 chunks a stage, got 1; with 1 it is 1f1b"):
        InterleavedPlan(4, 8, 1)
    with pytest.raises(ValueError, match="and 11 for 4 stages do not divide into 2; take a multiple of 4 for M"):
        InterleavedPlan(4, 11)
