"""What a script does between two calls: it changes weights, and it goes on from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_ddg.comm.p2p import StageError
from helpers import toy
from helpers.distributed import GetRanks
from helpers.versus import Setup, versus

WIDTH = 6


def layers() -> list[nn.Module]:
    torch.manual_seed(7)
    return [nn.Linear(WIDTH, WIDTH), *(toy.Residual(WIDTH) for _ in range(4)), nn.Linear(WIDTH, WIDTH)]


def vectors() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for _ in count():
        yield torch.randn(4, WIDTH, generator=generator), torch.randn(4, WIDTH, generator=generator)


# -- weights that a script changes ------------------------------------------------------------------------------------


def clamp(engine: Any) -> None:
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.clamp_(-0.1, 0.1)


def load(engine: Any) -> None:
    engine.module.load_state_dict({name: 0.9 * value for name, value in engine.module.state_dict().items()})


def replace(engine: Any) -> None:
    for parameter in engine.module.parameters():
        parameter.data = 0.9 * parameter.data


def freeze(engine: Any) -> None:
    engine.module.requires_grad_(False)


CHANGES = {change.__name__: change for change in (clamp, load, replace, freeze)}


def change_weights(rank: int, world_size: int, what: str, mode: dict[str, Any], calls: int) -> list[str]:
    """What is said if the weights are changed with micro-batches in flight; before that, all is well after a drain."""
    made = Setup(layers, vectors, micro_batches=1, ddg=mode)
    engine, data = made.engine(), made.batches()
    said = []
    for drains in (True, False):
        for _ in range(calls):
            engine.train_batch(data)
        if drains:
            engine.drain()
            if what != "freeze":
                CHANGES[what](engine)
            continue
        CHANGES[what](engine)
        for then in (partial(engine.train_batch, data), engine.drain):
            with pytest.raises(RuntimeError) as caught:
                then()
            said.append(str(caught.value))
    return said


@pytest.mark.parametrize("calls", [1, 4])
@pytest.mark.parametrize("mode", [{}, {"weights": "current", "activations": "recompute"}], ids=str)
@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.refuses("weights written, replaced or frozen with micro-batches in flight", "`engine.drain()` first")
def test_weights_changed_in_flight(ranks: GetRanks, what: str, mode: dict[str, Any], calls: int) -> None:
    for said in ranks(2).run(change_weights, what, mode, calls):
        for text in said:
            assert "weights of stage 0 were written into, replaced or frozen between two calls (" in text
            assert "1.norm.weight" in text
            assert "call engine.drain() before" in text


def shrink(trainer: Any, call: int) -> None:
    """Through ``.data``; not in the first call, after which the first stage has not been updated."""
    if call not in (0, 1, 10, 11):
        modules = [trainer.module] if hasattr(trainer, "module") else trainer.stages
        for module in modules:
            for parameter in module.parameters():
                parameter.data.mul_(0.9)


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_a_write_through_data_belongs_to_the_update_before(ranks: GetRanks, activations: str) -> None:
    """It leaves no trace to refuse it by, and what is in flight keeps the weights that it saw."""
    ddg = {"weights": "stash", "activations": activations}
    made = Setup(layers, vectors, stages=3, micro_batches=2, ddg=ddg)
    versus(ranks, Setup(**{**vars(made), "before": shrink, "oracle_before": shrink}))


# -- one number for a call --------------------------------------------------------------------------------------------


def go_on_and_fail(rank: int, world_size: int, directory: str) -> tuple[int, int, str]:
    made = Setup(layers, vectors)
    engine, data = made.engine(), made.batches()
    for _ in range(5):
        engine.train_batch(data)
    engine.save_checkpoint(directory)
    again = Setup(layers, vectors).engine()
    again.load_checkpoint(directory)
    again.train_batch(data)
    again.drain()
    with pytest.raises((TypeError, StageError)):
        again.train_batch(iter([(torch.zeros(4, WIDTH), [None])] * 2))
    with pytest.raises(StageError) as caught:
        again.drain()
    return again.global_steps, again.loss_step, str(caught.value)


def test_messages_count_calls_as_the_engine_does(ranks: GetRanks, tmp_path: Path) -> None:
    """After a checkpoint, too."""
    for steps, loss_step, message in ranks(2).run(go_on_and_fail, str(tmp_path)):
        assert (steps, loss_step) == (6, 5)
        assert message.startswith("stage 1 (rank 1) failed in call 6: TypeError: labels must be")
