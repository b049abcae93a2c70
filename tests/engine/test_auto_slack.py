"""The rule of `"slack": "auto"`, its choice under a latency of our own, and that training goes on by the equation."""

from __future__ import annotations

import contextlib
import io
from itertools import pairwise
from typing import Any

import pytest
import torch

from benchmarks.latency import added_latency
from ds_ddg.engine.auto_slack import MOST, smallest_slack, trial_calls
from ds_ddg.reference import Reference
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.schedules.simulator import Cost, replay
from ds_ddg.telemetry.observer import Timestamp
from helpers import tied_runs, toy
from helpers.distributed import GetRanks
from helpers.modes import DEFAULT

TICK = 0.09  # seconds


@pytest.mark.parametrize(
    ("latency", "slack"), [(0, 0), (0.005, 0), (0.1, 1), (0.5, 1), (0.505, 1), (0.6, 2), (1, 2), (3.2, 7), (99, MOST)]
)
def test_smallest_that_hides_the_latency(latency: float, slack: int) -> None:
    """In ticks, K = 4; three per cent of a tick are not worth a larger delay."""
    assert smallest_slack(4, TICK, TICK * latency) == slack


@pytest.mark.parametrize("num_stages", [2, 3, 5])
@pytest.mark.parametrize("slack", [0, 1, 3])
@pytest.mark.parametrize("latency", [0.0, 0.3, 1.0, 2.5])
def test_slowdown_is_that_of_a_replay(num_stages: int, slack: int, latency: float) -> None:
    plan = DDGPlan(num_stages, 1, slack)
    period = replay(plan, 160, Cost(1, 2, link=3 * latency)).period()
    assert plan.slowdown(latency) == pytest.approx(period / 3, rel=1e-6)


def test_a_trial_fills_the_pipeline_and_measures_some_ticks() -> None:
    assert [trial_calls(DDGPlan(4, m)) for m in (1, 2, 4, 16)] == [12, 7, 5, 5]


CALLS_AFTER = 6


def measured(engine: Any, latency: float) -> None:
    """Let the engine find ticks of `TICK` and this latency, which is real, whatever else the machine is doing."""
    tuner, real = engine._calls.slack, engine._calls.slack.latency

    def at_least(tensors: Any) -> float:
        assert real(tensors) >= latency * (engine.stage_id < engine.num_stages - 1)
        return latency

    tuner._observer.timestamp = lambda keep: keep(
        Timestamp(TICK * engine.micro_batches * engine._run.call, waited=0.0)
    )
    tuner.latency = at_least


def choose(rank: int, world_size: int, latency: float, micro_batches: int) -> dict[str, Any]:
    with added_latency(latency), contextlib.redirect_stdout(io.StringIO()) as said:
        engine = toy.engine(world_size, micro_batches, "sgd", {"slack": "auto"})
        measured(engine, latency)
        trial = trial_calls(engine.plan)
        data = toy.batches((trial + CALLS_AFTER) * micro_batches)
        seen = []
        for _ in range(trial + CALLS_AFTER):
            loss = engine.train_batch(data)
            seen.append((engine.plan.slack, float(loss), engine.loss_step))
        stats = engine.ddg_stats()
        buffers = engine.num_pipe_buffers
        engine.drain()
        return {
            "seen": seen,
            "state": toy.state(engine.module),
            "said": said.getvalue(),
            "stats": stats,
            "buffers": buffers,
        }


@pytest.mark.proves('"slack": "auto"', modes=DEFAULT)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("latency", "micro_batches", "slack"), [(0, 1, 0), (0.03, 1, 1), (0.075, 2, 2)])
def test_chooses_by_what_it_measures_and_trains_on_exactly(
    ranks: GetRanks, latency: float, micro_batches: int, slack: int
) -> None:
    results = ranks(3).run(choose, latency, micro_batches)
    trial = trial_calls(DDGPlan(3, micro_batches))
    assert [r["seen"] for r in results] == [results[0]["seen"]] * 3, "the ranks disagree"
    assert [s for s, _, _ in results[0]["seen"]] == [0] * trial + [slack] * CALLS_AFTER, results[0]["said"]
    assert f"chosen: slack {slack}" in results[0]["said"]
    assert [r["said"].count('"slack": "auto"') for r in results] == [1, 0, 0]

    oracle = toy.reference(3, micro_batches=micro_batches)
    data = toy.batches((trial + CALLS_AFTER) * micro_batches)
    losses = [float(oracle.train_batch(data)) for _ in range(trial)]
    oracle.drain()
    oracle.delays = [(2 - k) * (1 + slack) for k in range(3)]
    losses += [float(oracle.train_batch(data)) for _ in range(CALLS_AFTER)]
    oracle.drain()
    age = [DDGPlan(3, micro_batches, s).staleness(0) for s in (0, slack)]
    for call, (_, loss, step) in enumerate(results[0]["seen"]):
        expected = max(call - age[0], 0) if call < trial else max(call - age[1], trial - 1)
        assert (loss, step) == (losses[expected], expected)
    for stage, result in enumerate(results):
        assert all(torch.equal(a, b) for a, b in zip(result["state"], toy.state(oracle.stages[stage]), strict=True))
        in_flight = min(DDGPlan(3, micro_batches, slack).delay(stage), CALLS_AFTER * micro_batches)
        assert result["stats"]["micro_batches_in_flight"] == in_flight
        assert result["buffers"] >= in_flight


def choose_tied(rank: int, world_size: int, latency: float) -> tuple[list[int], list[torch.Tensor]]:
    from deepspeed.pipe import PipelineModule

    import ds_ddg

    with added_latency(latency):
        net = PipelineModule(
            tied_runs.specs(True), num_stages=3, loss_fn=tied_runs.loss_fn, partition_method="uniform"
        )
        torch.manual_seed(11)
        engine, *_ = ds_ddg.initialize(
            model=net,
            config=toy.config(1, {"slack": "auto"}),
            optimizer=toy.OPTIMIZERS["sgd"],
            model_parameters=list(net.parameters()),
        )
        measured(engine, latency)
        calls = trial_calls(engine.plan) + CALLS_AFTER
        data = tied_runs.batches(calls)
        for _ in range(calls):
            engine.train_batch(data)
        engine.drain()
        return [engine.plan.slack], toy.state(net)


@pytest.mark.usefixtures("one_thread")
def test_tied_weights_go_along(ranks: GetRanks) -> None:
    """Their messages are bounded by the plan too."""
    from deepspeed.runtime.utils import partition_uniform

    results = ranks(3).run(choose_tied, 0.075)
    assert [slack for slack, _ in results] == [[2]] * 3
    net = tied_runs.oracle_layers(True)
    torch.manual_seed(11)
    stages = [torch.nn.Sequential(*net[a:b]) for a, b in pairwise(partition_uniform(len(net), 3))]
    own: list[list[torch.nn.Parameter]] = []
    for stage in stages:
        own.append([p for p in stage.parameters() if all(p is not q for other in own for q in other)])
    oracle = Reference(stages, tied_runs.loss_fn, [toy.OPTIMIZERS["sgd"](parameters) for parameters in own])
    data = tied_runs.batches(trial_calls(DDGPlan(3)) + CALLS_AFTER)
    for slack, calls in ((0, trial_calls(DDGPlan(3))), (2, CALLS_AFTER)):
        oracle.delays = [DDGPlan(3, 1, slack).delay(stage) for stage in range(3)]
        for _ in range(calls):
            oracle.train_batch(data)
        oracle.drain()
    for (_, state), stage in zip(results, stages, strict=True):
        pairs = zip(tied_runs.sorted_states(state), tied_runs.sorted_states(toy.state(stage)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def alone(rank: int, world_size: int) -> int:
    engine = toy.engine(1, 1, "sgd", {"slack": "auto"})
    data = toy.batches(16)
    for _ in range(16):
        engine.train_batch(data)
    return engine.plan.slack


def test_one_stage_has_no_links_to_hide(ranks: GetRanks) -> None:
    assert ranks(1).run(alone) == [0]
