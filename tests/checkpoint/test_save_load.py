"""Checkpoints: DeepSpeed's files, read by DeepSpeed and the other way round; training resumes to the last bit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor

from helpers import toy
from helpers.distributed import GetRanks
from helpers.modes import DEFAULT
from helpers.resuming import (
    WARMUP,
    assert_resumed,
    assert_same,
    engine,
    go_on,
    same,
    skip,
    snapshot,
    start_elsewhere,
    train,
    zero_engine,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# -- resuming ---------------------------------------------------------------------------------------------------------

FORMS = tuple(itertools.product((1, 4), ("stash", "current"), ("sgd", "adamw")))


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.proves("resuming from a checkpoint", modes=[("stash", "keep"), ("current", "keep")])
def test_training_resumes_bit_for_bit(ranks: GetRanks, tmp_path: Path, num_stages: int) -> None:
    """Weights, optimizer, losses, learning rate and counts; dropout too, as the random state is the user's to keep."""
    assert_resumed(ranks(num_stages).run(go_on, str(tmp_path), num_stages, FORMS, {}, timeout=120), len(FORMS))


def test_training_resumes_with_other_settings(ranks: GetRanks, tmp_path: Path) -> None:
    forms = ((2, "stash", "adamw"),)
    ddg = ({"activations": "recompute"}, {"slack": 1}, {"loss": "exact"}, {"sync_steps": 1})
    for i, settings in enumerate(ddg):
        assert_resumed(ranks(3).run(go_on, str(tmp_path / str(i)), 3, forms, settings), 1)


def go_on_with_replicas(rank: int, world_size: int, directory: str) -> list[Any]:
    # One file holds the state of both replicas of a stage; they draw the same random numbers anyway.
    return go_on(rank, world_size, directory, 2, ((2, "stash", "adamw"),), {})


def test_training_resumes_with_data_parallel_replicas(ranks: GetRanks, tmp_path: Path) -> None:
    assert_resumed(ranks(4).run(go_on_with_replicas, str(tmp_path)), 1)


def go_on_with_zero(rank: int, world_size: int, directory: str) -> list[tuple[list[Any], list[Tensor]]]:
    found = []
    for weights in ("stash", "current"):
        a, b = zero_engine(2, weights), zero_engine(2, weights)
        data = toy.batches(18, seed=rank // 2)
        train(a, data, 5)
        a.save_checkpoint(directory, tag=weights, client_state={"rng": torch.get_rng_state()})
        found.append((train(a, data, 4), toy.state(a.module)))
        start_elsewhere(b)
        train(b, toy.batches(18, seed=99), 3)
        _, state = b.load_checkpoint(directory, tag=weights)
        torch.set_rng_state(state["rng"].cpu())
        found.append((train(b, skip(toy.batches(18, seed=rank // 2), 10), 4), toy.state(b.module)))
        a.drain()
        b.drain()
    return found


@pytest.mark.proves("resuming with ZeRO-1 and bf16", modes=[("stash", "keep"), ("current", "keep")])
def test_training_resumes_with_zero_and_bf16(ranks: GetRanks, tmp_path: Path) -> None:
    """There the optimizer owns the weights: what is loaded reaches its buffers and the forward's copies of them."""
    for found in ranks(4).run(go_on_with_zero, str(tmp_path)):
        for (ours, weights), (theirs, loaded) in zip(found[::2], found[1::2], strict=True):
            assert ours == theirs
            assert same(weights, loaded)


def resume_into(rank: int, world_size: int, directory: str) -> tuple[list[str], list[Any], Any]:
    """A checkpoint of step 5 in an engine that begins with 3 calls of 1F1B, and one of step 1."""
    names = []
    seen = []
    for steps in (5, 1):
        a = engine(world_size, 2, "sgd", {"sync_steps": 3})
        train(a, toy.batches(10), steps)
        a.save_checkpoint(directory, tag=str(steps))
        b = engine(world_size, 2, "sgd", {"sync_steps": 3})
        b.load_checkpoint(directory, tag=str(steps))
        for _ in range(4):
            seen.extend(train(b, toy.batches(2), 1))
            names.append(b.schedule)
        b.drain()
    return names, [row[2] for row in seen], b.loss_step


def test_sync_steps_count_from_the_beginning_of_training(ranks: GetRanks, tmp_path: Path) -> None:
    expected = ["ddg"] * 4 + ["1f1b"] * 2 + ["ddg"] * 2, [6, 7, 8, 9, 2, 3, 4, 5], 4
    assert ranks(2).run(resume_into, str(tmp_path)) == [expected] * 2


# -- DeepSpeed's own engine -------------------------------------------------------------------------------------------


def exchange(rank: int, world_size: int, directory: str, optimizer: str) -> dict[str, Any]:
    """Each engine saves what the other loads; then both train in the same way, with dropout, at the same steps."""
    found: dict[str, Any] = {}
    for name, writes, reads in (("ours", {}, None), ("theirs", None, {})):
        writer = engine(world_size, 2, optimizer, writes)
        train_data = toy.batches(20)
        for _ in range(5):
            writer.train_batch(train_data)
        writer.save_checkpoint(directory, tag=name, client_state={"epoch": 3})
        reader = engine(world_size, 2, optimizer, reads)
        start_elsewhere(reader)
        _, state = reader.load_checkpoint(directory, tag=name)
        assert state["epoch"] == 3
        found[name] = {"written": snapshot(writer), "read": snapshot(reader)}
        (writer if reads is None else reader).schedule = "1f1b"
        for moment, each in (("wrote_on", writer), ("read_on", reader)):
            torch.manual_seed(5)
            data = toy.batches(6, seed=8)
            losses = [float(each.train_batch(data)) for _ in range(3)]
            found[name][moment] = {**snapshot(each), "losses": losses}
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.proves("checkpoints to DeepSpeed's engine and back", modes=DEFAULT)
def test_checkpoints_go_to_deepspeed_and_back(ranks: GetRanks, tmp_path: Path, optimizer: str) -> None:
    for found in ranks(3).run(exchange, str(tmp_path), optimizer):
        for pair in found.values():
            assert pair["written"]["counts"][:2] == (5, 40)
            assert_same(pair["read"], pair["written"])
            assert_same(pair["read_on"], pair["wrote_on"])
    ours, theirs = (sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("ours", "theirs"))
    assert ours == theirs
    assert [name for name in ours if name.startswith("mp_rank")] == [f"mp_rank_0{k}_model_states.pt" for k in range(3)]
    assert "layer_00-model_states.pt" in ours
    assert (tmp_path / "latest").read_text() == "theirs"


def go_on_from_deepspeeds(rank: int, world_size: int, directory: str) -> tuple[list[Any], list[Tensor], float]:
    """An engine that had losses of its own before it loads a checkpoint that knows none."""
    writer = engine(world_size, 1, "sgd", None)
    data = toy.batches(9)
    for _ in range(4):
        writer.train_batch(data)
    writer.save_checkpoint(directory)
    reader = engine(world_size, 1, "sgd", {})
    train(reader, toy.batches(3, seed=99), 3)
    reader.load_checkpoint(directory)
    torch.manual_seed(5)
    seen = train(reader, data, 5)
    reader.drain()
    return seen, toy.state(reader.module), reader.loss_step


def test_delayed_training_resumes_deepspeeds_checkpoint(ranks: GetRanks, tmp_path: Path) -> None:
    """No loss of the time before is passed off as one of this training; the rest is the oracle's."""
    oracle = toy.reference(3)
    oracle.delays, delays = [0] * 3, oracle.delays
    schedulers = [deepspeed.runtime.lr_schedules.WarmupLR(optimizer, **WARMUP) for optimizer in oracle.optimizers]
    oracle.schedulers = schedulers
    data = toy.batches(9)
    for _ in range(4):
        oracle.train_batch(data)
    oracle.delays = delays
    torch.manual_seed(5)
    oracle.rng = [torch.get_rng_state() for _ in range(3)]
    losses = [float(oracle.train_batch(data)) for _ in range(5)]
    oracle.drain()
    results = ranks(3).run(go_on_from_deepspeeds, str(tmp_path))
    for (seen, state, last), stage in zip(results, oracle.stages, strict=True):
        known = [max(t - 2, 0) for t in range(5)]
        assert [row[:3] for row in seen] == [(losses[i], 4 + i, 5 + t) for t, i in enumerate(known)]
        assert last == 8
        assert same(state, toy.state(stage))


# -- parts of a checkpoint --------------------------------------------------------------------------------------------


def load_parts(rank: int, world_size: int, directory: str) -> dict[str, Any]:
    writer = engine(world_size, 2, "adamw", {})
    train(writer, toy.batches(10), 5)
    writer.save_checkpoint(directory, tag="parts")
    found = {"saved": snapshot(writer)}
    for name, arguments in {
        "module": {"load_module_only": True},
        "no scheduler": {"load_lr_scheduler_states": False},
        "no optimizer": {"load_optimizer_states": False},
    }.items():
        reader = engine(world_size, 2, "adamw", {})
        start_elsewhere(reader)
        train(reader, toy.batches(10, seed=99), 3)
        reader.drain()
        before = snapshot(reader), reader.loss_step
        reader.load_checkpoint(directory, tag="parts", **arguments)
        found[name] = *before, snapshot(reader), reader.loss_step
    assert reader.load_checkpoint(directory + "/nowhere") == (None, None)
    return found


def test_parts_of_a_checkpoint(ranks: GetRanks, tmp_path: Path) -> None:
    """What is not asked for stays as it was."""
    for found in ranks(3).run(load_parts, str(tmp_path)):
        saved = found["saved"]
        before, step, after, step_after = found["module"]
        assert_same(after, saved, "weights")
        assert_same(after, before, "optimizer", "groups", "scheduler", "counts")
        assert step_after == step == 2
        before, _, after, step_after = found["no scheduler"]
        assert_same(after, saved, "weights", "optimizer")
        assert_same(after, before, "scheduler")
        assert after["counts"][:2] == saved["counts"][:2] == (5, 40)
        assert step_after == 4
        before, _, after, step_after = found["no optimizer"]
        assert_same(after, saved, "weights", "scheduler")
        assert_same(after, before, "optimizer")
        assert after["counts"][:2] == (5, 40)


def warm_start(rank: int, world_size: int, directory: str) -> tuple[list[Any], list[Tensor], list[Tensor]]:
    writer = engine(world_size, 1, "sgd", {})
    train(writer, toy.batches(4), 4)
    writer.save_checkpoint(directory)
    reader = engine(world_size, 1, "sgd", {})
    start_elsewhere(reader)
    reader.load_checkpoint(directory, load_module_only=True)
    torch.manual_seed(11)
    seen = train(reader, toy.batches(5, seed=8), 5)
    reader.drain()
    return seen, toy.state(writer.module), toy.state(reader.module)


def test_training_from_loaded_weights_alone(ranks: GetRanks, tmp_path: Path) -> None:
    """The delayed backward passes see the loaded weights, whatever the engine's own had been."""
    results = ranks(3).run(warm_start, str(tmp_path))
    oracle = toy.reference(3)
    oracle.schedulers = [deepspeed.runtime.lr_schedules.WarmupLR(o, **WARMUP) for o in oracle.optimizers]
    for (_, weights, _), stage in zip(results, oracle.stages, strict=True):
        with torch.no_grad():
            for tensor, weight in zip((*stage.parameters(), *stage.buffers()), weights, strict=True):
                tensor.copy_(weight)
    data = toy.batches(5, seed=8)
    losses = [float(oracle.train_batch(data)) for _ in range(5)]
    oracle.drain()
    for (seen, _, state), stage in zip(results, oracle.stages, strict=True):
        assert [row[:3] for row in seen] == [(losses[max(t - 2, 0)], max(t - 2, 0), t + 1) for t in range(5)]
        assert same(state, toy.state(stage))
