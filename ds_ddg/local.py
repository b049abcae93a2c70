"""Keep DeepSpeed's optimizer path inside one stage.

DeepSpeed takes the pipe axis for a "model parallel" axis, so gradient norms and overflow flags are all-reduced across
stages in every step: one such collective per call brings the whole bubble back. Its optimizers and its clipping only
ask the grid for that group, so they get a view of the grid in which the group ends at the stage's border.

The engine's own ``mpu`` must stay the real grid: checkpoint file names come from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import Tensor

from ds_ddg.alone import alone_if_one

__all__ = [
    "Buffers",
    "Circumstances",
    "PastBuffers",
    "StageLocalGrid",
    "clip",
    "clip_stage_gradients",
    "never_detached",
    "with_past_buffers",
]


Buffers = dict[tuple[torch.nn.Module, str], Tensor | None]
"""Values of buffers, by where they are."""

_SMALL = 2**16
"""Elements of a buffer that it costs nothing to speak of to copy for every micro-batch in flight."""


class StageLocalGrid:
    """The grid with "model parallel" meaning the tensor slices of one stage."""

    def __init__(self, grid: Any) -> None:
        self._grid = grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def get_model_parallel_group(self) -> Any:
        """Process group of the tensor slices of this stage."""
        return alone_if_one(self._grid.get_slice_parallel_group())

    def get_data_parallel_group(self) -> Any:
        """Process group of the replicas of this stage."""
        return alone_if_one(self._grid.get_data_parallel_group())

    def get_model_parallel_rank(self) -> int:
        """Rank among the tensor slices of this stage."""
        return int(self._grid.get_slice_parallel_rank())

    def get_model_parallel_world_size(self) -> int:
        """Number of tensor slices of this stage."""
        return int(self._grid.get_slice_parallel_world_size())


def clip_stage_gradients(
    parameters: Iterable[torch.nn.Parameter],
    max_norm: float,
    slices: StageLocalGrid,
    known: float | None = None,
    device: torch.device | None = None,
) -> Tensor | None:
    """Clip to `max_norm` by the norm over this stage, or by the `known` one; the stage's, None without gradient.

    After their all-reduce the gradients are the same on every replica, and so is their norm: only the tensor slices of
    a stage communicate. What they do not share out (``model_parallel``, as DeepSpeed reads it) counts once.
    The arithmetic is that of DeepSpeed's fp32 clip, so that one stage equals DeepSpeed to the last bit; with several,
    DeepSpeed counts only stage 0's gradients, on every stage (``clip_grad_norm_`` in deepspeed/runtime/utils.py).
    On a GPU nothing is read back. `device` is where the slices communicate.
    """
    having = [p for p in parameters if p.grad is not None]
    gradients = [p.grad for p in having if p.grad is not None]
    if slices.get_model_parallel_world_size() == 1:
        if not gradients:
            return None
        square = _square_norm(gradients)
    else:
        first = slices.get_model_parallel_rank() == 0
        own = [p.grad for p in having if p.grad is not None and (first or is_model_parallel_parameter(p))]
        square = _square_norm(own) if own else torch.zeros((), device=device)
        dist.all_reduce(square, group=slices.get_model_parallel_group())
    norm = square.pow(0.5)
    clip(gradients, max_norm, norm if known is None else torch.full_like(norm, known))
    return norm


def clip(gradients: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale `gradients`, whose norm is taken to be `norm`, down to `max_norm`."""
    # On the CPU it costs less to look than to multiply by one; near the border rounding decides, and not here.
    if norm.is_cpu and norm.item() < 0.99 * max_norm - 1e-6:
        return
    coefficient = torch.clamp(torch.full_like(norm, max_norm) / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(coefficient)


def _square_norm(gradients: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).pow(2.0).sum()


class Circumstances:
    """What a forward depends on besides its input, its weights and its buffers: random numbers and autocast.

    Args:
        device: where the stage computes. Reading the state of its generator is no work for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._type = device.type
        self._random = torch.get_rng_state()
        self._on_device = {}
        if device.type != "cpu":
            self._on_device = {device.index: torch.get_device_module(device).get_rng_state(device)}
        # DeepSpeed's own setting takes precedence on a GPU, but on the CPU that of the script remains.
        self._autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside this block they are as they were; afterwards as they are now."""
        enabled, dtype = self._autocast
        with (
            torch.random.fork_rng(self._on_device, device_type="cuda" if self._type == "cpu" else self._type),
            torch.autocast(self._type, dtype, enabled),
        ):
            torch.set_rng_state(self._random)
            for index, state in self._on_device.items():
                torch.get_device_module(self._type).set_rng_state(state, index)
            yield


class PastBuffers:
    """Buffers as they were before each forward; of large ones, micro-batches that saw the same values share a copy."""

    def __init__(self) -> None:
        self._newest: dict[tuple[torch.nn.Module, str], tuple[int, ref[Tensor], ref[Tensor]]] = {}
        """Version of a large buffer, the buffer, and its copy, which lives as long as a micro-batch needs it."""

    def now(self, module: torch.nn.Module) -> Buffers:
        """Copies of what the buffers of `module` are, None where there is none yet."""
        return {place: buffer if buffer is None else self._copy(place, buffer) for place, buffer in _buffers(module)}

    def _copy(self, place: tuple[torch.nn.Module, str], buffer: Tensor) -> Tensor:
        # Not every write leaves a new version: neither that of BatchNorm's kernel nor one through ``.data``.
        if buffer.numel() <= _SMALL:
            return buffer.detach().clone()
        if place in self._newest:
            version, same, newest = self._newest[place]
            copy = newest()
            if copy is not None and same() is buffer and version == buffer._version:
                return copy
        copy = buffer.detach().clone()
        self._newest[place] = buffer._version, ref(buffer), ref(copy)
        return copy


@contextmanager
def with_past_buffers(module: torch.nn.Module, past: Buffers) -> Iterator[None]:
    """A second forward of a micro-batch sees what the first saw, and leaves no trace (BatchNorm's running statistics).

    The forward inside the block works on copies: writing the old values back in place would look to autograd like a
    change of what the graph just saved.
    """
    homes = list(_buffers(module))
    copies: dict[int, Tensor] = {}  # two modules may share a buffer
    for (owner, name), buffer in homes:
        value = past.get((owner, name), buffer)
        if value is not None and buffer is not None:
            value = copies.setdefault(id(buffer), value.clone())
        owner._buffers[name] = value if value is None or buffer is not None else value.clone()
    try:
        yield
    finally:
        for (owner, name), buffer in homes:
            owner._buffers[name] = buffer


def _buffers(module: torch.nn.Module) -> Iterator[tuple[tuple[torch.nn.Module, str], Tensor | None]]:
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            yield (owner, name), buffer


@contextmanager
def never_detached(module: Any) -> Iterator[None]:
    """Inside this block, layers are not checkpointed reentrantly where none of their inputs requires a gradient.

    Reentrant checkpointing cuts what it returns off its parameters then: an embedding of integers, or the first layers
    behind frozen ones, would silently stay as they are.
    """
    checkpoint = module.activation_checkpoint_func

    def checkpoint_if_attached(function: Callable[..., Any], *args: Any) -> Any:
        attached = any(torch.is_tensor(arg) and arg.requires_grad for arg in args)
        return checkpoint(function, *args) if attached else function(*args)

    module.activation_checkpoint_func = checkpoint_if_attached
    try:
        yield
    finally:
        module.activation_checkpoint_func = checkpoint
