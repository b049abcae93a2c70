"""Engines that fail on one stage, and how each rank ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ds_ddg
from helpers.distributed import Outcome

TIMEOUT = 60.0
SOON = 10.0  # generous: what is caught is a hang, and other processes may be busy on this machine
WIDTH, SIZE, MICRO_BATCHES = 6, 4, 2
BAD_CALL = 3
BAD_BATCH = BAD_CALL * MICRO_BATCHES  # the first micro-batch of that call


class ExplodeInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ArithmeticError("no gradient for you")


def explode(*_: Any) -> Any:
    raise ArithmeticError("no forward for you")


def stop(*_: Any) -> Any:
    raise StopIteration


def die(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def die_later(*_: Any) -> Any:
    time.sleep(1.0)
    die()


def nap(x: Tensor) -> Tensor:
    time.sleep(1.0)
    return x


def to_infinity(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return a loss that is not finite, yet has a finite gradient: the calls after it can be looked at."""
    return nn.functional.mse_loss(outputs, labels) + float("inf")


DEEDS: dict[str, Callable[..., Any]] = {
    "explode": explode,
    "explode in backward": ExplodeInBackward.apply,
    "stop": stop,
    "list": lambda x: [x],
    "dict": lambda x: {"x": x},
    "None": lambda x: None,
    "mixed tuple": lambda x: (x, 3),
    "list in tuple": lambda x: (x, [x]),
    "fewer rows": lambda x: x[:-1],
    "other dtype": lambda x: x.double(),
    "sparse": lambda x: x.to_sparse(),
    "gradient inside": lambda x: torch.autograd.grad(x.square().sum(), x, create_graph=True)[0],
    "one more tensor": lambda x: (x, x),
    "die": die,
    "die later": die_later,
    "nap": nap,
    "to infinity": to_infinity,
    "mistake": lambda x: mistake(x),
}


class Misbehaves(nn.Module):
    """A linear layer, or a mean squared error, that fails from micro-batch `start` on (`once`: only there)."""

    def __init__(self, deed: str = "", start: int = BAD_BATCH, once: bool = False) -> None:
        super().__init__()
        self.deed, self.start, self.once = deed, start, once
        self.seen = 0
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        n, self.seen = self.seen, self.seen + 1
        misbehaves = self.deed and (n == self.start if self.once else n >= self.start)
        if labels is not None:
            return DEEDS[self.deed](x, labels) if misbehaves else nn.functional.mse_loss(x, labels)
        return DEEDS[self.deed](self.linear(x)) if misbehaves else self.linear(x)


def config(**more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": SIZE,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
        "steps_per_print": 10**9,
        **more,
    }


def build(
    num_stages: int,
    layers: list[Any] | None = None,
    loss_fn: Any = None,
    module: dict[str, Any] | None = None,
    **more: Any,
) -> Any:
    from deepspeed.pipe import PipelineModule

    layers = [Misbehaves() for _ in range(2 * num_stages)] if layers is None else layers
    settings = {"num_stages": num_stages, "loss_fn": loss_fn or nn.functional.mse_loss, "partition_method": "uniform"}
    net = PipelineModule(layers, **{**settings, **(module or {})})
    return ds_ddg.initialize(model=net, config=config(**more), model_parameters=net.parameters())[0]


def batches(count: int | None = None, bad: Callable[[Tensor, Tensor], Any] | None = None) -> Iterator[Any]:
    """Yield `count` micro-batches (None: without end); number BAD_BATCH is what `bad` makes of a good one."""
    n = 0
    while count is None or n < count:
        x, y = torch.randn(SIZE, WIDTH), torch.randn(SIZE, WIDTH)
        yield bad(x, y) if bad is not None and n == BAD_BATCH else (x, y)
        n += 1


@dataclass(frozen=True)
class End:
    """The end of a training on a rank that stays alive."""

    calls: int
    kind: str
    text: str
    at: float
    """The time on the clock that all processes of a machine share."""
    again: str = ""
    """The error of the next call."""


def catch(action: Callable[[], Any], calls: int = 0) -> End:
    try:
        action()
    except Exception as error:
        return End(calls, type(error).__name__, str(error), time.monotonic())
    return End(calls, "", "", time.monotonic())


def train(engine: Any, data: Iterator[Any] | None, calls: int = 8) -> End:
    """Train until something happens; whatever is tried then must fail at once, for the same reason."""
    for call in range(calls):
        end = catch(lambda: engine.train_batch(data), call)
        if end.kind:
            break
    if end.kind in ("", "StopIteration"):
        return end
    nexts = [catch(lambda: engine.train_batch(batches())), catch(engine.drain)]
    nexts.append(catch(lambda: engine.eval_batch(batches())))
    assert {following.kind for following in nexts} == {"StageError"}, nexts
    assert len({following.text for following in nexts}) == 1, nexts
    assert nexts[-1].at - end.at < SOON
    return End(end.calls, end.kind, end.text, end.at, again=nexts[0].text)


def assert_told(ends: list[End], culprit: int, kind: str, *parts: str, call: int = BAD_CALL) -> None:
    """Assert that one rank failed, and all others ended soon with a StageError that says which, when and why."""
    failed = ends[culprit]
    assert failed.kind == kind, ends
    assert failed.calls == call, ends
    for part in parts:
        assert part in failed.text, ends
    head = f"stage {culprit} (rank {culprit}) failed in call {call}: {kind}: "
    for rank, end in enumerate(ends):
        assert failed.text in end.again, f"rank {rank} forgot the reason: {ends}"
        assert end.again.startswith(head), f"rank {rank} forgot the place: {ends}"
        assert abs(end.at - failed.at) < SOON, ends
        if rank != culprit:
            assert end.kind == "StageError", f"rank {rank}: {ends}"
            assert end.text == end.again, ends


def train_bad_loss(rank: int, world_size: int) -> End:
    return train(build(3, loss_fn=Misbehaves("explode")), batches())


def mistake(x: Tensor) -> Tensor:
    raise TypeError("my own mistake")


def misbehaving(
    num_stages: int, stage: int, deed: str, other: str = "", ddg: dict[str, Any] | None = None, **options: Any
) -> Any:
    """Return an engine whose `stage` does its `deed` in its last layer, and all others do `other` in theirs."""
    layers = [Misbehaves() for _ in range(2 * num_stages)]
    for k in range(num_stages):
        layers[2 * k + 1] = Misbehaves(deed if k == stage else other, **options)
    return build(num_stages, layers, **({} if ddg is None else {"ddg": ddg}))


def assert_lost(outcomes: list[Outcome], lost: int, exit_code: int = -signal.SIGKILL) -> None:
    """One rank is gone; all others raise soon (a hung one would be reported as such) and name it."""
    report = "\n".join(map(str, outcomes))
    for outcome in outcomes:
        if outcome.rank == lost:
            assert (outcome.state, outcome.exit_code) == ("died", exit_code), report
        else:
            assert (outcome.state, outcome.exc_type) == ("raised", "StageError"), report
            assert f"stage {lost} (rank {lost}) is lost" in outcome.message, report
