"""Keep DeepSpeed's optimizer path inside one stage.

DeepSpeed takes the pipe axis for a "model parallel" axis, so gradient norms and overflow flags are all-reduced across
stages in every step: one such collective per call brings the whole bubble back. Its optimizers and its clipping only
ask the grid for that group, so they get a view of the grid in which the group ends at the stage's border.

The engine's own ``mpu`` must stay the real grid: checkpoint file names come from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["IdleOptimizer", "StageLocalGrid", "clip_stage_gradients", "fold_buffers_back"]


class StageLocalGrid:
    """The grid with "model parallel" meaning the tensor slices of one stage."""

    def __init__(self, grid: Any) -> None:
        self._grid = grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def get_model_parallel_group(self) -> Any:
        """Process group of the tensor slices of this stage."""
        return self._grid.get_slice_parallel_group()

    def get_model_parallel_rank(self) -> int:
        """Rank among the tensor slices of this stage."""
        return int(self._grid.get_slice_parallel_rank())

    def get_model_parallel_world_size(self) -> int:
        """Number of tensor slices of this stage."""
        return int(self._grid.get_slice_parallel_world_size())


def clip_stage_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> Tensor | None:
    """Clip to `max_norm` by the norm over this stage alone; returns that norm, or None if there is no gradient.

    After their all-reduce the gradients are the same on every replica, and so is their norm: nothing is communicated.
    The arithmetic is that of DeepSpeed's fp32 clip, so that one stage equals DeepSpeed to the last bit; with several,
    DeepSpeed counts only stage 0's gradients, on every stage (``clip_grad_norm_`` in deepspeed/runtime/utils.py).
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return None
    norm = torch.stack([gradient.norm(2.0) for gradient in gradients]).pow(2.0).sum().pow(0.5)
    coefficient = torch.clamp(norm.new_tensor(max_norm) / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(coefficient)
    return norm


class IdleOptimizer:
    """Stands in for an optimizer that has no gradient to step on; all else is the real one's."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self) -> None:
        """No gradient, no step."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """No gradient, nothing to clear."""


@contextmanager
def fold_buffers_back(module: torch.nn.Module) -> Iterator[None]:
    """Let a second forward of the same micro-batch leave no trace in the buffers (BatchNorm's running statistics).

    The forward inside the block works on copies: writing the old values back in place would look to autograd like a
    change of what the graph just saved.
    """
    homes = [(m, name, b) for m in module.modules() for name, b in m._buffers.items() if b is not None]
    for owner, name, buffer in homes:
        owner._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for owner, name, buffer in homes:
            owner._buffers[name] = buffer
