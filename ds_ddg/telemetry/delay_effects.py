"""What delay does to a stage: how far its weights move, and its gradients turn, before a gradient is used.

A gradient that a stage uses in tick n is of micro-batch n - d_k, at the weights of that forward. The gradient that is
fresh for the weights of tick n is of micro-batch n, on other data, and comes d_k ticks later: the two are compared
when it is here, from the backward passes that there are anyway. So nothing is computed twice, no stage asks another,
and the hooks that look on leave the training as it is, to the last bit.

Gradients of two micro-batches differ by their data, too. How much is seen in two that follow each other: where
`gradient_cosine` falls far below `gradient_cosine_next`, the direction turns within the delay.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ds_ddg.weights.versions import WeightVersions

__all__ = ["EFFECTS", "DelayEffects", "LateNumber"]

EFFECTS = ("weight_drift", "gradient_cosine", "gradient_cosine_next")
"""The names of the values of `DelayEffects`."""

_EVERY = 10
"""The number of calls from one sample to the next."""
_SAMPLED = 2**24
"""The number of elements of a gradient up to which all of it is compared; of a larger one about so many are."""


class LateNumber:
    """A number that a device computes, known to the host a little later and without a wait."""

    def __init__(self) -> None:
        self._coming: deque[tuple[Tensor, Any]] = deque()
        self._newest: float | None = None

    def set(self, number: Tensor) -> None:
        """Take the value of a tensor with one element, once its device has computed it."""
        if number.device.type == "cpu":
            self._newest = float(number)
            return
        host = torch.empty((), dtype=number.dtype, pin_memory=True)
        host.copy_(number, non_blocking=True)
        event = torch.get_device_module(number.device).Event()
        event.record(torch.get_device_module(number.device).current_stream(number.device))
        self._coming.append((host, event))

    def get(self) -> float | None:
        """Return the newest value that is known; None if there is none, or it is not finite."""
        while self._coming and self._coming[0][1].query():
            self._newest = float(self._coming.popleft()[0])
        return self._newest if self._newest is not None and math.isfinite(self._newest) else None

    def forget(self) -> None:
        """Have no value until the next is set."""
        self._coming.clear()
        self._newest = None


class DelayEffects:
    """Samples the effects of delay on one stage.

    Args:
        versions: returns the weight versions of the stage.
        delay: returns d_k, the number of ticks between a forward and its backward, at present.
    """

    def __init__(self, versions: Callable[[], WeightVersions], delay: Callable[[], int]) -> None:
        self._versions, self._delay = versions, delay
        self._numbers = {name: LateNumber() for name in EFFECTS}
        self.forget()

    def forget(self) -> None:
        """Forget all samples; nothing may be in flight."""
        self._calls = 0
        self._age: int | None = None
        """The number of backward passes since the one whose gradient is compared; None: no sample is on its way."""
        self._kept: dict[Tensor, Tensor] = {}
        for number in self._numbers.values():
            number.forget()

    def end_call(self) -> None:
        """End a call; now and then measure the drift, and begin to sample gradients with the next backward."""
        self._calls += 1
        if self._calls % _EVERY or (delay := self._delay()) == 0:
            return
        if (drift := self._versions().drift()) is not None:
            self._numbers["weight_drift"].set(drift)
        if self._age is None:
            self._age, self._of = 0, delay

    @property
    def values(self) -> tuple[float | None, ...]:
        """The newest values in the order of `EFFECTS`; None for one that is not known."""
        return tuple(number.get() for number in self._numbers.values())

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Surround the backward pass of a micro-batch, one after the other."""
        if self._age is None:
            yield
            return
        age, self._age = self._age, self._age + 1
        names = [name for name, at in zip(EFFECTS[1:], (self._of, 1), strict=True) if at == age]
        if age > 0 and not names:
            yield
            return
        found: dict[Tensor, Tensor] = {}
        watched = _sample(self._versions().parameters) if age == 0 else list(self._kept)
        handles = [p.register_hook(partial(_collect, found, p)) for p in watched if p.requires_grad]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        with torch.no_grad():
            if age == 0:
                self._kept = {p: gradient.clone() for p, gradient in found.items()}
            elif found:
                cosine = _cosine([(self._kept[p], gradient) for p, gradient in found.items()])
                for name in names:
                    self._numbers[name].set(cosine)
        if age == self._of:
            self._age, self._kept = None, {}


def _collect(found: dict[Tensor, Tensor], parameter: Tensor, gradient: Tensor) -> None:
    if gradient.layout is not torch.strided or not gradient.is_floating_point():
        return  # sparse ones, say: a diagnosis is not worth an operation that they may not have
    # Activation checkpointing may find a gradient in several parts.
    found[parameter] = found[parameter] + gradient.detach() if parameter in found else gradient.detach()


def _cosine(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the cosine between two vectors, given in pairs of their parts."""
    a, b = ([pair[i].float() for pair in pairs] for i in (0, 1))
    product = sum((x * y).sum() for x, y in zip(a, b, strict=True))
    return product / (torch.stack(torch._foreach_norm(a)).norm() * torch.stack(torch._foreach_norm(b)).norm())


def _sample(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the trained ones of `parameters`, or of very many every so manieth."""
    trained = [p for p in parameters if p.requires_grad]
    every = -(-sum(p.numel() for p in trained) // _SAMPLED)
    return trained[:: max(1, every)]
