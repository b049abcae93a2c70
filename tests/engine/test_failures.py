"""Whatever goes wrong on one rank, every rank ends its call soon, with an error that says where it went wrong.

A stage fails and lives on: the others learn it from messages alone. Every rank catches its error and stays, so that no
rank can rely on a dying process to be woken up.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER
from torch import Tensor, nn

from helpers import toy
from helpers.distributed import GetRanks
from helpers.failing import (
    BAD_BATCH,
    BAD_CALL,
    MICRO_BATCHES,
    SIZE,
    SOON,
    TIMEOUT,
    WIDTH,
    End,
    Misbehaves,
    assert_lost,
    assert_told,
    batches,
    build,
    catch,
    die_later,
    explode,
    misbehaving,
    train,
    train_bad_loss,
)

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
