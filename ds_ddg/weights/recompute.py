"""The second forward of a micro-batch: for "activations": "recompute", and within activation checkpointing.

It has to see all that the first forward saw: weights (``versions.py``), buffers, random numbers and autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["ForwardState", "PastBuffers", "discard_saved_tensors", "guard_reentrant_checkpoint", "with_past_buffers"]

Buffers = dict[tuple[torch.nn.Module, str], Tensor | None]
"""Values of buffers, by their module and name."""

_SMALL = 2**16
"""Elements of a buffer up to which a copy for every micro-batch in flight costs next to nothing."""


class ForwardState:
    """The state that a forward reads besides its input, its weights and its buffers: random numbers and autocast.

    Args:
        device: the device of the stage. Reading the state of its generator is no work for the device.
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
    def restored(self) -> Iterator[None]:
        """Inside this block random numbers and autocast are as when this was made; afterwards as they are now."""
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
    """Copies of buffers from before each forward; micro-batches that saw the same large buffer share one copy."""

    def __init__(self) -> None:
        self._newest: dict[tuple[torch.nn.Module, str], tuple[int, ref[Tensor], ref[Tensor]]] = {}
        """The version of each large buffer, the buffer and its copy, which lives as long as a micro-batch needs it."""

    def now(self, module: torch.nn.Module) -> Buffers:
        """Return copies of the buffers of `module`, None for each that is None."""
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
    """Inside this block a second forward sees the buffers `past` and leaves today's (BatchNorm's statistics) alone.

    The forward works on copies: writing the old values back in place would look to autograd like a change of what the
    graph just saved.
    """
    homes = list(_buffers(module))
    copies: dict[Any, Tensor] = {}
    for place, buffer in homes:
        value = past.get(place, buffer)
        shared = place if buffer is None else id(buffer)  # two modules may share a buffer
        if value is not None and shared not in copies:
            copies[shared] = value.clone()
        owner, name = place
        owner._buffers[name] = None if value is None else copies[shared]
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
def discard_saved_tensors(stage_id: int) -> Iterator[None]:
    """Inside this block a forward saves no tensors for a backward, though its outputs say whether they need one.

    Autograd is on, so that the kernels are those of the second forward (attention has several).

    Raises:
        RuntimeError: a layer of stage `stage_id` computes gradients in its own forward.
    """
    try:
        with saved_tensors_hooks(_drop, _drop):
            yield
    except (RuntimeError, TypeError) as error:
        if "saved tensor" not in str(error):
            raise
        raise RuntimeError(
            f"a layer of stage {stage_id} computes gradients in its own forward, of which "
            '"activations": "recompute" keeps nothing; use "activations": "keep"'
        ) from error


def _drop(_: Any) -> Any:
    """Save nothing, for a graph that runs no backward."""


@contextmanager
def guard_reentrant_checkpoint(module: Any) -> Iterator[None]:
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
