"""Isolation of a part of a model that runs: its gradients, its inputs and the random numbers stay as they were."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["cut", "fresh", "gradients_put_back", "leaves", "tensors", "unchanged_random"]


def tensors(values: Any) -> list[Tensor]:
    """Yield the tensors in `values`, however nested."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def cut(tensor: Tensor) -> Tensor:
    """Return the same numbers as a leaf of the graph, which needs a gradient if `tensor` does."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def fresh(values: Any) -> Any:
    """Copy the input, so that a layer may write into it; copies are part of a graph where the input is."""
    return tree_map_only(Tensor, lambda tensor: cut(tensor).clone(), values)


def leaves(roots: Iterable[Tensor]) -> list[Tensor]:
    """Return every tensor in whose ``.grad`` a backward pass from `roots` adds, wherever a function has it from."""
    found = [root for root in roots if root.requires_grad and root.grad_fn is None]
    stack: list[Any] = [root.grad_fn for root in roots]
    seen = {None, *stack}
    while stack:
        node = stack.pop()
        found += [node.variable] if type(node).__name__ == "AccumulateGrad" else []
        ahead = {following for following, _ in getattr(node, "next_functions", ())} - seen
        seen |= ahead
        stack += ahead
    return found


@contextmanager
def gradients_put_back(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside this block `tensors` start without gradients, as in a call's first backward; then theirs are put back."""
    before = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    try:
        yield
    finally:
        for tensor, gradient in zip(tensors, before, strict=True):
            tensor.grad = gradient


@contextmanager
def unchanged_random(device: torch.device) -> Iterator[None]:
    """Inside this block random numbers are drawn without a trace: the model is initialised after its profile."""
    accelerator = get_accelerator()
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    on_device = accelerator.get_rng_state(device.index)
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        accelerator.set_rng_state(on_device, device.index)
