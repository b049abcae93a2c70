"""Whatever goes wrong on one rank, every rank ends its call soon, with an error that says where it went wrong.

    refused    set-ups that cannot be trained exactly: the same error on every rank, before training
    told       a stage fails and lives on: the others learn it from messages alone
    lost       a stage is gone without a word: the others learn it from the broken connection
    launched   both, and clean ends, as a user sees them: the `deepspeed` launcher and a script

In "told" every rank catches its error and stays, so that no rank can rely on a dying process to be woken up.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER
from torch import Tensor, nn

import ds_ddg
from helpers import toy
from helpers.distributed import GetRanks, Outcome
from helpers.failing import (
    BAD_BATCH,
    BAD_CALL,
    MICRO_BATCHES,
    SIZE,
    SOON,
    WIDTH,
    End,
    Misbehaves,
    assert_told,
    batches,
    build,
    catch,
    config,
    die_later,
    explode,
    train,
    train_bad_loss,
)
from helpers.script_runs import NOISE, launch

Batch = tuple[Any, Any]

TIMEOUT = 60.0


# -- models and data that misbehave -----------------------------------------------------------------------------------


def misbehaving(
    num_stages: int, stage: int, deed: str, other: str = "", ddg: dict[str, Any] | None = None, **options: Any
) -> Any:
    """An engine whose `stage` does its `deed` in its last layer, and all others do `other` in theirs."""
    layers = [Misbehaves() for _ in range(2 * num_stages)]
    for k in range(num_stages):
        layers[2 * k + 1] = Misbehaves(deed if k == stage else other, **options)
    return build(num_stages, layers, **({} if ddg is None else {"ddg": ddg}))


# -- refused ----------------------------------------------------------------------------------------------------------


REFUSALS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "unknown key": ({"ddg": {"slak": 1}}, "ValueError", ["'slak'", "slack, clip"]),
    "wrong type": ({"ddg": {"slack": "1"}}, "ValueError", ['"slack"', "'1'", "integer"]),
    "global clip where the optimizer clips": (
        {"ddg": {"clip": "global"}, "fp16": {"enabled": True}, "optimizer": {"type": "Lamb"}},
        "ValueError",
        ['"clip": "global" with fp16 and Lamb', '"stage"'],
    ),
    "DeepSpeed's schedule first, in fp16": (
        {"ddg": {"sync_steps": 2}, "fp16": {"enabled": True}},
        "ValueError",
        ["1F1B between calls of DDG in fp16", '"enabled": false'],
    ),
    "no block": ({"ddg": [1]}, "ValueError", ['"ddg" must be a block', "[1]"]),
    "several": ({"ddg": {"slak": 1, "weights": 0}}, "ValueError", ["'slak'", '"weights"']),
    "ZeRO-1 offload": (
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
        "ValueError",
        ["offload_optimizer", "remove"],
    ),
    "ZeRO-2": ({"zero_optimization": {"stage": 2}}, "ValueError", ["ZeRO stage 2"]),
    "ZeRO-2 on DeepSpeed's schedule": (
        {"zero_optimization": {"stage": 2}, "ddg": {"enabled": False}},
        "ValueError",
        ["DeepSpeed's schedule cannot train this set-up", "ZeRO stage 2"],
    ),
    "lines every 0 calls": ({"steps_per_print": 0}, "ValueError", ['"steps_per_print": 0', "1 or more"]),
    "lines every 0 calls of DeepSpeed's schedule": (
        {"steps_per_print": 0, "ddg": {"enabled": False}},
        "ValueError",
        ['"steps_per_print": 0', "1 or more"],
    ),
    "lines every word": ({"steps_per_print": "ten"}, "ValueError", ["\"steps_per_print\": 'ten'"]),
    "a breakdown without lines": (
        {"steps_per_print": None, "wall_clock_breakdown": True},
        "ValueError",
        ['"wall_clock_breakdown" without "steps_per_print"'],
    ),
    "ZeRO-3": ({"zero_optimization": {"stage": 3}}, "ValueError", ["ZeRO stage 3"]),
    "fp16 on CPU": ({"fp16": {"enabled": True}}, "ValueError", ["fp16", "not supported on your device"]),
    "autocast in fp16": (
        {"torch_autocast": {"enabled": True, "dtype": "float16"}},
        "ValueError",
        ["torch_autocast", "bfloat16"],
    ),
    "checkpointing with current and keep": (
        {
            "module": {"activation_checkpoint_interval": 1},
            "ddg": {"weights": "current", "activations": "keep"},
        },
        "ValueError",
        ["activation checkpointing", "recompute"],
    ),
    "an optimizer that runs the model itself": (
        {"optimizer": {"type": "LBFGS", "params": {}}},
        "ValueError",
        ["LBFGS needs a closure", "AdamW"],
    ),
    "a scheduler that goes by a metric": (
        {"scheduler": {"type": "ReduceLROnPlateau", "params": {}}},
        "ValueError",
        ["ReduceLROnPlateau needs a metric", "batch size"],
    ),
    "weights of two stages": (
        {"layers": [0, 1, 0, 2]},
        "ValueError",
        ["layers [0, 2] share weights", "on stages [0, 1]", "TiedLayerSpec"],
    ),
    "fewer layers than stages": ({"layers": [0]}, "ValueError", ["2 stages for 1 layers"]),
    "more stages than ranks": ({"num_stages": 3}, "", []),
}


def initialize_badly(rank: int, world_size: int, what: str) -> tuple[End, bool]:
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.pipe.engine import PipelineEngine

    settings = {"num_stages": 2, **REFUSALS[what][0]}
    if "layers" in settings:
        modules = [Misbehaves() for _ in range(3)]
        settings["layers"] = [modules[index] for index in settings["layers"]]
    with pytest.MonkeyPatch.context() as patch:  # some CPUs have fp16
        patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)
        end = catch(lambda: build(**settings))
    return end, deepspeed.PipelineEngine is PipelineEngine


REMEDIES = {
    "global clip where the optimizer clips": (
        '"clip": "global" in fp16 without ZeRO-1 with `Lamb` or `legacy_fusion`',
        '"clip": "stage", ZeRO-1',
    ),
    "DeepSpeed's schedule first, in fp16": (
        "`sync_steps` or switching to 1F1B in fp16",
        '"enabled": false in a run of its own',
    ),
    "an optimizer that runs the model itself": ("optimizers that need a closure (LBFGS)", "any other"),
    "a scheduler that goes by a metric": (
        "schedulers that need a metric (ReduceLROnPlateau)",
        "one that goes by calls",
    ),
    "weights of two stages": ("a layer's weights in layers of two stages, without `TiedLayerSpec`", "`TiedLayerSpec`"),
    "ZeRO-1 offload": ("ZeRO's `offload_optimizer`", "ZeRO-1 without it"),
    "ZeRO-2": ("ZeRO stage 2", "stage 0 or 1; no pipeline of DeepSpeed's can run it"),
    "ZeRO-3": ("ZeRO stage 3", "stage 0 or 1; no pipeline of DeepSpeed's can run it"),
    "fp16 on CPU": ("fp16 on a CPU without instructions for it (by DeepSpeed)", "bf16"),
    "autocast in fp16": ("`torch_autocast` in float16", "bfloat16"),
    "checkpointing with current and keep": (
        'activation checkpointing with "weights": "current" and "activations": "keep"',
        '"stash" or "recompute"',
    ),
}
"""What the support matrix says of them."""


def refusals() -> list[Any]:
    return [
        pytest.param(what, marks=pytest.mark.refuses(*REMEDIES[what]) if what in REMEDIES else ()) for what in REFUSALS
    ]


@pytest.mark.parametrize("what", refusals())
def test_refuses_on_every_rank(ranks: GetRanks, what: str) -> None:
    _, kind, parts = REFUSALS[what]
    for end, restored in ranks(2).run(initialize_badly, what, timeout=TIMEOUT):
        assert end.kind == kind or (not kind and end.kind), end
        assert end.text, "an error without a word"
        for part in parts:
            assert part in end.text
        no_pipeline = "no pipeline can run it" in end.text
        assert not (no_pipeline and "runs DeepSpeed's own schedule instead" in end.text), "which cannot either"
        assert restored, "DeepSpeed stays patched"


def share_what_is_frozen(rank: int, world_size: int) -> int:
    shared = Misbehaves().requires_grad_(False)
    engine = build(2, [shared, Misbehaves(), shared, Misbehaves()])
    return train(engine, batches(), calls=3).calls


def test_frozen_weights_may_be_shared(ranks: GetRanks) -> None:
    assert ranks(2).run(share_what_is_frozen, timeout=TIMEOUT) == [2, 2]


def initialize_other_model(rank: int, world_size: int) -> list[End]:
    models = [nn.Linear(2, 2), None]
    return [catch(lambda model=model: ds_ddg.initialize(model=model, config=config())) for model in models]


def test_refuses_a_model_that_is_no_pipeline(ranks: GetRanks) -> None:
    for ends in ranks(2).run(initialize_other_model, timeout=TIMEOUT):
        for end, name in zip(ends, ("Linear", "NoneType"), strict=True):
            assert end.kind == "TypeError"
            assert "PipelineModule" in end.text
            assert name in end.text


# -- told -------------------------------------------------------------------------------------------------------------

DATA: dict[str, tuple[int, Callable[[Tensor, Tensor], Any], str, list[str]]] = {
    "smaller batch": (0, lambda x, y: (x[:-1], y[:-1]), "ValueError", ["changed shape", "(4, 6)", "(3, 6)"]),
    "inputs only": (2, lambda x, y: (x,), "ValueError", ["labels are missing", "1 element", "(inputs, None)"]),
    "an array": (0, lambda x, y: ((x.numpy(), x), y), "TypeError", ["tuple of tensors", "entry 0 is a ndarray"]),
    "an array behind": (0, lambda x, y: ([x, x.numpy()], y), "TypeError", ["a list whose entry 1 is a ndarray"]),
    "inputs alone": (0, lambda x, y: x, "TypeError", ["tuple (inputs, labels)", "a tensor of shape (4, 6)"]),
    "a number": (0, lambda x, y: 3, "TypeError", ["tuple (inputs, labels)", "a int"]),
    "nested labels": (2, lambda x, y: (x, (y, [y])), "TypeError", ["labels", "a tuple whose entry 1 is a list of 1"]),
    "labels of words": (2, lambda x, y: (x, ["a", "b"]), "TypeError", ["a list whose entry 0 is a str", "dict"]),
    "inputs in a dict": (0, lambda x, y: ({"x": x}, y), "TypeError", ["tensor or a tuple of tensors", "dict"]),
    "inputs in a string": (0, lambda x, y: ("x", y), "TypeError", ["tensor or a tuple of tensors", "str"]),
    "no tuple": (0, lambda x, y: {"x": x, "y": y}, "TypeError", ["tuple (inputs, labels)", "dict"]),
    "empty tuple": (0, lambda x, y: (), "TypeError", ["tuple (inputs, labels)"]),
    "loader fails": (0, explode, "ArithmeticError", ["no forward for you"]),
}


def train_on_bad_data(rank: int, world_size: int, what: str) -> End:
    culprit, bad, *_ = DATA[what]
    return train(build(3), batches(bad=bad if rank == culprit else None))


@pytest.mark.parametrize("what", DATA)
def test_bad_micro_batch(ranks: GetRanks, what: str) -> None:
    culprit, _, kind, parts = DATA[what]
    assert_told(ranks(3).run(train_on_bad_data, what, timeout=TIMEOUT), culprit, kind, *parts)


def train_on_nothing(rank: int, world_size: int) -> End:
    return train(build(3), None)


def test_no_data(ranks: GetRanks) -> None:
    """First and last stage notice it on their own; the middle one is told by the first."""
    first, middle, last = ranks(3).run(train_on_nothing, timeout=TIMEOUT)
    for end in (first, last):
        assert (end.calls, end.kind) == (0, "ValueError"), end
        assert "no data: pass an iterator" in end.text
    assert (middle.calls, middle.kind) == (0, "StageError"), middle
    assert "stage 0 (rank 0) failed in call 0: ValueError: no data" in middle.text


MODELS: dict[str, tuple[int, str, list[str]]] = {
    "explode": (1, "ArithmeticError", ["no forward for you"]),
    "explode in backward": (1, "ArithmeticError", ["no gradient for you"]),
    "stop": (1, "RuntimeError", ["StopIteration"]),  # not the end of anybody's data
    "list": (1, "TypeError", ["last layer of stage 1", "list", "tuple of tensors"]),
    "dict": (1, "TypeError", ["last layer of stage 1", "dict", "tuple of tensors"]),
    "None": (1, "TypeError", ["last layer of stage 1", "returned None", "tuple of tensors"]),
    "mixed tuple": (1, "TypeError", ["last layer of stage 1", "entry 1 is a int", "tuple of tensors"]),
    "sparse": (1, "TypeError", ["last layer of stage 1", "torch.sparse_coo", "dense"]),
    "list in tuple": (0, "TypeError", ["last layer of stage 0", "tuple of tensors"]),
    "fewer rows": (1, "ValueError", ["activations of stage 1", "(4, 6)", "(3, 6)"]),
    "other dtype": (0, "ValueError", ["activations of stage 0", "float32", "float64"]),
    "one more tensor": (0, "ValueError", ["activations of stage 0"]),
}


def train_bad_model(rank: int, world_size: int, deed: str, stage: int) -> End:
    return train(misbehaving(3, stage, deed), batches())


@pytest.mark.parametrize("deed", MODELS)
def test_bad_layer(ranks: GetRanks, deed: str) -> None:
    stage, kind, parts = MODELS[deed]
    assert_told(ranks(3).run(train_bad_model, deed, stage, timeout=TIMEOUT), stage, kind, *parts)


def test_loss_fn_raises(ranks: GetRanks) -> None:
    ends = ranks(3).run(train_bad_loss, timeout=TIMEOUT)
    assert_told(ends, 2, "ArithmeticError", "no forward for you")


LOSSES: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "a number": (lambda x, y: 1.0, ["loss_fn returned a float", "a tensor of one number"]),
    "nothing": (lambda x, y: None, ["loss_fn returned None"]),
    "a dict": (lambda x, y: {"loss": x.mean()}, ["loss_fn returned a dict"]),
    "a tuple": (lambda x, y: (x.mean(), x), ["loss_fn returned a tuple of 2"]),
    "a detached one": (lambda x, y: nn.functional.mse_loss(x.detach(), y), ["a loss without a gradient", "detach()"]),
    "no mean": (lambda x, y: (x - y).square(), [f"loss_fn returned a tensor of shape {(SIZE, WIDTH)}", "mean"]),
}


def train_on_no_loss(rank: int, world_size: int, what: str) -> End:
    return train(build(2, loss_fn=LOSSES[what][0]), batches())


def train_on_no_loss_under_1f1b(rank: int, world_size: int) -> None:
    build(2, loss_fn=LOSSES["a detached one"][0], ddg={"enabled": False}).train_batch(batches())


def test_a_detached_loss_is_named_on_deepspeeds_schedule(ranks: GetRanks) -> None:
    outcomes = ranks(2).run(train_on_no_loss_under_1f1b, timeout=TIMEOUT, expect_failure=True)
    for outcome, kind in zip(outcomes, ("StageError", "TypeError"), strict=True):
        assert outcome.exc_type == kind, outcome
        assert "loss_fn returned a loss without a gradient" in outcome.message


@pytest.mark.parametrize("what", LOSSES)
def test_loss_fn_returns_no_loss(ranks: GetRanks, what: str) -> None:
    assert_told(ranks(2).run(train_on_no_loss, what, timeout=TIMEOUT), 1, "TypeError", *LOSSES[what][1], call=0)


def train_without_a_loss_fn(rank: int, world_size: int) -> End:
    engine = build(2)
    engine.module.loss_fn = None
    return train(engine, batches())


def test_last_layer_returns_no_loss(ranks: GetRanks) -> None:
    ends = ranks(2).run(train_without_a_loss_fn, timeout=TIMEOUT)
    assert_told(ends, 1, "TypeError", "the last layer, whose output is the loss", f"shape {(SIZE, WIDTH)}", call=0)


def fail_after_evaluation(rank: int, world_size: int) -> End:
    engine = misbehaving(2, 1, "mistake")
    engine.eval_batch(batches(), compute_loss=False, bcast_loss=False, return_logits=True)  # counts as forwards
    return train(engine, batches())


def test_a_layers_error_is_not_taken_for_one_of_the_loss(ranks: GetRanks) -> None:
    """Evaluation has left logits where the loss was."""
    ends = ranks(2).run(fail_after_evaluation, timeout=TIMEOUT)
    assert_told(ends, 1, "TypeError", "my own mistake", call=BAD_CALL - 1)


def recompute_gradients(rank: int, world_size: int, activations: str) -> End:
    layers = [Misbehaves("gradient inside" if n == 1 else "", start=0) for n in range(6)]
    return train(build(3, layers, ddg={"activations": activations}), batches())


def test_layer_that_computes_gradients_itself(ranks: GetRanks) -> None:
    for end in ranks(3).run(recompute_gradients, "keep", timeout=TIMEOUT):
        assert (end.calls, end.kind) == (7, ""), end
    ends = ranks(3).run(recompute_gradients, "recompute", timeout=TIMEOUT)
    assert_told(ends, 0, "RuntimeError", "stage 0 computes gradients in its own", '"activations": "keep"', call=0)


def train_first_output_bad(rank: int, world_size: int, deed: str) -> End:
    return train(misbehaving(3, 0, deed, start=0), batches())


@pytest.mark.parametrize("deed", ["list", "None"])
def test_bad_layer_from_the_start(ranks: GetRanks, deed: str) -> None:
    ends = ranks(3).run(train_first_output_bad, deed, timeout=TIMEOUT)
    assert_told(ends, 0, "TypeError", "last layer of stage 0", call=0)


def fail_in_evaluation(rank: int, world_size: int, stage: int) -> End:
    """Training forwards and evaluation's count alike: the first of evaluation is the bad one."""
    engine = misbehaving(3, stage, "explode")
    for _ in range(BAD_CALL):
        engine.train_batch(batches())
    end = catch(lambda: engine.eval_batch(batches()), BAD_CALL)
    return End(end.calls, end.kind, end.text, end.at, catch(lambda: engine.train_batch(batches())).text)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_layer_fails_in_evaluation(ranks: GetRanks, stage: int) -> None:
    ends = ranks(3).run(fail_in_evaluation, stage, timeout=20.0)
    assert_told(ends, stage, "ArithmeticError", "no forward for you")


def fail_far_away(rank: int, world_size: int) -> End:
    return train(misbehaving(4, 1, "explode", other="nap", once=True), batches())


def test_failure_reaches_busy_stages_beyond_neighbours(ranks: GetRanks) -> None:
    ends = ranks(4).run(fail_far_away, timeout=TIMEOUT)
    assert_told(ends, 1, "ArithmeticError", "no forward for you")


def fail_at_length(rank: int, world_size: int) -> End:
    def bad(x: Tensor, y: Tensor) -> Any:
        raise ValueError("the beginning\n" + 5000 * "§\n")

    return train(build(2), batches(bad=bad if rank == 0 else None))


def test_long_message_of_many_lines(ranks: GetRanks) -> None:
    """No neighbour may go untold because a message is long, nor may another error hide the first."""
    first, last = ranks(2).run(fail_at_length, timeout=TIMEOUT)
    assert first.kind == "ValueError", first
    assert last.kind == "StageError", last
    assert last.text.startswith(f"stage 0 (rank 0) failed in call {BAD_CALL}: ValueError: the beginning")


# -- data that ends ---------------------------------------------------------------------------------------------------


def run_out_of_data(rank: int, world_size: int, first: int, last: int) -> tuple[End, End]:
    """Stage 0 has `first` micro-batches, stage 2 has `last`; then, if that was the regular end, go on with more."""
    engine = build(3)
    end = train(engine, batches({0: first, 2: last}.get(rank)))
    again = train(engine, batches(), calls=2) if end.kind == "StopIteration" else end
    if end.kind == "StopIteration":
        engine.drain()
        timed = engine.timers(TRAIN_BATCH_TIMER).event_timers
        assert len(timed) == end.calls + 2, "the call that did not happen took no time"
    return end, again


@pytest.mark.parametrize(("first", "last"), [(1, 1), (7, 7), (6, 6), (7, 8), (6, 20)])
def test_data_ends_on_every_rank(ranks: GetRanks, first: int, last: int) -> None:
    for end, again in ranks(3).run(run_out_of_data, first, last, timeout=TIMEOUT):
        assert (end.calls, end.kind) == (first // MICRO_BATCHES, "StopIteration"), end
        assert again.kind == "", again


def test_data_of_the_last_stage_ends_before_the_firsts(ranks: GetRanks) -> None:
    ends = [end for end, _ in ranks(3).run(run_out_of_data, 20, BAD_BATCH + 1, timeout=TIMEOUT)]
    assert_told(ends, 2, "RuntimeError", "data of the last stage ended", "same number of micro-batches")


# -- not finite -------------------------------------------------------------------------------------------------------


def train_to_infinity(rank: int, world_size: int) -> tuple[list[str], dict[int, float], bool]:
    from deepspeed.utils import logger

    handler = toy.Lines(logging.ERROR)
    logger.addHandler(handler)
    engine = build(3, loss_fn=Misbehaves("to infinity", once=True))
    losses = {}
    for _ in range(8):
        loss = engine.train_batch(batches())
        losses[engine.loss_step] = loss.item()
    engine.drain()
    logger.removeHandler(handler)
    return handler.lines, losses, all(bool(p.isfinite().all()) for p in engine.module.parameters())


def test_a_loss_not_finite_is_reported_and_training_goes_on(ranks: GetRanks) -> None:
    results = ranks(3).run(train_to_infinity, timeout=TIMEOUT)
    for rank, (lines, losses, finite) in enumerate(results):
        assert losses.pop(BAD_CALL) == float("inf")
        assert len(losses) > BAD_CALL
        assert all(loss < float("inf") for loss in losses.values())
        assert finite
        assert len(lines) == (rank == 2), lines
    (line,) = results[2][0]
    for part in ("stage 2", f"call {BAD_CALL}", "inf"):
        assert part in line


# -- out of step ------------------------------------------------------------------------------------------------------


def evaluate_alone(rank: int, world_size: int, odd: int) -> End:
    engine = build(3)
    for _ in range(BAD_CALL):
        engine.train_batch(batches())
    if rank != odd:
        return train(engine, batches())
    return catch(lambda: engine.eval_batch(batches()))


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_one_rank_evaluates_while_the_others_train(ranks: GetRanks, odd: int) -> None:
    ends = ranks(3).run(evaluate_alone, odd, timeout=20.0)
    assert {end.kind for end in ends} <= {"RuntimeError", "StageError"}, ends
    for end in ends:
        for part in ("out of step", "train_batch", "eval_batch", "every rank"):
            assert part in end.text, ends


def drain_alone(rank: int, world_size: int) -> End:
    engine = build(2)
    for _ in range(BAD_CALL):
        engine.train_batch(batches())
    return catch(engine.drain) if rank == 0 else train(engine, batches())


def test_one_rank_drains_while_the_other_trains(ranks: GetRanks) -> None:
    ends = ranks(2).run(drain_alone, timeout=TIMEOUT)
    assert {end.kind for end in ends} <= {"RuntimeError", "StageError"}, ends
    for end in ends:
        assert "out of step" in end.text, ends


def train_once_more(rank: int, world_size: int, odd: int) -> int:
    engine = build(2)
    for _ in range(BAD_CALL + (2 if rank == odd else 0)):
        engine.train_batch(batches())
    if rank != odd:
        os._exit(0)  # as a script that has come to its end
    return rank


@pytest.mark.parametrize("odd", [0, 1])
def test_one_rank_goes_on_when_the_other_has_finished(ranks: GetRanks, odd: int) -> None:
    outcomes = ranks(2).run(train_once_more, odd, timeout=TIMEOUT, expect_failure=True)
    assert_lost(outcomes, 1 - odd, exit_code=0)


# -- data-parallel ----------------------------------------------------------------------------------------------------


def train_replicas(rank: int, world_size: int, what: str, culprit: int) -> End:
    """Two pipelines of two stages: ranks 0 and 1 are stage 0, ranks 2 and 3 stage 1."""
    if what in DATA:
        engine, bad = build(2), DATA[what][1]
    else:
        engine, bad = misbehaving(2, culprit // 2, what if rank == culprit else ""), None
    return train(engine, batches(bad=bad if rank == culprit else None))


@pytest.mark.parametrize(("what", "culprit"), [("smaller batch", 1), ("inputs only", 2)])
def test_bad_micro_batch_on_one_replica(ranks: GetRanks, what: str, culprit: int) -> None:
    kind, parts = DATA[what][2:]
    ends = ranks(4).run(train_replicas, what, culprit, timeout=TIMEOUT)
    assert ends[culprit].kind == kind, ends
    assert all(part in ends[culprit].text for part in parts), ends
    for rank, end in enumerate(ends):
        assert end.calls in (BAD_CALL, BAD_CALL + 1), ends
        if rank != culprit:
            assert end.kind == "StageError", ends
            assert "data" in end.text or parts[0] in end.text, ends


def lose_a_replica(rank: int, world_size: int, deed: str, culprit: int) -> None:
    in_reduction = deed == "die in a reduction"
    engine = misbehaving(2, culprit // 2, deed if rank == culprit and not in_reduction else "")
    data = batches()
    for call in range(8):
        if in_reduction and rank == culprit and call == BAD_CALL:
            engine.allreduce_gradients = die_later  # when the others wait for each other already
        engine.train_batch(data)


@pytest.mark.parametrize(("deed", "culprit"), [("explode", 1), ("die", 2), ("die in a reduction", 1)])
def test_one_replica_fails_or_is_lost(ranks: GetRanks, deed: str, culprit: int) -> None:
    """Replicas wait for each other in DeepSpeed's all-reduce, which ends when the process of the failed one does."""
    outcomes = ranks(4).run(lose_a_replica, deed, culprit, timeout=TIMEOUT, grace=SOON, expect_failure=True)
    report = "\n".join(map(str, outcomes))
    for outcome in outcomes:
        if outcome.rank == culprit:
            continue
        assert (outcome.state, outcome.exc_type) == ("raised", "StageError"), report
        assert re.search(r"stage \d .*ranks? .*(lost|failed)", outcome.message), report
    for other in (culprit ^ 1, (culprit + 2) % 4):  # its replica, and the other stage of its pipeline
        assert re.search(rf"ranks? \[?{culprit}\b", outcomes[other].message), report
    fourth = outcomes[culprit ^ 3].message  # it only knows others that failed in turn, and they say why
    assert "this stage waited for" not in fourth, report


# -- lost -------------------------------------------------------------------------------------------------------------


def assert_lost(outcomes: list[Outcome], lost: int, exit_code: int = -signal.SIGKILL) -> None:
    """One rank is gone; all others raise soon (a hung one would be reported as such) and name it."""
    report = "\n".join(map(str, outcomes))
    for outcome in outcomes:
        if outcome.rank == lost:
            assert (outcome.state, outcome.exit_code) == ("died", exit_code), report
        else:
            assert (outcome.state, outcome.exc_type) == ("raised", "StageError"), report
            assert f"stage {lost} (rank {lost}) is lost" in outcome.message, report


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


# -- launched ---------------------------------------------------------------------------------------------------------

SCRIPT = """\
import os
import signal
import sys
import time

import deepspeed
import torch
from deepspeed.pipe import PipelineModule

import ds_ddg

# DeepSpeed would compile a C++ kernel for `inference_all_reduce`, which training never calls: 45 s on first use.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
how, ddg = sys.argv[-2], sys.argv[-1]
deepspeed.init_distributed(dist_backend="gloo")
rank = torch.distributed.get_rank()

class Slow(torch.nn.Linear):
    def forward(self, x):
        time.sleep(0.6)
        return super().forward(x)


last = Slow if "slow" in how else torch.nn.Linear  # the first stage is done long before the last
layers = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), last(4, 4)]
net = PipelineModule(layers, num_stages=2, loss_fn=torch.nn.functional.mse_loss)
config = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "ddg": {"trace": __file__} if ddg == "trace" else {ddg: 1},
}
engine, *_ = ds_ddg.initialize(model=net, config=config, model_parameters=net.parameters())
data = iter([(torch.ones(2, 4), torch.zeros(2, 4))] * 100)
for step in range(10):
    if how == "killed" and step == 5 and rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    engine.train_batch(data)
print(f"rank {rank} trained {engine.global_steps} calls")
if "destroy engine" in how:
    engine.destroy()
if "destroy group" in how:
    torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("launched") / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.parametrize(
    "how", ["just end", "destroy group", "destroy engine", "slow", "slow, destroy group", "slow, destroy engine"]
)
def test_script_ends_cleanly_with_micro_batches_in_flight(script: Path, how: str) -> None:
    status, output, _ = launch(script, how)
    assert status == 0, output
    for rank in range(2):
        assert f"rank {rank} trained 10 calls" in output
    assert not NOISE.search(output), output


def test_script_that_loses_a_rank(script: Path) -> None:
    status, output, _ = launch(script, "killed")
    assert status != 0, output
    assert "stage 0 (rank 0) is lost" in output
    assert "trained" not in output


def test_script_with_a_bad_key(script: Path) -> None:
    status, output, _ = launch(script, "just end", ddg="slak")
    assert status != 0, output
    for rank in range(2):
        assert f"[rank{rank}]: ValueError: \"ddg\": unknown key 'slak'" in output, output
    assert "trained" not in output


def test_script_whose_engine_cannot_be_finished(script: Path) -> None:
    """Its channels are open already: torch once ended such a process with an assertion of its own, and a dump."""
    status, output, _ = launch(script, "just end", ddg="trace")
    assert status == 1, output
    for rank in range(2):
        assert re.search(rf'\[rank{rank}\]: ValueError: "ddg": {{"trace": .*}} cannot be written', output), output
    assert "terminate called" not in output
