"""Layers whose times are known: measured ones that sleep, and records of measurements."""

from __future__ import annotations

import time

from torch import Tensor, nn

from ds_ddg.analysis.balance import LayerCost


def costs(*times: float) -> list[LayerCost]:
    """Layers that cost this many milliseconds and nothing else."""
    return [LayerCost(f"layer{i}", time, 0) for i, time in enumerate(times)]


class Sleeper(nn.Module):
    """A layer whose forward takes so many seconds."""

    def __init__(self, forward: float = 0.0, width: int = 4) -> None:
        super().__init__()
        self.seconds, self.linear = forward, nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.linear(x)
