"""The schedules as data: pictures for the small cases, properties for all the others."""

from __future__ import annotations

from itertools import product

import pytest

from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.schedules.plan import BACKWARD, FORWARD, UPDATE, Op, Plan
from ds_ddg.schedules.synchronous import DualPipeVPlan, GPipePlan, OneFOneBPlan


def ddg_plans(num_stages: int) -> list[DDGPlan]:
    return [DDGPlan(num_stages, m, slack) for m, slack in product(range(1, 7), range(3))]


def picture(ops: list[Op]) -> str:
    """``F3 B1 U1``: the stage is clear from the context."""
    return " ".join(str(op)[1:] for op in ops)


def of_kind(ops: list[Op], kind: str) -> list[int]:
    return [op.micro_batch for op in ops if op.kind == kind]


def test_every_stage_of_the_paper() -> None:
    """K = 3, M = 1: three calls to fill, one in steady state, and the drain."""
    plan = DDGPlan(3)
    assert [picture(list(plan.stream(stage, 4, drain=True))) for stage in range(3)] == [
        "F0 F1 F2 B0 U0 F3 B1 U1 B2 U2 B3 U3",
        "F0 F1 B0 U0 F2 B1 U1 F3 B2 U2 B3 U3",
        "F0 B0 U0 F1 B1 U1 F2 B2 U2 F3 B3 U3",
    ]


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_is_algorithm_1_of_the_paper(num_stages: int) -> None:
    """Module k of K, counted from 1, uses the gradient of iteration t - K + k in iteration t, and none before."""
    plan = DDGPlan(num_stages)
    for module, t in product(range(1, num_stages + 1), range(2 * num_stages)):
        used = t - num_stages + module
        expected = [(FORWARD, t), (BACKWARD, used), (UPDATE, used)] if used >= 0 else [(FORWARD, t)]
        assert [(op.kind, op.micro_batch) for op in plan.call(module - 1, t)] == expected


@pytest.mark.parametrize(
    ("plan", "stage", "calls"),
    [
        (DDGPlan(3, 2), 0, ["F0 F1", "F2 B0 F3 B1 U1", "F4 B2 F5 B3 U3"]),
        (DDGPlan(3, 2), 1, ["F0 F1 B0 U0", "F2 B1 F3 B2 U2"]),
        (DDGPlan(2, 1, slack=1), 0, ["F0", "F1", "F2 B0 U0", "F3 B1 U1"]),
        (DDGPlan(2, 3, slack=2), 0, ["F0 F1 F2", "F3 B0 F4 B1 F5 B2 U2"]),
        (DDGPlan(1, 2), 0, ["F0 B0 F1 B1 U1", "F2 B2 F3 B3 U3"]),
        (OneFOneBPlan(3, 4), 0, ["F0 F1 F2 B0 F3 B1 B2 B3 U3", "F4 F5 F6 B4 F7 B5 B6 B7 U7"]),
        (OneFOneBPlan(3, 4), 1, ["F0 F1 B0 F2 B1 F3 B2 B3 U3"]),
        (OneFOneBPlan(3, 4), 2, ["F0 B0 F1 B1 F2 B2 F3 B3 U3"]),
        (OneFOneBPlan(3, 1), 0, ["F0 B0 U0", "F1 B1 U1"]),
        (GPipePlan(3, 2), 0, ["F0 F1 B0 B1 U1", "F2 F3 B2 B3 U3"]),
        (DualPipeVPlan(1, 2), 0, ["F0 F0' F1 B0' F1' B0 B1' B1 U1", "F2 F2' F3 B2' F3' B2 B3' B3 U3"]),
        (DualPipeVPlan(2, 4), 0, ["F0 F1 F2 F0' B0' F1' F3 B1' F2' B0 B2' F3' B1 B3' B2 B3 U3"]),
        (DualPipeVPlan(2, 4), 1, ["F0 F0' F1 F1' F2 B0' F2' B0 F3 B1' F3' B1 B2' B2 B3' B3 U3"]),
    ],
)
def test_calls(plan: Plan, stage: int, calls: list[str]) -> None:
    assert [picture(plan.call(stage, t)) for t in range(len(calls))] == calls


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_every_stage_learns_from_every_micro_batch_once(num_stages: int) -> None:
    synchronous = [plan(num_stages, m) for plan in (OneFOneBPlan, GPipePlan) for m in range(1, 7)]
    dualpipev = [DualPipeVPlan(num_stages, m) for m in (2 * num_stages, 2 * num_stages + 1, 4 * num_stages)]
    for plan, stage in product([*ddg_plans(num_stages), *synchronous, *dualpipev], range(num_stages)):
        everything = list(range(3 * plan.micro_batches))
        ops = list(plan.stream(stage, 3, drain=True))
        for chunk, kind in product(range(plan.num_chunks), (FORWARD, BACKWARD)):
            assert of_kind([op for op in ops if op.chunk == chunk], kind) == everything
        assert ops[-1] == Op(UPDATE, stage, everything[-1])
        place = {op: i for i, op in enumerate(ops)}
        assert all(place[need] < place[op] for op in ops for need in plan.needs(op) if need.stage == stage)


@pytest.mark.parametrize(("num_stages", "micro_batches"), [(1, 2), (2, 4), (3, 7), (4, 16), (8, 16)])
def test_dualpipev_is_deepspeeds(num_stages: int, micro_batches: int) -> None:
    """The same passes in the same order, with an exchange of messages at the same places."""
    from deepspeed.runtime.pipe.schedule import BackwardPass, CommitP2P, DualPipeVSchedule, ForwardPass

    kinds = {ForwardPass: FORWARD, BackwardPass: BACKWARD}
    for stage in range(num_stages):
        theirs: list[list[Op]] = [[]]
        for step in (step for steps in DualPipeVSchedule(micro_batches, num_stages, stage).steps() for step in steps):
            if type(step) is CommitP2P:
                theirs.append([])
            elif type(step) in kinds:
                chunk, n = divmod(step.buffer_id, micro_batches)
                theirs[-1].append(Op(kinds[type(step)], stage, n, chunk))
        plan = DualPipeVPlan(num_stages, micro_batches)
        ours = list(plan.batches(stage, 2))
        assert [op for batch in ours for op in batch] == [*plan.stream(stage, 2)]
        assert ours[: len(ours) // 2 - 1] == [batch for batch in theirs if batch]
        assert ours[len(ours) // 2 - 1] == [Op(UPDATE, stage, micro_batches - 1)]


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_a_call_updates_once_and_only_with_a_gradient(num_stages: int) -> None:
    for plan, stage, t in product(ddg_plans(num_stages), range(num_stages), range(4)):
        ops = plan.call(stage, t)
        backwards = of_kind(ops, BACKWARD)
        assert of_kind(ops, UPDATE) == backwards[-1:]
        assert len(backwards) == min(plan.micro_batches, max(0, (t + 1) * plan.micro_batches - plan.delay(stage)))


@pytest.mark.parametrize(
    ("plan", "end", "start", "expected"),
    [
        (DDGPlan(4, 1), 5, 0, "B2 U2 B3 U3 B4 U4"),
        (DDGPlan(4, 2), 6, 0, "B3 B4 U4 B5 U5"),
        (DDGPlan(4, 3), 6, 0, "B3 B4 B5 U5"),
        (DDGPlan(4, 8), 8, 0, "B5 B6 B7 U7"),
        (DDGPlan(4, 2, slack=1), 12, 0, "B6 B7 U7 B8 B9 U9 B10 B11 U11"),
        (DDGPlan(4, 1), 2, 0, "B0 U0 B1 U1"),  # drained before the first gradient came back
        (DDGPlan(4, 1), 7, 5, "B5 U5 B6 U6"),  # what an earlier drain finished stays finished
        (DDGPlan(4, 2), 6, 6, ""),  # a second drain does nothing
        (DDGPlan(4, 2), 0, 0, ""),
        (OneFOneBPlan(4, 2), 6, 0, ""),
    ],
)
def test_drain_updates_every_m_and_once_for_the_rest(plan: Plan, end: int, start: int, expected: str) -> None:
    assert picture(plan.drain(0, end, start)) == expected
    assert plan.drain(plan.num_stages - 1, end, start) == []


def test_a_drained_pipeline_fills_anew() -> None:
    plan = DDGPlan(3)
    assert [picture(plan.call(0, t, start=5)) for t in (5, 6, 7, 8)] == ["F5", "F6", "F7 B5 U5", "F8 B6 U6"]


@pytest.mark.parametrize("plan", [DDGPlan(4, 1), DDGPlan(4, 2), DDGPlan(3, 3, slack=1)])
def test_nothing_is_lost_or_learned_twice_across_a_drain(plan: DDGPlan) -> None:
    m, before, after = plan.micro_batches, 4, 5
    for stage in range(plan.num_stages):
        ops = list(plan.stream(stage, before, drain=True))
        for t in range(before, before + after):
            ops += plan.call(stage, t, start=before * m)
        ops += plan.drain(stage, (before + after) * m, start=before * m)
        assert of_kind(ops, FORWARD) == of_kind(ops, BACKWARD) == list(range((before + after) * m))


def test_needs_is_a_micro_batchs_way_through_the_pipeline() -> None:
    plan = DDGPlan(3)
    needs = {text: [str(need) for need in plan.needs(Op.parse(text))] for text in ("0F4", "2F4", "2B4", "0B4", "1U4")}
    assert needs == {"0F4": [], "2F4": ["1F4"], "2B4": ["2F4"], "0B4": ["0F4", "1B4"], "1U4": ["1B4"]}


def test_needs_goes_down_the_v_and_up_again() -> None:
    plan = DualPipeVPlan(3, 6)
    texts = ("0F4", "2F4", "2F4'", "0F4'", "0B4'", "2B4'", "2B4", "0B4", "1U4")
    assert {text: [str(need) for need in plan.needs(Op.parse(text))] for text in texts} == {
        "0F4": [],
        "2F4": ["1F4"],
        "2F4'": ["2F4"],
        "0F4'": ["1F4'"],
        "0B4'": ["0F4'"],
        "2B4'": ["2F4'", "1B4'"],
        "2B4": ["2F4", "2B4'"],
        "0B4": ["0F4", "1B4"],
        "1U4": ["1B4", "1B4'"],
    }


@pytest.mark.parametrize(
    ("plan", "delay", "staleness", "versions", "activations"),
    [
        (DDGPlan(4, 1), [3, 2, 1, 0], [3, 2, 1, 0], [4, 3, 2, 1], [4, 3, 2, 1]),
        (DDGPlan(4, 2), [3, 2, 1, 0], [2, 1, 1, 0], [3, 2, 2, 1], [4, 3, 2, 1]),
        (DDGPlan(4, 3), [3, 2, 1, 0], [1, 1, 1, 0], [2, 2, 2, 1], [4, 3, 2, 1]),
        (DDGPlan(3, 2, slack=1), [4, 2, 0], [2, 1, 0], [3, 2, 1], [5, 3, 1]),
        (OneFOneBPlan(4, 2), [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 1]),
        (GPipePlan(2, 6), [0, 0], [0, 0], [1, 1], [6, 6]),
        (DualPipeVPlan(2, 6), [0, 0], [0, 0], [1, 1], [5, 5]),  # passes through half of a stage each
    ],
)
def test_table_of_delays(
    plan: Plan, delay: list[int], staleness: list[int], versions: list[int], activations: list[int]
) -> None:
    """The design's table; tests/schedules/test_simulator.py counts the same numbers in a replay of every plan."""
    stages = range(plan.num_stages)
    assert [plan.delay(k) for k in stages] == delay
    assert [plan.staleness(k) for k in stages] == staleness
    assert [plan.versions(k) for k in stages] == versions
    assert [plan.activations(k) for k in stages] == activations


@pytest.mark.parametrize("op", [Op(FORWARD, 0, 0), Op(BACKWARD, 2, 5), Op(UPDATE, 12, 3456), Op(FORWARD, 1, 7, 1)])
def test_text_form_there_and_back(op: Op) -> None:
    assert Op.parse(str(op)) == op
    assert str(Op(BACKWARD, 2, 5)) == "2B5"


@pytest.mark.parametrize("text", ["", "F", "2F", "F5", "2X5", "-1F2", "2F-5", "2F5B1", "2 F5", "2f5", "2F'", "2F5''"])
def test_parse_refuses_what_is_no_operation(text: str) -> None:
    with pytest.raises(ValueError, match="is not an operation: expected stage, F, B, W or U"):
        Op.parse(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "at least 1 stage and 1 micro-batch, got 0 and 1"),
        ((2, 0), "at least 1 stage and 1 micro-batch, got 2 and 0"),
        ((2, 1, -1), "slack must be 0 or more, got -1"),
    ],
)
def test_bad_sizes_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DDGPlan(*arguments)


def test_dualpipev_needs_two_micro_batches_for_each_stage() -> None:
    with pytest.raises(ValueError, match="at least 6 for 3 stages, got 5; raise M or use fewer stages"):
        DualPipeVPlan(3, 5)
