"""What to take: memory as the plan counts it, and preferences that one can argue for."""

from __future__ import annotations

import pytest

from ds_ddg.analysis.balance import LayerCost
from ds_ddg.analysis.recommend import Setup, candidates, recommend, rival, setups, steady, title
from ds_ddg.analysis.stage_costs import Model
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.schedules.interleaved import InterleavedPlan
from ds_ddg.schedules.simulator import Cost, replay
from ds_ddg.schedules.synchronous import OneFOneBPlan

GIB = Model(Cost(num_bytes=0.1), weight_bytes=(1, 1, 1, 1), activation_bytes=(2, 2, 2, 2))

PAIR = Model(Cost(num_bytes=0.1), weight_bytes=(1, 1), activation_bytes=(2, 2))


@pytest.mark.parametrize(
    ("setup", "memory"),
    [
        # At work are a backward, 2 of activations or gradients in their place and 2 x 0.1, and 0.1 twice of its input.
        # Messages: the gradient used and the next; two held, and the next activation, on the last stage these alone.
        (Setup(DDGPlan(4), GIB), [4 + 8 + 0.4, 3 + 6.4 + 0.9, 2 + 4.2 + 0.9, 1 + 2 + 0.7]),
        (Setup(DDGPlan(4, 4), GIB), [2 + 9 + 0.4, 2 + 7.4 + 0.9, 1 + 5.2 + 0.9, 1 + 3 + 0.7]),
        (Setup(DDGPlan(4), GIB, weights="current"), [1 + 8 + 0.4, 1 + 6.4 + 0.9, 1 + 4.2 + 0.9, 1 + 2 + 0.7]),
        (Setup(DDGPlan(4), GIB, activations="recompute"), [4 + 2.8, 3 + 3.4, 2 + 3.2, 1 + 2 + 0.7]),
        (Setup(OneFOneBPlan(4, 2), GIB), [1 + 5 + 0.4, 1 + 5.2 + 0.8, 1 + 5.2 + 0.8, 1 + 3 + 0.6]),
        # The data of the rest of a call, and the copies of those in flight.
        (Setup(DDGPlan(2, 3), Model(Cost(), (1, 1), (2, 2), input_bytes=0.5)), [2 + 3 + 1 + 2 + 1, 1 + 3]),
    ],
)
def test_memory_of_each_stage(setup: Setup, memory: list[float]) -> None:
    assert setup.memory == pytest.approx(memory)


def test_nothing_known_about_memory() -> None:
    assert Setup(DDGPlan(2), Model(Cost())).memory is None


def test_times_against_one_device() -> None:
    setup = Setup(DDGPlan(4, 2), Model(Cost(update=0.5)))
    assert (setup.time_per_call, setup.one_device) == pytest.approx((6.5, 26))
    assert setup.speedup == pytest.approx(4)
    again = Setup(DDGPlan(4, 2), Model(Cost(update=0.5)), activations="recompute")
    assert again.time_per_call == pytest.approx(8.5)
    assert again.speedup == pytest.approx(26 / 8.5)  # running a forward again is no progress


def test_overhead_is_paid_again_by_a_forward_run_again() -> None:
    setup = Setup(DDGPlan(4, 2), Model(Cost(update=0.5, overhead=0.25)))
    assert (setup.time_per_call, setup.one_device) == pytest.approx((7.5, 27))
    again = Setup(DDGPlan(4, 2), Model(Cost(update=0.5, overhead=0.25)), activations="recompute")
    assert again.time_per_call == pytest.approx(7.5 + 2 * 1.25)


@pytest.mark.parametrize("m", [1, 3, 8, 40])
@pytest.mark.parametrize("link", [0, 0.7, 2])
def test_steady_is_steady(m: int, link: float) -> None:
    """Twice as many calls change nothing."""
    for setup in setups(4, m, (0, 1, 2), Model(Cost(link=link))):
        calls = 2 * max(40, -(-120 // m))
        expected = replay(setup.plan, calls if m < 8 else 30, Cost(link=link)).period()
        assert steady(setup.plan, Cost(link=link)).period() == pytest.approx(expected, rel=0.01), setup


def test_takes_the_fastest_that_fits_then_the_least_stale() -> None:
    choices = [c for m in (1, 4, 128) for setup in setups(2, m, (0, 1), PAIR) for c in candidates(setup)]
    assert str(recommend(choices)) == "1f1b, K = 2 stages, M = 128"  # within 1% of no bubble, and nothing stale
    ddg = [choice for choice in choices if choice.plan.name == "ddg"]
    best = recommend(ddg, limit=6.5)
    assert best is not None
    assert str(best) == 'ddg, K = 2 stages, M = 1, "weights": "stash", "activations": "keep"'
    assert recommend(choices, limit=1) is None


def choices_of(num_stages: int, micro_batches: tuple[int, ...], model: Model) -> list[Setup]:
    return [c for m in micro_batches for setup in setups(num_stages, m, (0, 1), model) for c in candidates(setup)]


@pytest.mark.parametrize(("k", "m", "slack"), [(2, 1, 0), (4, 3, 0), (8, 7, 0), (4, 6, 1)])
def test_prefers_one_update_of_staleness_at_most(k: int, m: int, slack: int) -> None:
    """M = (K - 1)(1 + slack) is the first: where latency asks for slack, it asks for more micro-batches as well."""
    model = Model(Cost(link=1.5 * slack), weight_bytes=(1,) * k, activation_bytes=(2,) * k)
    best = recommend(choices_of(k, tuple(range(1, m + 1)), model))
    assert best is not None
    assert (best.plan.micro_batches, best.plan.staleness(0)) == (m, 1)
    assert title(best.plan) == f"ddg, K = {k} stages, M = {m}{', slack 1' * slack}"
    fewer = recommend(choices_of(k, tuple(range(1, m)), model)) if m > 1 else None
    assert fewer is None or fewer.plan.staleness(0) > 1


def test_recommends_what_deepspeed_runs() -> None:
    choices = choices_of(4, (1, 16), GIB)
    best = recommend(choices)
    assert best is not None
    assert title(best.plan) == "ddg, K = 4 stages, M = 16"
    other = rival(choices, best)
    assert other is not None
    assert title(other.plan) == "zb-v, K = 4 stages, M = 16"  # as fast, and nothing stale
    assert other.time_per_micro_batch == pytest.approx(best.time_per_micro_batch)
    assert rival(choices, None) == other
    assert rival(choices, best, limit=max(other.memory or []) - 0.1) is None, "it does not fit, and the rest is slower"
    few = choices_of(4, (1, 4), GIB)
    assert rival(few, recommend(few)) is None, "none is as fast"


def test_a_rival_of_a_synchronous_schedule_must_be_faster() -> None:
    for m, name in ((16, "zb-v"), (512, "")):
        choices = [setup for setup in setups(4, m, (), GIB) if setup.plan.name != "gpipe"]
        best = recommend(choices)
        assert best is not None
        assert best.plan.staleness(0) == 0
        other = rival(choices, best)
        assert (other.plan.name if other else "") == name


def test_chunks_are_of_interleaved() -> None:
    found = [setup.plan for setup in setups(4, 8, (), GIB, chunks=3) if isinstance(setup.plan, InterleavedPlan)]
    assert [title(plan) for plan in found] == ["interleaved, K = 4 stages, M = 8, 3 chunks a stage"]


def test_every_schedule_of_a_setting() -> None:
    elsewhere = ["interleaved", "zb-h1", "zb-v"]
    assert [setup.plan.name for setup in setups(2, 3, (0, 2), GIB)] == ["gpipe", "1f1b", "ddg", "ddg", *elsewhere]
    assert [setup.plan.name for setup in setups(2, 4, (0,), GIB)] == ["gpipe", "1f1b", "dualpipev", "ddg", *elsewhere]
    # Five micro-batches for two stages are no two rounds of equal length.
    assert [setup.plan.name for setup in setups(2, 5, (0,), GIB)] == ["gpipe", "1f1b", "dualpipev", "ddg", "zb-v"]


def test_model_of_measured_layers() -> None:
    layers = [LayerCost("a", 1, 2, 10, 7, 3), LayerCost("b", 1, 2, 20, 5, 2), LayerCost("c", 2, 4, 40, 1, 1)]
    model = Model.of_layers(layers, 2, update=0.5, link=0.25, bandwidth=8)
    assert model.cost == Cost(2, 4, 0.5, 0.25, 2, 8, (1, 1))
    assert (model.weight_bytes, model.activation_bytes) == ((30, 40), (12, 1))
    assert (model.output_bytes, model.backward) == ((2, 1), ((7 + 30 + 3, 12 + 20 + 5), (1 + 40 + 3, 1 + 40 + 3)))
