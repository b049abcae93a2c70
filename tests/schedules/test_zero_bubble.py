"""Zero bubble schedules: torch's orders, the bubbles of the paper, and what they keep, counted."""

from __future__ import annotations

from itertools import product

import pytest
from torch.distributed.pipelining import ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble

from ds_ddg.analysis.timeline_plot import clock, text
from ds_ddg.schedules.plan import BACKWARD, FORWARD, UPDATE, WEIGHT, Op, Plan
from ds_ddg.schedules.simulator import Cost, num_operations, replay
from ds_ddg.schedules.synchronous import OneFOneBPlan
from ds_ddg.schedules.timeline import Event, Timeline
from ds_ddg.schedules.zero_bubble import ZeroBubbleH1Plan, ZeroBubbleVPlan
from helpers.torch_pipelining import torch_order

NUMBERS = (*range(1, 18), 20, 32)
SIZES = list(product(range(1, 9), NUMBERS))
H1 = [size for size in SIZES if not ZeroBubbleH1Plan.refusal(*size)]
PLANS: list[Plan] = [*(ZeroBubbleH1Plan(*size) for size in H1), *(ZeroBubbleVPlan(*size) for size in SIZES)]


def lines(picture: str) -> list[str]:
    return [line.strip() for line in picture.strip().splitlines()]


@pytest.mark.parametrize("k", range(1, 9))
def test_orders_are_torchs_and_so_is_what_is_refused(k: int) -> None:
    for m in NUMBERS:
        same_as_torch(ZeroBubbleVPlan(k, m), torch_order(ScheduleZBVZeroBubble, k, m, chunks=2, v=True))
        if ZeroBubbleH1Plan.refusal(k, m):
            with pytest.raises(ValueError, match="multiple of the number of rounds"):
                torch_order(ScheduleInterleavedZeroBubble, k, m, chunks=1)
        else:
            same_as_torch(ZeroBubbleH1Plan(k, m), torch_order(ScheduleInterleavedZeroBubble, k, m, chunks=1))


def same_as_torch(plan: Plan, theirs: list[list[Op]]) -> None:
    m = plan.micro_batches
    for stage in range(plan.num_stages):
        assert plan.call(stage, 0) == [*theirs[stage], Op(UPDATE, stage, m - 1)], (plan, stage)
        later = [op._replace(micro_batch=op.micro_batch + 2 * m) for op in plan.call(stage, 0)]
        assert plan.call(stage, 2) == later


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_replay_ends_and_keeps_what_the_plan_says(num_stages: int) -> None:
    for plan in PLANS:
        if plan.num_stages != num_stages:
            continue
        timeline = replay(plan, 3)
        for stage in range(num_stages):
            where = f"{plan} stage {stage}"
            assert timeline.peak_activations(stage) == plan.activations(stage), where
            assert half_done(timeline, stage) == plan.half_done(stage), where
            assert (timeline.peak_versions(stage), timeline.staleness(stage)) == (1, 0), where
            assert (plan.versions(stage), plan.staleness(stage)) == (1, 0), where


def half_done(timeline: Timeline, stage: int) -> int:
    """The most backwards whose W is still to come, counted."""
    count = most = 0
    for op, _, _ in timeline.rows[stage]:
        count += (op.kind == BACKWARD) - (op.kind == WEIGHT)
        most = max(most, count)
    assert count == 0
    return most


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_every_stage_learns_from_every_micro_batch_once(num_stages: int) -> None:
    for plan in PLANS:
        for stage in range(num_stages if plan.num_stages == num_stages else 0):
            m, ops = plan.micro_batches, list(plan.stream(stage, 2))
            assert len(ops) * num_stages == num_operations(plan, 2)
            for kind, chunk in product((FORWARD, BACKWARD, WEIGHT), range(plan.num_chunks)):
                assert [op.micro_batch for op in ops if (op.kind, op.chunk) == (kind, chunk)] == list(range(2 * m))
            place = {op: i for i, op in enumerate(ops)}
            assert all(place[need] < place[op] for op in ops for need in plan.needs(op) if need.stage == stage)
            # An update has all gradients of its call, not only the newest, and none of the next.
            assert [op for op in ops if op.kind == UPDATE] == [ops[len(ops) // 2 - 1], ops[-1]]
            assert {op.micro_batch for op in ops[: len(ops) // 2]} == set(range(m))


@pytest.mark.parametrize("num_stages", range(2, 9))
@pytest.mark.parametrize("times", [1, 2, 4])
def test_h1_has_a_third_of_the_bubble_of_1f1b(num_stages: int, times: int) -> None:
    """(K-1)(F + B - W) of the paper's table 2, where 1F1B's is (K-1)(F + B + W)."""
    m = times * num_stages
    for cost, bubble in ((Cost(1, 2), 1), (Cost(1, 2, weight_share=0.25), 2), (Cost(1, 3, weight_share=1 / 3), 2)):
        work = cost.forward + cost.backward
        assert replay(OneFOneBPlan(num_stages, m), 4, cost).period() == pytest.approx(work * (m + num_stages - 1))
        timeline = replay(ZeroBubbleH1Plan(num_stages, m), 4, cost)
        assert timeline.period() == pytest.approx(work * m + (num_stages - 1) * bubble)


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_v_has_no_bubble_if_all_three_parts_take_as_long(num_stages: int) -> None:
    for m in (2 * num_stages - 1, 2 * num_stages, 5 * num_stages + 1):
        timeline = replay(ZeroBubbleVPlan(num_stages, m), 4)
        assert timeline.bubble == pytest.approx(0)
        assert timeline.period() == pytest.approx(3 * m)
        # If all updates wait for the last stage, a sixth of 1F1B's bubble is left.
        assert replay(ZeroBubbleVPlan(num_stages, m), 1).makespan == pytest.approx(3 * m + (num_stages - 1) / 2)
    if num_stages > 1:
        assert replay(ZeroBubbleVPlan(num_stages, 2 * num_stages - 2), 4).bubble > 0.01
        uneven = Cost(scale=(2, *[1] * (num_stages - 1)))
        assert replay(ZeroBubbleVPlan(num_stages, 4 * num_stages), 4, uneven).bubble > 0.2
        assert replay(ZeroBubbleVPlan(num_stages, 4 * num_stages), 4, Cost(weight_share=0.25)).bubble > 0.01


def test_v_keeps_as_much_as_1f1b() -> None:
    for k in range(1, 9):
        assert ZeroBubbleVPlan(k, 2 * k).activations(0) / 2 == OneFOneBPlan(k, 2 * k).activations(0) == k


def test_needs_of_both_parts_of_a_backward() -> None:
    """Only B is waited for by the stage before; only W by the update."""
    plan = ZeroBubbleH1Plan(3, 3)
    needs = {op: [str(need) for need in plan.needs(Op.parse(op))] for op in ("2B4", "1B4", "1W4", "1U4")}
    assert needs == {"2B4": ["2F4"], "1B4": ["1F4", "2B4"], "1W4": ["1B4"], "1U4": ["1W4"]}
    assert (plan.receiver(Op.parse("1B4")), plan.receiver(Op.parse("1W4"))) == (0, None)
    v = ZeroBubbleVPlan(3, 3)
    needs = {op: [str(need) for need in v.needs(Op.parse(op))] for op in ("2B4", "2W4'", "1U4")}
    assert needs == {"2B4": ["2F4", "2B4'"], "2W4'": ["2B4'"], "1U4": ["1W4", "1W4'"]}


def test_second_parts_have_a_text_form() -> None:
    for op in (Op(WEIGHT, 2, 5), Op(WEIGHT, 10, 0, 1), Op(BACKWARD, 1, 2, 2), Op(FORWARD, 1, 2, 11)):
        assert Op.parse(str(op)) == op
    assert [str(Op(WEIGHT, 2, 5)), str(Op(FORWARD, 1, 2, 2))] == ["2W5", "1F2'2"]
    for wrong in ("2W", "W5", "2F5'1", "2F5'0", "2F5'02"):
        with pytest.raises(ValueError, match="is not an operation"):
            Op.parse(wrong)


def test_costs_of_both_parts() -> None:
    cost = Cost(1, 4, overhead=0.5, scale=(1, 2), weight_share=0.25)
    plan, whole = ZeroBubbleVPlan(2, 2), OneFOneBPlan(2, 2)
    assert [cost.of(Op.parse(op), plan) for op in ("1F0", "1B0", "1W0'")] == [1.5, 3.5, 1.5]
    assert cost.of(Op.parse("1B0"), whole) == 8.5
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="cost 'weight_share' must be"):
            Cost(weight_share=share)


def test_activations_live_until_the_weight_gradients() -> None:
    """Also beside a backward that is not split, as in a measured timeline."""
    ops = [Op.parse(op) for op in ("0F0", "0F1", "0B0", "0B1", "0F2", "0W0", "0U0", "0B2", "0U2")]
    timeline = Timeline(tuple(Event(op, i, i + 1) for i, op in enumerate(ops)), 1)
    assert (timeline.peak_activations(0), timeline.staleness(0)) == (2, 1)
    assert timeline.peak_versions(0) == 2


def test_pictures() -> None:
    """Figure 3 of Qi et al., for three stages, in calls of their own."""
    timeline = replay(ZeroBubbleH1Plan(3, 3), 1)
    assert lines(clock(timeline)) == lines("""
        stage 0 | F0 F1 F2 .  .  B0 W0 B1 W1 B2 W2
        stage 1 | .  F0 F1 .  B0 F2 B1 W0 B2 W1 W2
        stage 2 | .  .  F0 B0 F1 B1 F2 B2 W0 W1 W2
    """)
    assert lines(text(timeline, updates=True)) == lines("""
        stage 0 | F0      F1      F2B0W0  B1W1    B2W2*
        stage 1 | F0      F1B0    F2B1W0  B2W1    W2*
        stage 2 | F0B0    F1B1    F2B2W0  W1      W2*
    """)
