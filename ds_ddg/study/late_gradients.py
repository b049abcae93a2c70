"""Gradients that reach ``.grad`` some backward passes after they were computed.

    first gradient of pass n     what has waited since pass n - d of its parameter is added to ``.grad``
    each gradient of pass n      is taken from ``.grad`` as soon as autograd has put it there, and waits

Passes are counted, not gradients: a parameter that a pass does not use has the same delay as the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook

from ds_ddg.staleness.apply import DELAYED

__all__ = ["LateGradients"]

_HOOKED_FOR = 4096
"""Passes after which the hooks are made anew: torch keeps a number for each pass that one has seen."""


class LateGradients:
    """The gradients that wait, of every parameter.

    Args:
        delays: of each trained parameter, in backward passes; 0 leaves its gradients alone.
    """

    def __init__(self, delays: Mapping[Tensor, int]) -> None:
        self.delays = dict(delays)
        """The delay of each parameter."""
        self.passes = 0
        """The number of backward passes so far."""
        self._waiting: dict[Tensor, deque[tuple[int, Tensor]]] = {p: deque() for p, d in self.delays.items() if d > 0}
        """Gradients with the number of their pass, the oldest first."""
        self._set_aside: dict[Tensor, Tensor | None] = {}
        """The sums in ``.grad`` of parameters that autograd is about to write a new gradient to."""
        self._handles: list[Any] = []
        self._hooked_at = 0
        self._register()

    def check(self) -> None:
        """Between two passes: raise RuntimeError if a gradient went elsewhere than to ``.grad``."""
        self._refuse_others()
        if self.passes - self._hooked_at >= _HOOKED_FOR:
            self._register()

    def state(self) -> dict[str, Any]:
        """Return what is in flight, as plain data and tensors."""
        waiting = [(i, *entry) for i, p in enumerate(self.delays) for entry in self._waiting.get(p, ())]
        return {"delays": list(self.delays.values()), "passes": self.passes, "waiting": waiting}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Take over what `state` had in flight; None: nothing.

        Raises:
            ValueError: it is of other delays.
        """
        state = state or {"delays": list(self.delays.values()), "passes": 0, "waiting": []}
        if list(state["delays"]) != list(self.delays.values()):
            raise ValueError(
                "the gradients in flight were saved with other delays; load them with the stages, micro-batches and "
                f"slack that they were saved with, or remove them from the state first (its key {DELAYED!r})"
            )
        order = list(self.delays)
        self.passes = state["passes"]
        for queue in self._waiting.values():
            queue.clear()
        for index, number, gradient in state["waiting"]:
            parameter = order[index]
            self._waiting[parameter].append((number, gradient.to(parameter.device, copy=True)))

    def _register(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._hooked_at = self.passes
        # Hooks of a parameter run in this order.
        self._handles = [register_multi_grad_hook(tuple(self.delays), self._begin, mode="any")]
        for parameter in self._waiting:
            self._handles.append(parameter.register_hook(partial(self._before_accumulation, parameter)))
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._after_accumulation))

    @torch.no_grad()
    def _begin(self, _: Tensor) -> None:
        """Add what is due to ``.grad``, when the first gradient of a pass comes."""
        self._refuse_others()
        for parameter, queue in self._waiting.items():
            if queue and queue[0][0] == self.passes - self.delays[parameter]:
                gradient = queue.popleft()[1]
                if parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad.add_(gradient)
        self.passes += 1

    def _refuse_others(self) -> None:
        """Raise RuntimeError if autograd has computed a gradient and not put it into ``.grad``."""
        for parameter, total in self._set_aside.items():
            parameter.grad = total
        if self._set_aside:
            self._set_aside = {}
            raise RuntimeError(
                "a gradient of a delayed parameter was computed and not accumulated, as torch.autograd.grad and "
                "backward(inputs=...) do it; in a delayed training call loss.backward()"
            )

    def _before_accumulation(self, parameter: Tensor, _: Tensor) -> None:
        self._set_aside[parameter] = parameter.grad
        parameter.grad = None

    def _after_accumulation(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, self._set_aside.pop(parameter)
        assert gradient is not None, "autograd has just put it there"
        if gradient.requires_grad:
            raise RuntimeError(
                "backward(create_graph=True) makes gradients that are differentiated themselves, which no stage of a "
                "pipeline can; leave it out in a delayed training"
            )
        self._waiting[parameter].append((self.passes - 1, gradient))
