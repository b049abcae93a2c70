"""What a micro-batch may be: all that DeepSpeed takes on its own schedule, and under DDG all of it that is exact."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_ddg.comm.p2p import StageError
from helpers import toy
from helpers.distributed import GetRanks, spawn
from helpers.modes import DEFAULT
from helpers.versus import Setup, versus

WIDTH = 6
Made = Callable[[int, Tensor, Tensor], Any]


class Indexed:
    """Neither a tuple nor a list, and has entries."""

    def __init__(self, *entries: Any) -> None:
        self.entries = entries

    def __getitem__(self, index: int) -> Any:
        return self.entries[index]

    def __len__(self) -> int:
        return len(self.entries)


class Pooled(nn.Module):
    """What leaves it has the same shape, however long what came is."""

    def forward(self, x: Tensor) -> Tensor:
        return {2: x, 3: x.mean(1), 4: x.mean((0, 1))}[x.dim()]


def layers() -> list[nn.Module]:
    torch.manual_seed(7)
    return [Pooled(), *(toy.Residual(WIDTH) for _ in range(4)), nn.Linear(WIDTH, WIDTH)]


def ignoring(outputs: Tensor, _: Any) -> Tensor:
    return outputs.square().mean()


def first_of(outputs: Tensor, labels: Any) -> Tensor:
    return nn.functional.mse_loss(outputs, labels[0])


def by_name(outputs: Tensor, labels: Any) -> Tensor:
    assert labels["names"] == ["a", ["b"]]
    return nn.functional.mse_loss(outputs, labels["y"])


BATCHES: dict[str, tuple[Made, Any]] = {
    "labels are None": (lambda n, x, y: (x, None), ignoring),
    "labels are a word": (lambda n, x, y: (x, "word"), ignoring),
    "labels in a dict": (lambda n, x, y: (x, {"y": y, "names": ["a", ["b"]]}), by_name),
    "labels in a list": (lambda n, x, y: [x, [y, y]], first_of),
    "three entries": (lambda n, x, y: (x, y, "an id"), nn.functional.mse_loss),
    "entries by number": (lambda n, x, y: {0: x, 1: y, "id": n}, nn.functional.mse_loss),
    "an object with entries": (lambda n, x, y: Indexed(x, y), nn.functional.mse_loss),
    "another length": (lambda n, x, y: (torch.stack((1 + n % 3) * [x], 1), y), nn.functional.mse_loss),
}
FOR_DEEPSPEED: dict[str, tuple[Made, Any]] = {
    **BATCHES,
    "one tensor of both": (lambda n, x, y: torch.stack((x, y)), nn.functional.mse_loss),
    "another number of rows": (lambda n, x, y: (torch.stack((1 + n % 3) * [x])[:, None], y), nn.functional.mse_loss),
}


def batches(what: str) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(3)
    for n in count():
        x, y = (torch.randn(4, WIDTH, generator=generator) for _ in range(2))
        yield FOR_DEEPSPEED[what][0](n, x, y)


@pytest.mark.parametrize("what", BATCHES)
@pytest.mark.proves("labels that are None, words, or in dicts; micro-batches that are no tuples", modes=DEFAULT)
def test_under_ddg(ranks: GetRanks, what: str) -> None:
    versus(ranks, Setup(layers, partial(batches, what), micro_batches=2, loss_fn=BATCHES[what][1]))


def in_the_same_memory() -> Iterator[Any]:
    """As some loaders do: each micro-batch overwrites the one before."""
    x, y = torch.empty(4, WIDTH), torch.empty(4, WIDTH)
    for new in batches("labels in a list"):
        yield x.copy_(new[0]), y.copy_(new[1][0])


def setup(what: str, stages: int = 2, **more: Any) -> Setup:
    if what == "in the same memory":
        return Setup(layers, in_the_same_memory, stages=stages, **more)
    return Setup(layers, partial(batches, what), stages=stages, loss_fn=FOR_DEEPSPEED[what][1], **more)


def on_deepspeeds_schedule(rank: int, world_size: int, what: str, ours: bool) -> tuple[list[float], list[Tensor]]:
    import deepspeed

    import ds_ddg

    made = setup(what, ddg={"enabled": False})
    with pytest.MonkeyPatch.context() as patch:
        if not ours:
            patch.setattr(ds_ddg, "initialize", deepspeed.initialize)
        engine = made.engine()
    data = made.batches()
    losses = [float(engine.train_batch(data)) for _ in range(5)]
    if what == "another length":
        losses.append(float(engine.eval_batch(data)))
    return losses, toy.state(engine.module)


@pytest.mark.parametrize("what", [*FOR_DEEPSPEED, "in the same memory"])
@pytest.mark.proves('"enabled": false with all data that DeepSpeed takes', modes=DEFAULT)
def test_on_deepspeeds_schedule(ranks: GetRanks, what: str) -> None:
    """``"enabled": false`` runs what DeepSpeed runs, and comes to the same."""
    ours = ranks(2).run(on_deepspeeds_schedule, what, True)
    theirs = ranks(2).run(on_deepspeeds_schedule, what, False)
    for (losses, state), (expected, its) in zip(ours, theirs, strict=True):
        assert losses == expected
        assert all(map(torch.equal, state, its))


def refused(rank: int, world_size: int, what: str) -> str:
    made = setup(what)
    engine, data = made.engine(), made.batches()
    with pytest.raises((TypeError, ValueError, StageError)) as caught:
        engine.train_batch(data)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("one tensor of both", "TypeError: a micro-batch must be a tuple (inputs, labels), got a tensor of shape (2,"),
        ("another number of rows", "ValueError: the inputs changed shape from [(1, 1, 4, 6)] to [(2, 1, 4, 6)]"),
        (
            "in the same memory",
            "ValueError: the data iterator has written into a micro-batch that it had given",
        ),
    ],
)
def test_refused_under_ddg(ranks: GetRanks, what: str, message: str) -> None:
    first, _ = ranks(2).run(refused, what)
    assert first.startswith(message)


def say(rank: int, world_size: int, what: str, ddg: dict[str, Any]) -> list[str]:
    from deepspeed.utils import logger

    handler = toy.Lines(logging.WARNING)
    logger.addHandler(handler)
    made = setup(what, ddg=ddg)
    engine, data = made.engine(), made.batches()
    for _ in range(3):
        engine.train_batch(data)
    engine.drain()
    logger.removeHandler(handler)
    return [line for line in handler.lines if "micro-batch" in line]


@pytest.mark.parametrize("ddg", [{}, {"enabled": False}], ids=str)
def test_says_once_that_only_two_entries_are_used(ddg: dict[str, Any]) -> None:
    assert spawn(say, 2, "labels in a list", ddg) == [[], []]
    (line,), others = spawn(say, 2, "three entries", ddg)
    assert "a micro-batch has 3 entries, of which only the first two are used, as inputs and labels" in line
    assert not others
