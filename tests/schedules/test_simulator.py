"""Replays of all stages: no deadlock, no bubble, and counts that must agree with the plan's formulas."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product

import pytest

from ds_ddg.analysis.timeline_plot import clock
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.schedules.interleaved import InterleavedPlan
from ds_ddg.schedules.plan import Op, Plan
from ds_ddg.schedules.simulator import Cost, Deadlock, replay
from ds_ddg.schedules.synchronous import DualPipeVPlan, GPipePlan, OneFOneBPlan
from ds_ddg.schedules.timeline import Event, Timeline
from ds_ddg.schedules.zero_bubble import ZeroBubbleH1Plan, ZeroBubbleVPlan


def plans(num_stages: int) -> list[Plan]:
    """Every M in 1 .. 6, DDG with every slack in 0 .. 2, 1F1B and GPipe."""
    ddg = [DDGPlan(num_stages, m, slack) for m, slack in product(range(1, 7), range(3))]
    return [*ddg, *(plan(num_stages, m) for plan in (OneFOneBPlan, GPipePlan) for m in range(1, 7))]


def settled(plan: Plan) -> int:
    """Calls that fill the pipeline, and as many again to measure."""
    return 2 * plan.staleness(0) + 4


ELSEWHERE = [InterleavedPlan(4, 8), InterleavedPlan(3, 8, 3), ZeroBubbleH1Plan(4, 8), ZeroBubbleVPlan(3, 7)]
"""Of each schedule that DeepSpeed has not."""


class Written(Plan):
    """A plan typed out: one line of operations per stage."""

    name = "written"

    def __init__(self, *stages: str) -> None:
        super().__init__(len(stages))
        self.stages = stages

    def stream(self, stage: int, calls: int, drain: bool = False) -> Iterator[Op]:
        return map(Op.parse, self.stages[stage].split())


class Restarted(DDGPlan):
    """A drain after half of the calls, and a pipeline that fills anew."""

    def stream(self, stage: int, calls: int, drain: bool = False) -> Iterator[Op]:
        half = calls // 2
        yield from super().stream(stage, half, drain=True)
        for call in range(half, calls):
            yield from self.call(stage, call, start=half * self.micro_batches)
        yield from self.drain(stage, calls * self.micro_batches, start=half * self.micro_batches)


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_counts_agree_with_the_formulas_without_a_bubble(num_stages: int) -> None:
    """One replay of each plan shows it all: it ends, keeps what the plan says and takes the time it should."""
    for plan in plans(num_stages):
        name = f"{plan.name} M={plan.micro_batches} delay={plan.delay(0)}"
        timeline = replay(plan, settled(plan), drain=True)
        m = plan.micro_batches
        ticks = m if isinstance(plan, DDGPlan) else m + num_stages - 1
        assert timeline.period() == pytest.approx(3 * ticks), name
        assert timeline.bubble == pytest.approx(1 - m / ticks), name
        for stage in range(num_stages):
            assert timeline.peak_activations(stage) == plan.activations(stage), name
            assert timeline.peak_versions(stage) == plan.versions(stage), name
            assert timeline.staleness(stage) == plan.staleness(stage), name


@pytest.mark.parametrize("num_stages", range(1, 9))
@pytest.mark.parametrize("times", [2, 4])
def test_dualpipev_keeps_what_it_says_with_a_smaller_bubble(num_stages: int, times: int) -> None:
    """Five sixths of 1F1B's 3(K-1), and half a forward less."""
    plan = DualPipeVPlan(num_stages, times * num_stages)
    timeline = replay(plan, 4)
    assert [timeline.peak_activations(k) for k in range(num_stages)] == [2 * num_stages + 1] * num_stages
    assert [timeline.peak_versions(k) for k in range(num_stages)] == [1] * num_stages
    assert timeline.period() == pytest.approx(3 * plan.micro_batches + max(0, 2.5 * (num_stages - 1) - 0.5))


def test_dualpipev_exchanges_messages_by_pairs() -> None:
    """By hand, a column for half a forward, thus for a pass through one chunk.

    Stage 1 has finished F2' at 4.5 and F3' at 7.5, but sends them with the backwards behind them, at 5.5 and 8.5;
    stage 0 could start the first at 5 and the second at 8.
    """
    timeline = replay(DualPipeVPlan(2, 4), 1)
    assert clock(timeline, unit=0.5).splitlines() == [
        "stage 0 | F0  F1  F2  F0' B0'---- F1' F3  B1'---- .   F2' B0----- B2'---- .   F3' B1----- "
        "B3'---- B2----- .   .   B3-----",
        "stage 1 | .   F0  F0' F1  F1' F2  B0'---- F2' B0----- F3  B1'---- F3' B1----- B2'---- B2----- "
        ".   B3'---- B3----- .   .",
    ]
    assert timeline.makespan == 14


@pytest.mark.parametrize(
    ("num_stages", "micro_batches", "seconds"),
    [(2, 4, 0.4433), (2, 8, 0.8221), (4, 16, 1.7366), (8, 32, 3.6625)],  # per call, as benchmarks/off_cpu.py measured
)
def test_dualpipev_takes_the_time_measured_of_deepspeed(num_stages: int, micro_batches: int, seconds: float) -> None:
    """Stages of 30 and 60 ms; alone, one with a single chunk took 92.3 ms for a micro-batch and 1.1 ms once a call."""
    cost = Cost(0.030, 0.060, update=0.0011, link=0.00015, overhead=0.0023 / 2)
    timeline = replay(DualPipeVPlan(num_stages, micro_batches), 4, cost)
    assert timeline.period() == pytest.approx(seconds, rel=0.03)


def test_overhead_counts_for_every_pass_whatever_its_length() -> None:
    """Twice as many passes through chunks half as long: DualPipeV pays it twice for each micro-batch."""
    cost = Cost(overhead=0.25, scale=(1,))
    assert replay(DDGPlan(1, 2), 4, cost).period() == pytest.approx(2 * 3.5)
    assert replay(DualPipeVPlan(1, 2), 4, cost).period() == pytest.approx(2 * 4)
    assert replay(DDGPlan(2), 9, Cost(overhead=0.25, scale=(1, 2))).period() == pytest.approx(6.5)  # not scaled


@pytest.mark.parametrize(
    "plan",
    [
        *(DDGPlan(4, 1), DDGPlan(3, 2, slack=1), DDGPlan(8, 3)),
        *(OneFOneBPlan(4, 3), GPipePlan(3, 4), DualPipeVPlan(3, 6)),
        *ELSEWHERE,
    ],
)
def test_every_operation_runs_once_and_after_its_needs(plan: Plan) -> None:
    timeline = replay(plan, 4, Cost(link=0.5), drain=True)
    events = {event.op: event for event in timeline}
    expected = [op for stage in range(plan.num_stages) for op in plan.stream(stage, 4, drain=True)]
    assert sorted(event.op for event in timeline) == sorted(expected)
    for op, start, _ in timeline:
        for need in plan.needs(op):
            assert start >= events[need].end + (0.5 if need.stage != op.stage else 0)
    for row in timeline.rows:
        assert all(earlier.end <= later.start for earlier, later in pairwise(row))


@pytest.mark.parametrize("plan", [DDGPlan(4, 1), DDGPlan(4, 3), DDGPlan(8, 2), DDGPlan(1, 2)])
def test_an_update_that_takes_time_is_work_too(plan: DDGPlan) -> None:
    timeline = replay(plan, settled(plan), Cost(update=0.5))
    assert timeline.period() == pytest.approx(3 * plan.micro_batches + 0.5)
    assert timeline.bubble == pytest.approx(0)


@pytest.mark.parametrize(
    ("slack", "efficiency"),
    # Link latency:  0    10%    50%   100% of a tick; measured: .955 .846 .560 .395, .954 .956 .693, .961
    [(0, [1, 1 / 1.15, 1 / 1.75, 1 / 2.5]), (1, [1, 1, 1, 7 / 10]), (2, [1, 1, 1, 1])],
)
def test_slack_hides_the_latency_of_links(slack: int, efficiency: list[float]) -> None:
    """K = 4, M = 1, as in the design's table of measurements, which has the machine's overhead on top."""
    timelines = [replay(DDGPlan(4, 1, slack), 60, Cost(link=3 * share)) for share in (0, 0.1, 0.5, 1)]
    assert [3 / timeline.period() for timeline in timelines] == pytest.approx(efficiency)


@pytest.mark.parametrize(("num_stages", "slack", "link"), [*product([2, 3, 4], [0, 1, 2], [0.5, 2.0, 4.0])])
def test_latency_is_paid_on_the_slowest_loop_of_messages(num_stages: int, slack: int, link: float) -> None:
    """A gradient that climbs h hops and its answer that comes down again take 2h latencies and h + 1 passes through
    a tick's work, in h(1 + slack) + 1 ticks: slack s hides a latency of up to s/2 ticks per hop."""
    loops = [((h + 1) * 3 + 2 * h * link) / (h * (1 + slack) + 1) for h in range(num_stages)]
    timeline = replay(DDGPlan(num_stages, 1, slack), 60, Cost(link=link))
    assert timeline.period() == pytest.approx(max(3, *loops))


def test_bandwidth_is_shared_by_the_messages_of_a_link() -> None:
    """Latency can be hidden, bandwidth cannot: 4 units of time per message are the period, whatever the slack."""
    assert replay(DDGPlan(2, 1, slack=4), 40, Cost(num_bytes=8, bandwidth=2)).period() == pytest.approx(4)
    assert replay(DDGPlan(2, 1, slack=4), 40, Cost(num_bytes=8, bandwidth=2, link=3)).period() == pytest.approx(4)
    assert replay(DDGPlan(2, 1, slack=4), 40, Cost(link=4)).period() == pytest.approx(3)


def test_the_slowest_stage_sets_the_pace() -> None:
    timeline = replay(DDGPlan(3, 2), 20, Cost(scale=(1, 2, 0.5)))
    assert [timeline.period(stage) for stage in range(3)] == pytest.approx([12, 12, 12])
    assert [timeline.busy(stage) for stage in range(3)] == pytest.approx([0.5, 1, 0.25])


def test_a_broken_plan_deadlocks_and_names_the_stages() -> None:
    plan = Written("0F0 0B0 0F1 0B1", "1F1 1F0 1B0 1B1", "2F0 2B0")  # stages 0 and 1 disagree about what comes first
    with pytest.raises(Deadlock) as caught:
        replay(plan, 1)
    assert str(caught.value).splitlines() == [
        "plan 'written': no stage can go on",
        "  stage 0: next 0B0, waits for 1B0 of stage 1",
        "  stage 1: next 1F1, waits for 0F1 of stage 0",
        "  stage 2: next 2F0, waits for 1F0 of stage 1",
    ]


def test_a_backward_without_its_forward_deadlocks() -> None:
    with pytest.raises(Deadlock, match="stage 0: finished\n  stage 1: next 1B0, waits for 1F0 of stage 1"):
        replay(Written("0F0", "1B0"), 1)


def test_pipeline_fills_anew_after_a_drain() -> None:
    plan = Restarted(4, 2)
    timeline = replay(plan, 12)
    assert timeline.peak_activations(0) == plan.activations(0)
    last = max(event.end for event in timeline if event.op.micro_batch < 12)
    assert last < 2 * replay(DDGPlan(4, 2), 6, drain=True).makespan
    assert sum(event.op.kind == "B" for event in timeline) == 4 * 24


def test_measured_events_answer_the_same_questions() -> None:
    """Out of order, as they come from several processes; times in seconds since some epoch."""
    events = [(Op.parse(text), 100 + start, 100 + end) for text, start, end in [
        ("1F0", 1, 2), ("0F0", 0, 1), ("1B0", 2, 4), ("1U0", 4, 4), ("0B0", 4, 6), ("0U0", 6, 6),
        ("0F1", 6, 7), ("1F1", 7, 8), ("1B1", 8, 10), ("1U1", 10, 10), ("0B1", 10, 12), ("0U1", 12, 12),
    ]]  # fmt: skip
    timeline = Timeline(tuple(Event(*event) for event in events), 2)
    assert timeline.makespan == 12
    assert (timeline.period(), timeline.busy(0), timeline.bubble) == (6, 0.5, 0.5)
    assert [op for op, _, _ in timeline] == [op for op, _, _ in replay(OneFOneBPlan(2), 2)]


def test_the_newest_version_counts_before_any_forward_of_it() -> None:
    ops = [Op.parse(text) for text in ("0F0", "0F1", "0B0", "0U0")]
    timeline = Timeline(tuple(Event(op, i, i + 1) for i, op in enumerate(ops)), 1)
    assert (timeline.peak_versions(0), timeline.peak_activations(0), timeline.staleness(0)) == (2, 2, 0)


def test_noise_gives_the_mean_period() -> None:
    ends = [0.0, 3.1, 5.9, 9.05, 12.0, 14.9, 18.2, 21.0]
    events = [
        Event(Op(kind, 0, n), end - last, end) for n, end in enumerate(ends) for kind, last in (("F", 1), ("U", 0))
    ]
    assert Timeline(tuple(events), 1).period() == pytest.approx((21.0 - 9.05) / 4)


def test_too_few_calls_have_no_steady_state() -> None:
    with pytest.raises(ValueError, match="needs 2 calls that end in an update, got 1; replay or record more"):
        replay(DDGPlan(2), 2, drain=True).period()


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ({"forward": -1}, "cost 'forward' must be finite and 0 or more, got -1"),
        ({"link": float("nan")}, "cost 'link' must be finite"),
        ({"scale": (1, -2)}, "cost 'scale' must be finite"),
        ({"overhead": -1}, "cost 'overhead' must be finite and 0 or more, got -1"),
        ({"bandwidth": 0}, "cost 'bandwidth' must be above 0, got 0; leave it out if unlimited"),
    ],
)
def test_costs_are_checked(cost: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cost(**cost)  # type: ignore[arg-type]


def test_only_the_stages_asked_for_are_in_the_timeline() -> None:
    cost = Cost(link=0.3, num_bytes=1, bandwidth=2)
    whole = replay(DDGPlan(3, 2), 6, cost, drain=True)
    part = replay(DDGPlan(3, 2), 6, cost, drain=True, stages=[0, 2])
    assert part.events == tuple(event for event in whole if event.op.stage != 1)
    assert part.period() == whole.period()


@pytest.mark.parametrize(
    "plan", [DDGPlan(4, 3, slack=1), OneFOneBPlan(3, 4), GPipePlan(3, 4), DualPipeVPlan(4, 9), *ELSEWHERE]
)
def test_whoever_receives_a_result_is_who_needs_it(plan: Plan) -> None:
    ops = [op for stage in range(plan.num_stages) for op in plan.stream(stage, 3, drain=True)]
    needed = {need: op.stage for op in ops for need in plan.needs(op) if need.stage != op.stage}
    assert needed
    assert {op: plan.receiver(op) for op in ops if plan.receiver(op) is not None} == needed


def test_messages_of_two_operations_queue_for_their_link() -> None:
    """DualPipeV sends the results of a forward and a backward together, here 2 of time each, to the same stage."""
    timeline = replay(DualPipeVPlan(2, 4), 1, Cost(num_bytes=2, bandwidth=1))
    _, sent = (event for event in timeline.rows[1] if str(event.op) in ("1F2'", "1B0"))
    received = [event.start for event in timeline.rows[0] if str(event.op) in ("0F2'", "0B0")]
    assert received == [sent.end + 4, sent.end + 4.5]  # a pair as well, which waits for both


def test_times_that_no_float_can_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="times add up to more than a float can say"):
        replay(DDGPlan(2), 4, Cost(link=1e308))
    assert replay(DDGPlan(2), 20, Cost(link=1e300)).period() == pytest.approx(1e300)


def test_an_absurd_size_is_refused_before_any_computation() -> None:
    message = "100 stages x 1000 calls of 1000 micro-batches are 200,100,000 operations to replay, more than 5,000,000"
    with pytest.raises(ValueError, match=message):
        replay(DDGPlan(100, 1000), 1000)


def test_scale_must_fit_the_stages() -> None:
    with pytest.raises(ValueError, match="one number for each of 3 stages, got"):
        replay(DDGPlan(3), 1, Cost(scale=(1, 2)))
