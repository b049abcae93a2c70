"""What surrounds the training steps: evaluation and learning rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.lr_schedules import WarmupLR
from torch import Tensor

from helpers import toy
from helpers.distributed import GetRanks

# The oracle steps schedulers in warm-up calls too, as the engine does.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before:UserWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def assert_equal(ours: Any, theirs: Any) -> None:
    """Nested results, tensors to the last bit."""
    __tracebackhide__ = True
    if isinstance(theirs, Tensor):
        assert isinstance(ours, Tensor), (ours, theirs)
        # DeepSpeed's broadcast loss has 0 dimensions on the last stage and 1 elsewhere.
        a, b = (t.reshape(()) if t.numel() == 1 else t for t in (ours, theirs))
        assert torch.equal(a, b), (ours, theirs)
    elif isinstance(theirs, (list, tuple)):
        assert isinstance(ours, (list, tuple)), (ours, theirs)
        assert len(ours) == len(theirs), (ours, theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_equal(a, b)
    else:
        assert ours == theirs


# -- evaluation -------------------------------------------------------------------------------------------------------

EVALUATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"return_logits": True},
    {"reduce_output": "AVG", "bcast_loss": False},
    {"reduce_output": None, "bcast_loss": False, "return_logits": True},
    {"compute_loss": False},
    {"compute_loss": False, "bcast_loss": False, "return_logits": True},
    {"compute_loss": False, "reduce_output": None, "num_micro_batches": 5},
    {"num_micro_batches": 1, "return_logits": True},
    {"num_micro_batches": 4},
)


def evaluate_every_way(engine: Any, seed: int) -> list[Any]:
    found = []
    for arguments in EVALUATIONS:
        found.append(engine.eval_batch(toy.batches(9, 3, seed), **arguments))
        if type(engine) is deepspeed.PipelineEngine:
            engine.total_loss = None  # otherwise it adds outputs to losses, and fails
    return found


def train_and_evaluate(rank: int, world_size: int, weights: str, evaluating: bool) -> dict[str, Any]:
    engine = toy.engine(world_size, 2, "adam", {"weights": weights})
    data = toy.batches(14)
    evaluations = []
    losses = []
    for t in range(7):
        losses.append(engine.train_batch(data))
        if evaluating and t in (1, 4):
            flight = engine.versions.in_flight
            plain = toy.engine(world_size, 2, "adam", initialize=deepspeed.initialize)
            plain.module.load_state_dict(engine.module.state_dict())
            evaluations.append((evaluate_every_way(engine, t), evaluate_every_way(plain, t)))
            assert engine.versions.in_flight == flight
        torch.manual_seed(t)  # constructing an engine draws random numbers; evaluating does not
        if evaluating:
            engine.eval_batch(toy.batches(2))
        assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(t).get_state())
    engine.drain()
    return {"evaluations": evaluations, "trained": [losses, toy.state(engine.module)]}


@pytest.mark.parametrize("weights", ["stash", "current"])
@pytest.mark.proves("eval_batch with all its arguments", modes=("weights",))
def test_eval_batch_is_deepspeeds_on_the_same_weights(ranks: GetRanks, weights: str) -> None:
    """With every combination of arguments that has a result, and training goes on as if nothing had been evaluated."""
    with_eval = ranks(3).run(train_and_evaluate, weights, True)
    without = ranks(3).run(train_and_evaluate, weights, False)
    for k, (ours, theirs) in enumerate(zip(with_eval, without, strict=True)):
        assert len(ours["evaluations"]) == 2
        for delayed, plain in ours["evaluations"]:
            assert_equal(delayed, plain)
            logits = delayed[1][1]
            assert (logits is not None) == (k == 2)
        assert_equal(ours["trained"], theirs["trained"])


def ask_for_nothing(rank: int, world_size: int) -> tuple[list[str], float]:
    engine = toy.engine(world_size, 1, "sgd", {})
    data = toy.batches(5)
    engine.train_batch(data)
    refused = []
    for arguments in ({"reduce_output": "sum"}, {"reduce_output": None}):
        try:
            engine.eval_batch(data, **arguments)
        except (NotImplementedError, ValueError) as error:
            refused.append(f"{type(error).__name__}: {error}")
    loss = float(engine.eval_batch(data))
    engine.train_batch(data)
    engine.drain()
    return refused, loss


@pytest.mark.refuses('`eval_batch(reduce_output="sum")`, or None with `bcast_loss`', '"avg", or `bcast_loss=False`')
def test_eval_batch_without_a_result_is_refused_everywhere(ranks: GetRanks) -> None:
    """Where DeepSpeed raises on the last stage and leaves the others waiting; the data is not touched."""
    (refused, loss), *others = ranks(2).run(ask_for_nothing)
    assert others == [(refused, loss)]
    assert refused == [
        "NotImplementedError: reduce_output must be \"avg\" or None, got 'sum'",
        "ValueError: reduce_output=None gives a list, and only a mean is sent to all: pass bcast_loss=False",
    ]


# -- learning rates ---------------------------------------------------------------------------------------------------

WARMUP = {"warmup_min_lr": 0.001, "warmup_max_lr": 0.02, "warmup_num_steps": 5, "warmup_type": "linear"}


def halve(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "json": lambda optimizer: WarmupLR(optimizer, **WARMUP),
    "callable": halve,
    "object": halve,
    "assigned": toy.decay,
}


def engine_with_scheduler(how: str, num_stages: int) -> Any:
    import ds_ddg

    if how == "json":
        return toy.engine(num_stages, 1, "sgd", {}, scheduler={"type": "WarmupLR", "params": WARMUP})
    if how == "callable":
        return toy.engine(num_stages, 1, "sgd", {}, lr_scheduler=halve)
    if how == "assigned":
        engine = toy.engine(num_stages, 1, "sgd", {})
        engine.lr_scheduler = toy.decay(engine.optimizer)
        return engine
    net = PipelineModule(toy.layers(), num_stages=num_stages, loss_fn=toy.loss_fn, partition_method="uniform")
    torch.manual_seed(11)
    optimizer = toy.OPTIMIZERS["sgd"](net.parameters())
    scheduler = halve(optimizer)
    engine, *_, returned = ds_ddg.initialize(
        model=net, config=toy.config(1, {}), optimizer=optimizer, lr_scheduler=scheduler
    )
    assert returned is scheduler
    return engine


def schedule_rates(rank: int, world_size: int) -> dict[str, Any]:
    found = {}
    for how in SCHEDULERS:
        engine = engine_with_scheduler(how, world_size)
        data = toy.batches(7)
        rates = []
        for t in range(7):
            engine.train_batch(data)
            rates.append(tuple(engine.get_lr()))
            if t == 4:
                engine.drain()
                assert tuple(engine.get_lr()) == rates[-1]
        found[how] = rates, toy.state(engine.module)
    return found


def test_learning_rates_advance_once_a_call_on_every_rank(ranks: GetRanks) -> None:
    results = ranks(3).run(schedule_rates)
    for how, make in SCHEDULERS.items():
        oracle = toy.reference(3)
        oracle.schedulers = [make(optimizer) for optimizer in oracle.optimizers]
        data = toy.batches(7)
        rates = []
        for t in range(7):
            oracle.train_batch(data)
            rates.append((oracle.optimizers[0].param_groups[0]["lr"],))
            if t == 4:
                oracle.drain()
        assert len(set(rates)) > 2
        for result, stage in zip(results, oracle.stages, strict=True):
            assert result[how][0] == rates, how
            assert_equal(result[how][1], toy.state(stage))
