"""Keep DeepSpeed's optimizer path inside one stage.

DeepSpeed takes the pipe axis for a "model parallel" axis, so gradient norms and overflow flags are all-reduced across
stages in every step: one such collective per call brings the whole bubble back. Its optimizers and its clipping only
ask the grid for that group, so they get a view of the grid in which the group ends at the stage's border.

The engine's own ``mpu`` must stay the real grid: checkpoint file names come from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import Tensor

from ds_ddg.weights.single_rank import local_if_single_rank

__all__ = ["StageLocalGrid", "StagePeers", "clip", "clip_stage_gradients", "square_norm"]


class StagePeers:
    """All ranks of one stage, its replicas and its tensor slices, which can agree on a number.

    Args:
        groups: process groups that together join these ranks, for tensors on the CPU, as a result on a device would
            have to wait for all work there. Empty: the stage has one rank.
    """

    def __init__(self, groups: Sequence[Any]) -> None:
        self._groups = groups

    def largest(self, number: int) -> int:
        """Return the largest `number` of all ranks of the stage; collective over them."""
        if not self._groups:
            return number
        largest = torch.tensor([number])
        for group in self._groups:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        return int(largest.item())


class StageLocalGrid:
    """A view of the grid in which "model parallel" means the tensor slices of one stage.

    Args:
        grid: DeepSpeed's ``PipelineParallelGrid``.
    """

    def __init__(self, grid: Any) -> None:
        self._grid = grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def get_model_parallel_group(self) -> Any:
        """Return the process group of the tensor slices of this stage."""
        return local_if_single_rank(self._grid.get_slice_parallel_group())

    def get_data_parallel_group(self) -> Any:
        """Return the process group of the replicas of this stage."""
        return local_if_single_rank(self._grid.get_data_parallel_group())

    def get_model_parallel_rank(self) -> int:
        """Return the rank among the tensor slices of this stage."""
        return int(self._grid.get_slice_parallel_rank())

    def get_model_parallel_world_size(self) -> int:
        """Return the number of tensor slices of this stage."""
        return int(self._grid.get_slice_parallel_world_size())

    def get_pipe_parallel_world_size(self) -> int:
        """Return 1 stage in this view: DeepSpeed would sum the norms of expert gradients over the pipe axis."""
        return 1

    get_pipeline_model_parallel_world_size = get_pipe_parallel_world_size

    def mean_over_replicas(self, norm: Tensor) -> Tensor:
        """Return the mean of `norm` over the replicas of this stage, in the arithmetic of ``clip_grad_norm_``."""
        group = self._grid.get_data_parallel_group()
        replicas = dist.get_world_size(group)
        if replicas > 1:
            norm = norm * 1.0 / float(replicas)
            dist.all_reduce(norm, group=group)
        return norm


def clip_stage_gradients(
    parameters: Iterable[torch.nn.Parameter],
    max_norm: float,
    slices: StageLocalGrid,
    known: float | None = None,
    device: torch.device | None = None,
    experts: bool = False,
) -> Tensor | None:
    """Clip the gradients of one stage by their norm.

    After their all-reduce the gradients are the same on every replica, and so is their norm: only the tensor slices of
    a stage communicate. Parameters that are not split over the slices (``model_parallel``, as DeepSpeed reads it)
    count once. With `experts` each replica also has gradients of its own, so the norm is the mean over the replicas,
    as in DeepSpeed.

    The arithmetic is that of DeepSpeed's fp32 clip, so that one stage equals DeepSpeed to the last bit; with several,
    DeepSpeed counts only stage 0's gradients, on every stage (``clip_grad_norm_`` in deepspeed/runtime/utils.py).
    On a GPU nothing is read back.

    Args:
        parameters: the parameters of the stage.
        max_norm: the norm to clip to.
        slices: the tensor slices of the stage.
        known: the norm to clip by in place of the measured one.
        device: the device on which the slices communicate.
        experts: whether the stage has expert layers.

    Returns:
        The norm of this stage, as a 0-dim tensor; None if it has no gradient.
    """
    having = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in having if p.grad is not None]
    if slices.get_model_parallel_world_size() == 1:
        if not gradients:
            return None
        square = square_norm(gradients)
    else:
        first = slices.get_model_parallel_rank() == 0
        own = [p.grad for p in having if p.grad is not None and (first or is_model_parallel_parameter(p))]
        square = square_norm(own) if own else torch.zeros((), device=device)
        dist.all_reduce(square, group=slices.get_model_parallel_group())
    norm = square.pow(0.5)
    if experts:
        norm = slices.mean_over_replicas(norm)
    clip(gradients, max_norm, norm if known is None else torch.full_like(norm, known))
    return norm


def clip(gradients: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale `gradients` in place down to `max_norm`, with `norm`, a 0-dim tensor, taken as their norm."""
    if math.isinf(max_norm):
        return
    # On the CPU comparing costs less than multiplying by one; near the border the rounding below has to decide.
    if norm.is_cpu and norm.item() < 0.99 * max_norm - 1e-6:
        return
    coefficient = torch.clamp(torch.full_like(norm, max_norm) / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(coefficient)


def square_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the square of the norm of all `gradients` together, in the arithmetic of DeepSpeed's fp32 clip."""
    return torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).pow(2.0).sum()
