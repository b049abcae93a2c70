"""What a training loop sees of the engine: losses, counts, drains, evaluation, the other schedule, the end of data."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import toy
from helpers.distributed import GetRanks

pytestmark = pytest.mark.usefixtures("one_thread")


State = list[Tensor]


def assert_equal_states(ours: list[State], oracle: Any) -> None:
    """`ours` by rank, one rank a stage."""
    __tracebackhide__ = True
    for k, (state, stage) in enumerate(zip(ours, oracle.stages, strict=True)):
        for i, (got, expected) in enumerate(zip(state, toy.state(stage), strict=True)):
            assert torch.equal(got, expected), f"stage {k}, tensor {i}: off by {float((got - expected).abs().max())}"


def evaluate(oracle: Any, data: Iterator[tuple[Tensor, Tensor]], count: int) -> float:
    """Mean loss over `count` micro-batches at the oracle's present weights."""
    net = nn.Sequential(*oracle.stages).eval()
    with torch.no_grad():
        total = sum((toy.loss_fn(net(x), y) for x, y in (next(data) for _ in range(count))), torch.zeros(()))
    net.train()
    return float(total / count)


# -- what a call returns ----------------------------------------------------------------------------------------------


def observe(rank: int, world_size: int, micro_batches: int, ddg: dict[str, Any], calls: int) -> list[tuple[Any, ...]]:
    """After every call: loss, the call it belongs to, and what else a training loop may decide by."""
    engine = toy.engine(world_size, micro_batches, "sgd", ddg)
    data = toy.batches(calls * micro_batches)
    seen = []
    for t in range(calls):
        time.sleep(0.01 * (rank == t % world_size))  # nobody's pace may show in what the ranks see
        loss = engine.train_batch(data)
        assert loss.dim() == 0
        assert not loss.requires_grad
        counts = engine.global_steps, engine.global_samples, tuple(engine.get_lr())
        seen.append((float(loss), engine.loss_step, *counts))
    return seen


@pytest.mark.parametrize("loss", ["delayed", "exact"])
@pytest.mark.parametrize(("micro_batches", "slack", "delay"), [(1, 0, 2), (1, 1, 4), (2, 0, 1), (4, 1, 1)])
def test_every_rank_sees_the_same(ranks: GetRanks, micro_batches: int, slack: int, delay: int, loss: str) -> None:
    """The mean loss of call t - L (until there is one, of call 0), and counts that go by calls."""
    calls = 8
    oracle = toy.reference(3, micro_batches=micro_batches, slack=slack)
    data = toy.batches(calls * micro_batches)
    losses = [float(oracle.train_batch(data)) for _ in range(calls)]
    expected = []
    for t in range(calls):
        known = t if loss == "exact" else max(t - delay, 0)
        expected.append((losses[known], known, t + 1, (t + 1) * 4 * micro_batches, (0.01,)))
    assert ranks(3).run(observe, micro_batches, {"slack": slack, "loss": loss}, calls) == [expected] * 3


def drain_twice(rank: int, world_size: int) -> dict[str, Any]:
    engine = toy.engine(world_size, 2, "adam", {})
    engine.drain()  # nothing in flight yet

    def look() -> tuple[Any, ...]:
        steps = {float(state["step"]) for state in engine.optimizer.state.values()}
        return toy.state(engine.module), steps, engine.global_steps, engine.global_samples, engine.loss_step

    data = toy.batches(14)
    for _ in range(4):
        engine.train_batch(data)
    before = look()
    engine.drain()
    once = look()
    engine.drain()
    twice = look()
    for _ in range(3):
        engine.train_batch(data)
    return {"before": before, "once": once, "twice": twice, "later": toy.state(engine.module)}


def test_drain_steps_what_is_in_flight_and_no_counts(ranks: GetRanks) -> None:
    results = ranks(3).run(drain_twice)
    oracle = toy.reference(3, "adam", micro_batches=2)
    data = toy.batches(14)
    for _ in range(4):
        oracle.train_batch(data)
    oracle.drain()
    assert_equal_states([result["twice"][0] for result in results], oracle)
    for k, result in enumerate(results):
        before, once, twice = (result[moment] for moment in ("before", "once", "twice"))
        assert all(map(torch.equal, once[0], twice[0]))
        assert once[1:] == twice[1:]
        assert all(map(torch.equal, before[0], once[0])) == (k == 2), "only the last stage has nothing in flight"
        assert once[2:4] == before[2:4] == (4, 4 * 2 * 4)
        assert once[4] == 3, "a drain makes the last loss known"
    for _ in range(3):
        oracle.train_batch(data)
    assert_equal_states([result["later"] for result in results], oracle)


# -- the other schedule -----------------------------------------------------------------------------------------------

PHASES = (("ddg", 5), ("1f1b", 4), ("ddg", 5), ("1f1b", 2))


def switch(rank: int, world_size: int, micro_batches: int) -> tuple[list[tuple[float, int, int]], State]:
    engine = toy.engine(world_size, micro_batches, "sgd", {"weights": "stash"})
    data = toy.batches(16 * micro_batches)
    seen = []
    for name, calls in PHASES:
        engine.schedule = name
        assert engine.schedule == name
        for _ in range(calls):
            loss = float(engine.train_batch(data))
            seen.append((loss, engine.loss_step, engine.global_steps))
    engine.drain()
    return seen, toy.state(engine.module)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_switching_schedules_drains_first(ranks: GetRanks, micro_batches: int) -> None:
    oracle = toy.reference(3, micro_batches=micro_batches)
    data = toy.batches(16 * micro_batches)
    delays, lag = oracle.delays, -(-2 // micro_batches)
    losses: list[float] = []
    known = []
    for name, calls in PHASES:
        oracle.drain()
        oracle.delays = delays if name == "ddg" else [0] * 3  # plain accumulation
        last = len(losses) - 1
        for _ in range(calls):
            losses.append(float(oracle.train_batch(data)))
            t = len(losses) - 1
            known.append(t if name == "1f1b" else max(t - lag, last, 0))
    oracle.drain()
    results = ranks(3).run(switch, micro_batches)
    for seen, _ in results:
        assert seen == [(losses[call], call, t + 1) for t, call in enumerate(known)]
    assert_equal_states([state for _, state in results], oracle)


def no_such_schedule(rank: int, world_size: int) -> tuple[str, str]:
    engine = toy.engine(world_size, 1, "sgd", {})
    try:
        engine.schedule = "gpipe"
    except ValueError as error:
        return str(error), engine.schedule
    raise AssertionError("no error")


def test_unknown_schedule_is_refused(ranks: GetRanks) -> None:
    assert ranks(2).run(no_such_schedule) == [('schedule must be "ddg" or "1f1b", got \'gpipe\'', "ddg")] * 2


def begin_synchronously(rank: int, world_size: int) -> tuple[list[str], State]:
    engine = toy.engine(world_size, 2, "adamw", {"sync_steps": 3})
    data = toy.batches(16)
    names = []
    for _ in range(8):
        engine.train_batch(data)
        names.append(engine.schedule)
    engine.drain()
    return names, toy.state(engine.module)


def test_sync_steps(ranks: GetRanks) -> None:
    oracle = toy.reference(3, "adamw", micro_batches=2)
    delays, oracle.delays = oracle.delays, [0] * 3
    data = toy.batches(16)
    for t in range(8):
        if t == 3:
            oracle.delays = delays
        oracle.train_batch(data)
    oracle.drain()
    results = ranks(3).run(begin_synchronously)
    assert [names for names, _ in results] == [["1f1b"] * 3 + ["ddg"] * 5] * 3
    assert_equal_states([state for _, state in results], oracle)


# -- evaluation -------------------------------------------------------------------------------------------------------

EVALUATIONS = ((4, None), (7, 3), (1, 1))
"""Batch size and `num_micro_batches`."""


def train_and_evaluate(
    rank: int, world_size: int, ddg: dict[str, Any], evaluating: bool
) -> tuple[list[float], list[float], State]:
    engine = toy.engine(world_size, 2, "adam", ddg)
    data = toy.batches(12)
    losses, evaluations = [], []
    for t in range(6):
        losses.append(float(engine.train_batch(data)))
        if t == 4:
            engine.drain()
        for size, count in EVALUATIONS if evaluating else ():
            held_out = toy.batches(count or 2, size, seed=t)
            evaluations.append(float(engine.eval_batch(held_out, num_micro_batches=count)))
    engine.drain()
    return losses, evaluations, toy.state(engine.module)


@pytest.mark.parametrize("weights", ["stash", "current"])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_eval_batch_leaves_what_is_in_flight(ranks: GetRanks, weights: str, activations: str) -> None:
    """It shows the weights of the current call on all stages, also those that are older in a micro-batch in flight."""
    ddg = {"weights": weights, "activations": activations}
    oracle = toy.reference(3, "adam", micro_batches=2, **ddg)
    data = toy.batches(12)
    expected = []
    for t in range(6):
        oracle.train_batch(data)
        if t == 4:
            oracle.drain()
        for size, count in EVALUATIONS:
            expected.append(evaluate(oracle, toy.batches(count or 2, size, seed=t), count or 2))
    oracle.drain()
    with_eval = ranks(3).run(train_and_evaluate, ddg, True)
    without = ranks(3).run(train_and_evaluate, ddg, False)
    assert [losses for losses, _, _ in with_eval] == [losses for losses, _, _ in without]
    assert [evaluations for _, evaluations, _ in with_eval] == [expected] * 3
    assert_equal_states([state for *_, state in with_eval], oracle)
    assert_equal_states([state for *_, state in without], oracle)


# -- data -------------------------------------------------------------------------------------------------------------


def run_out_of_data(
    rank: int, world_size: int, numbers: list[int], directory: str
) -> tuple[list[Any], list[str], State]:
    """Train on loaders of so many micro-batches one after the other; drain and save after each."""
    engine = toy.engine(world_size, 2, "adam", {})
    seen: list[Any] = []
    for seed, number in enumerate(numbers):
        data = toy.batches(number, seed=seed)
        calls = 0
        while True:
            start = time.monotonic()
            try:
                engine.train_batch(data)
            except StopIteration:
                break
            calls += 1
        waited = time.monotonic() - start
        engine.drain()
        engine.save_checkpoint(directory, tag=f"after{seed}")
        seen.append((calls, engine.global_steps, waited < 5))
    return seen, sorted(path.name for path in Path(directory, "after0").iterdir()), toy.state(engine.module)


@pytest.mark.parametrize("numbers", [[5, 6, 1, 4], [1, 7], [0, 2, 3]], ids=str)
def test_end_of_data(ranks: GetRanks, tmp_path: Path, numbers: list[int]) -> None:
    """Every rank stops, also at a loader too short for one call; nothing of it is trained on, and training goes on."""
    oracle = toy.reference(3, "adam", micro_batches=2)
    for seed, number in enumerate(numbers):
        data = toy.batches(number, seed=seed)
        for _ in range(number // 2):
            oracle.train_batch(data)
        oracle.drain()
    results = ranks(3).run(run_out_of_data, numbers, str(tmp_path), timeout=60)
    calls = [number // 2 for number in numbers]
    expected = [(count, sum(calls[: i + 1]), True) for i, count in enumerate(calls)]
    assert [seen for seen, *_ in results] == [expected] * 3
    for _, files, _ in results:
        assert [name for name in files if name.startswith("mp_rank")] == [
            f"mp_rank_0{k}_model_states.pt" for k in range(3)
        ]
    assert_equal_states([state for *_, state in results], oracle)


class Counting:
    """Counts what is pulled."""

    def __init__(self, data: Iterator[Any]) -> None:
        self.data = data
        self.pulled = 0

    def __iter__(self) -> Counting:
        return self

    def __next__(self) -> Any:
        self.pulled += 1
        return next(self.data)


def count_pulls(rank: int, world_size: int, micro_batches: int, name: str) -> list[int]:
    engine = toy.engine(world_size, micro_batches, "sgd", {})
    engine.schedule = name
    data = Counting(toy.batches(100))
    pulls = []
    for _ in range(4):
        engine.train_batch(data)
        pulls.append(data.pulled)
    engine.drain()
    engine.eval_batch(data)
    engine.eval_batch(data, num_micro_batches=5)
    return [*pulls, data.pulled]


@pytest.mark.parametrize("schedule", ["ddg", "1f1b"])
def test_each_call_pulls_its_micro_batches_and_no_more(ranks: GetRanks, schedule: str) -> None:
    expected = [3, 6, 9, 12, 12 + 3 + 5]
    assert ranks(3).run(count_pulls, 3, schedule) == [expected, [0] * 5, expected]


def without_dropout(net: list[nn.Module]) -> list[nn.Module]:
    """A data loader draws random numbers where it is iterated over, so the oracle's dropout would be another."""
    for module in nn.ModuleList(net).modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


def train_on_a_data_set(rank: int, world_size: int) -> tuple[list[float], State]:
    import deepspeed.pipe

    import ds_ddg

    net = deepspeed.pipe.PipelineModule(
        without_dropout(toy.layers()), num_stages=world_size, loss_fn=toy.loss_fn, partition_method="uniform"
    )
    images, labels = (torch.cat(parts) for parts in zip(*toy.batches(6), strict=True))
    engine, optimizer, _, scheduler = ds_ddg.initialize(
        model=net,
        config=toy.config(2),
        optimizer=toy.OPTIMIZERS["sgd"],
        model_parameters=net.parameters(),
        training_data=torch.utils.data.TensorDataset(images, labels),
    )
    assert isinstance(engine, ds_ddg.DDGEngine)
    assert isinstance(engine, deepspeed.PipelineEngine)
    assert optimizer is engine.optimizer
    assert scheduler is None
    losses = [float(engine.train_batch()) for _ in range(5)]
    engine.drain()
    return losses, toy.state(engine.module)


def test_training_data_from_initialize(ranks: GetRanks) -> None:
    """DeepSpeed's loader, which starts over at the end of the data."""
    oracle = toy.reference(3, micro_batches=2)
    without_dropout(oracle.stages)
    data = (batch for _ in range(2) for batch in toy.batches(6))
    losses = [float(oracle.train_batch(data)) for _ in range(5)]
    oracle.drain()
    results = ranks(3).run(train_on_a_data_set)
    assert [got for got, _ in results] == [[losses[max(t - 1, 0)] for t in range(5)]] * 3
    assert_equal_states([state for _, state in results], oracle)


# -- what is left of DeepSpeed ----------------------------------------------------------------------------------------


def initialize_and_fail(rank: int, world_size: int) -> list[bool]:
    import deepspeed
    from deepspeed.runtime.pipe.engine import PipelineEngine

    def as_it_was() -> bool:
        return deepspeed.PipelineEngine is PipelineEngine and vars(PipelineEngine) == attributes

    attributes = dict(vars(PipelineEngine))
    engine = toy.engine(world_size, 1, "sgd", {})
    found = [isinstance(engine, PipelineEngine), as_it_was()]
    for ddg in ({"slak": 1}, {"slack": -1}):
        with pytest.raises(ValueError, match=next(iter(ddg))):
            toy.engine(world_size, 1, "sgd", ddg)
        found.append(as_it_was())
    own = toy.engine(world_size, 1, "sgd", initialize=deepspeed.initialize)
    return [*found, type(own) is PipelineEngine]


def test_deepspeed_stays_as_it_was(ranks: GetRanks) -> None:
    """After `initialize`, also after one that fails."""
    assert ranks(2).run(initialize_and_fail) == [[True] * 5] * 2


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import ds_ddg, sys; print(sorted({'torch', 'deepspeed', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]", done.stdout


def drain_without_grad(rank: int, world_size: int, drains_plainly: bool) -> list[torch.Tensor]:
    engine = toy.engine(world_size, 1, ddg={"activations": "recompute"})
    data = toy.batches(4)
    for _ in range(4):
        engine.train_batch(data)
    with torch.set_grad_enabled(drains_plainly):
        engine.drain()
    return toy.state(engine.module)


def test_drain_may_be_called_from_evaluation_code(ranks: GetRanks) -> None:
    """Whoever evaluates under ``no_grad`` drains there too, and the backward passes in flight still need a graph."""
    pairs = zip(ranks(3).run(drain_without_grad, True), ranks(3).run(drain_without_grad, False), strict=True)
    for plain, without in pairs:
        assert all(torch.equal(a, b) for a, b in zip(plain, without, strict=True))
