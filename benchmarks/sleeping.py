"""Stages that take their time off the CPU, and what a call of them takes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

FORWARD, BACKWARD = 0.030, 0.060
TICK = FORWARD + BACKWARD


def sleeping_layer(scale: float = 1.0, touches: bool = True) -> Any:
    """Make a layer with one weight that takes its time, forward and backward.

    Args:
        scale: relative time.
        touches: whether it multiplies its input by the weight; otherwise it hands it on, at no cost for any size.
    """
    import torch

    class Sleep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any) -> Any:
            time.sleep(FORWARD * scale)
            return x.clone() if touches else x.view_as(x)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            time.sleep(BACKWARD * scale)
            return gradient, None if touches else torch.zeros(16)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(16))

        def forward(self, x: Any) -> Any:
            return Sleep.apply(x * self.weight, None) if touches else Sleep.apply(x, self.weight)

    return Layer()


class Took(NamedTuple):
    """The time that a call took on one stage."""

    seconds: float
    queued: float | None
    """The seconds in which its thread could have run and no core was free; None if the system does not say."""


def per_call(engine: Any, data: Any, warm_up: int, calls: int) -> Took:
    """Measure this stage in steady state: return the mean over `calls`, behind `warm_up` others."""
    for _ in range(warm_up):
        engine.train_batch(data)
    before, start = _queued(), time.perf_counter()
    for _ in range(calls):
        engine.train_batch(data)
    seconds, after = time.perf_counter() - start, _queued()
    return Took(seconds / calls, None if before is None or after is None else (after - before) / calls)


def _queued() -> float | None:
    """Return the seconds that this thread has been in a run queue (Linux, Documentation/scheduler/sched-stats.rst)."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except OSError:
        return None
