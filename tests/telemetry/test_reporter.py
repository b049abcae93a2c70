"""What an engine reports: additional losses and the values of monitors, each with the samples of its call."""

from __future__ import annotations

import contextlib
import io
import re
import time
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor

from helpers import toy
from helpers.distributed import GetRanks
from helpers.modes import DEFAULT
from helpers.monitors import recorded

# The oracle steps schedulers in warm-up calls too, as the engine does.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before:UserWarning"),
    pytest.mark.usefixtures("one_thread"),
]


# -- additional losses ------------------------------------------------------------------------------------------------


class WithExtras(PipelineModule):  # type: ignore[misc]
    """A pipeline whose loss_fn leaves two more values."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.extras = {"aux": torch.zeros(()), "z": torch.zeros(())}
        super().__init__(*args, loss_fn=self.loss_with_extras, **kwargs)

    def loss_with_extras(self, outputs: Tensor, labels: Tensor) -> Tensor:
        self.extras = extras_of(outputs)
        return toy.loss_fn(outputs, labels) + 0.1 * self.extras["aux"]

    def get_additional_losses(self) -> dict[str, Tensor]:
        return self.extras


def extras_of(outputs: Tensor) -> dict[str, Tensor]:
    return {"aux": outputs.square().mean(), "z": outputs.logsumexp(-1).mean()}


def engine_with_extras(num_stages: int, micro_batches: int, lr: float, ddg: dict[str, Any] | None, **more: Any) -> Any:
    import ds_ddg

    net = WithExtras(toy.layers(), num_stages=num_stages, partition_method="uniform")
    torch.manual_seed(11)
    engine, *_ = (deepspeed.initialize if ddg is None else ds_ddg.initialize)(
        model=net,
        config=toy.config(micro_batches, ddg, **more),
        optimizer=lambda p: torch.optim.SGD(p, lr=lr),
        model_parameters=net.parameters(),
    )
    return engine


def report(engine: Any) -> tuple[float, dict[str, float]]:
    return float(engine.agg_train_loss), {k: float(v) for k, v in engine.get_additional_losses().items()}


def train_with_extras(
    rank: int, world_size: int, num_stages: int, micro_batches: int, lr: float, ddg: dict[str, Any] | None
) -> list[tuple[int, float, dict[str, float]]]:
    engine = engine_with_extras(num_stages, micro_batches, lr, ddg)
    data = toy.batches(7 * micro_batches, seed=rank // num_stages)
    seen = []
    for t in range(7):
        loss = float(engine.train_batch(data))
        assert loss == report(engine)[0]
        seen.append((t if ddg is None else engine.loss_step, *report(engine)))
    if ddg is not None:
        engine.drain()
        seen.append((engine.loss_step, *report(engine)))
    return seen


@pytest.mark.parametrize(("num_stages", "micro_batches", "loss"), [(3, 1, "delayed"), (2, 2, "exact")])
@pytest.mark.proves("additional losses", modes=DEFAULT)
def test_additional_losses_are_those_of_the_same_call(
    ranks: GetRanks, num_stages: int, micro_batches: int, loss: str
) -> None:
    """On every rank; with a learning rate of 0 each call has DeepSpeed's own numbers, data-parallel replicas too."""
    world = {3: 3, 2: 4}[num_stages]
    ours = ranks(world).run(train_with_extras, num_stages, micro_batches, 0.0, {"loss": loss})
    theirs = ranks(world).run(train_with_extras, num_stages, micro_batches, 0.0, None)[0]
    lag = -(-(num_stages - 1) // micro_batches) if loss == "delayed" else 0
    assert ours == [[theirs[max(t - lag, 0)] for t in range(7)] + [theirs[6]]] * world


def test_additional_losses_of_changing_weights(ranks: GetRanks) -> None:
    oracle = toy.reference(3, micro_batches=2)
    for optimizer in oracle.optimizers:
        optimizer.param_groups[0].update(lr=0.05, momentum=0, weight_decay=0)
    totals: dict[str, Tensor] = {}

    def loss_fn(outputs: Tensor, labels: Tensor) -> Tensor:
        extras = extras_of(outputs)
        for name, value in extras.items():
            totals[name] = totals.get(name, torch.zeros(())) + value.detach()
        return toy.loss_fn(outputs, labels) + 0.1 * extras["aux"]

    oracle.loss_fn = loss_fn
    data = toy.batches(14, seed=0)
    expected = []
    for t in range(7):
        loss = float(oracle.train_batch(data))
        expected.append((t, loss, {name: float(value / 2) for name, value in totals.items()}))
        totals.clear()
    ours = ranks(3).run(train_with_extras, 3, 2, 0.05, {})
    assert ours == [[expected[max(t - 1, 0)] for t in range(7)] + [expected[6]]] * 3


# -- monitors ---------------------------------------------------------------------------------------------------------

PHASES = (("ddg", 5), ("1f1b", 2), ("ddg", 4))


def train_with_monitor(rank: int, world_size: int, directory: str, period: int | None) -> list[float]:
    csv_file, board = ({"enabled": True, "output_path": directory, "job_name": name} for name in ("job", "board"))
    monitors = {"csv_monitor": csv_file, "tensorboard": board}
    engine = toy.engine(world_size, 2, "sgd", {}, lr_scheduler=toy.decay, steps_per_print=period, **monitors)
    data = toy.batches(22)
    evaluations = []
    for name, calls in PHASES:
        engine.schedule = name
        for _ in range(calls):
            engine.train_batch(data)
        evaluations.append(float(engine.eval_batch(toy.batches(2))))
        engine.eval_batch(toy.batches(2), compute_loss=False)
        engine.eval_batch(toy.batches(2), reduce_output=None, bcast_loss=False)
    engine.drain()
    assert engine.monitor.enabled
    return evaluations


def on_board(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows, under the names of the CSV files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(directory / "board")).Reload()
    tags = board.Tags()["scalars"]
    return {tag.replace("/", "_"): [(event.step, event.value) for event in board.Scalars(tag)] for tag in tags}


def replay(stage: int, calls: int, micro_batches: int = 2) -> list[tuple[int, int, int]]:
    """Staleness, micro-batches in flight and weight versions after each call, from an empty pipeline on."""
    delay, version, flight, found = 2 - stage, 0, [], []
    for _ in range(calls):
        arrived = 0
        for _ in range(micro_batches):
            flight.append(version)
            if len(flight) > delay:
                flight.pop(0)
                arrived += 1
        version += arrived > 0
        found.append((version - flight[0] if flight else 0, len(flight), len({version, *flight})))
    return found


@pytest.mark.parametrize("period", [None, 2])
@pytest.mark.proves("monitors (CSV, TensorBoard), values with the samples of their call", modes=DEFAULT)
def test_monitor_gets_every_value_once_at_its_calls_samples(
    ranks: GetRanks, tmp_path: Path, period: int | None
) -> None:
    oracle = toy.reference(3, micro_batches=2)
    oracle.schedulers = [toy.decay(optimizer) for optimizer in oracle.optimizers]
    delays, data = oracle.delays, toy.batches(22)
    losses, rates = [], []
    for name, calls in PHASES:
        oracle.drain()
        oracle.delays = delays if name == "ddg" else [0] * 3
        for _ in range(calls):
            losses.append(float(oracle.train_batch(data)))
            rates.append(oracle.schedulers[0].get_last_lr()[0])
    evaluations, *_ = ranks(3).run(train_with_monitor, str(tmp_path), period)
    found = recorded(tmp_path)
    shown = on_board(tmp_path)
    assert shown.keys() == found.keys()
    for name, values in found.items():
        assert shown[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in values], name
    samples = [8 * (t + 1) for t in range(11)]
    assert found.pop("Train_Samples_train_loss") == list(zip(samples, losses, strict=True))
    assert found.pop("Train_Samples_lr") == list(zip(samples, rates, strict=True))
    assert found.pop("Train_Samples_eval_loss") == list(zip([40, 56, 88], evaluations, strict=True))
    for stage in range(3):
        # What the last call before a drain leaves in flight, nobody carries.
        phases = ((replay(stage, 5)[:-1], samples[:4]), (replay(stage, 4)[:-1], samples[7:]))
        rows = [(step, *row) for values, steps in phases for row, step in zip(values, steps, strict=False)]
        rows = [row for row in rows if row[0] // 8 % (period or 1) == 0]
        for i, name in enumerate(("staleness", "micro_batches_in_flight", "weight_versions"), 1):
            assert found.pop(f"Train_DDG_stage{stage}_{name}") == [(row[0], row[i]) for row in rows], name
        busy = found.pop(f"Train_DDG_stage{stage}_busy")
        assert [step for step, _ in busy] == [row[0] for row in rows]
        assert all(0 <= share <= 1 for _, share in busy)
    assert found == {}


# -- what is printed --------------------------------------------------------------------------------------------------


def train_and_print(rank: int, world_size: int) -> tuple[str, list[float]]:
    engine = engine_with_extras(world_size, 1, 0.0, {}, steps_per_print=2, wall_clock_breakdown=True)
    data = toy.batches(40, seed=0)
    text, seconds = io.StringIO(), []
    with contextlib.redirect_stdout(text):
        for name, calls in (("ddg", 5), ("1f1b", 4), ("ddg", 3)):
            engine.schedule = name
            for _ in range(calls):
                start = time.perf_counter()
                engine.train_batch(data)
                seconds.append(time.perf_counter() - start)
        engine.drain()
    return text.getvalue(), seconds


def test_printed_lines_say_which_call_a_loss_belongs_to(ranks: GetRanks) -> None:
    """By the number that `engine.loss_step` has for it. With a learning rate of 0 the losses are DeepSpeed's own."""
    (text, seconds), *others = ranks(3).run(train_and_print)
    losses = {t: (loss, extra) for t, loss, extra in ranks(3).run(train_with_extras, 3, 1, 0.0, None)[0]}
    pattern = r"steps: (\d+) loss: ([\d.]+)(?: \(of call (\d+), counted from 0\))? aux: ([\d.]+) z: ([\d.]+)"
    pattern += r" +iter time \(s\): ([\d.]+) samples/sec: ([\d.]+)"
    lines = re.findall(pattern, text)
    assert [(line[0], line[2]) for line in lines] == [
        ("2", "0"), ("4", "1"), ("6", ""), ("8", ""), ("10", "8"), ("12", "9")
    ]  # fmt: skip
    for steps, loss, of, aux, z, duration, rate in lines[:3]:
        expected, extras = losses[int(of) if of else int(steps) - 1]
        assert (loss, aux, z) == (f"{expected:.4f}", f"{extras['aux']:.4f}", f"{extras['z']:.4f}")
        mean = sum(seconds[int(steps) - 2 : int(steps)]) / 2
        assert 0.2 * mean - 0.001 < float(duration) < mean + 0.001
        assert float(duration) - 0.001 < 4 / float(rate) < float(duration) + 0.001
    assert text.count("step_microstep") == 6, "DeepSpeed's own breakdown, once a line, and none for the drains"
    waits = re.findall(r"pipe_recv_grad: ([\d.]+) \| recv_loss: ([\d.]+)", text)
    assert len(waits) == 4
    assert sum(float(ms) for pair in waits for ms in pair) <= 1000 * sum(seconds)
    assert not any(re.search(pattern, other) for other, _ in others)
