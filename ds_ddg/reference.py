"""The oracle: DDG of all stages in one process, from the equation. The engine must equal it bit for bit.

With g_j = grad f(w^{j//M}; x_j), the exact gradient at the weights that the forward of micro-batch j saw on every
stage,

    w_k^{t+1} = w_k^t - lr_t * (1/M) * sum over n = tM..tM+M-1 of [g_{n - d_k}]_k      (terms with n < d_k are absent)

Since the forward of call t sees w^t everywhere, g_j is plain autograd over the whole model, taken at once; the delay
is a queue. That is ``weights="stash"``, with either setting of `activations`. For ``weights="current"`` the backward
itself waits, and the two variants differ in what it finds: old activations ("keep") or a forward run again
("recompute", Features Replay).

It shares no code with the engine. Run it on your own layers to check what DDG computes, or to try a delay without
a pipeline.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["Reference"]

_Values = tuple[Tensor, ...]
_State = dict[str, Tensor]
"""Parameters or buffers of a stage, by every name that leads there."""


@dataclass
class _Between:
    """The gradients that the stages hand back to earlier stages, for one micro-batch."""

    errors: list[Any]
    """Gradient of each stage's output."""
    ties: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    """Gradients of parameters that belong to an earlier stage."""


class Reference:
    """Mirrors the engine: ``train_batch(data_iter)`` and ``drain()``.

    Args:
        stages: the model in K parts; each maps a tensor or tuple of tensors to the same.
        loss_fn: ``loss_fn(outputs, labels)`` to a scalar.
        optimizers: one for each stage.
        micro_batches: M, micro-batches per call.
        slack: extra micro-batches of delay per hop.
        weights: "stash" or "current".
        activations: "keep" or "recompute"; only matters with "current".
        clip: largest gradient norm; 0 for none.
        clip_by: "stage": the norm of each stage. "global": the norm of all stages, in the newest call whose norm every
            stage can know: call t - L - 2 in call t, with L = ceil(d_0 / M); until there is one, as "stage".
        schedulers: learning-rate schedulers, stepped once per call.

    Raises:
        ValueError: an argument has another value than these.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        loss_fn: Callable[[Any, Any], Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        micro_batches: int = 1,
        slack: int = 0,
        weights: str = "stash",
        activations: str = "keep",
        clip: float = 0.0,
        clip_by: str = "stage",
        schedulers: Sequence[Any] = (),
    ) -> None:
        _allow("weights", weights, ("stash", "current"))
        _allow("activations", activations, ("keep", "recompute"))
        _allow("clip_by", clip_by, ("stage", "global"))
        for name, value, least in (("micro_batches", micro_batches, 1), ("slack", slack, 0), ("clip", clip, 0)):
            kinds = (int, float) if name == "clip" else int
            if not isinstance(value, kinds) or not value >= least:
                raise ValueError(f"{name} must be {least} or more, got {value!r}")
        if not stages or len(stages) != len(optimizers):
            raise ValueError(
                f"needs an optimizer for each stage, got {len(stages)} stages, {len(optimizers)} optimizers"
            )
        self.stages, self.loss_fn, self.optimizers, self.schedulers = stages, loss_fn, optimizers, schedulers
        self.micro_batches, self.clip = micro_batches, clip
        self.clip_globally = clip_by == "global"
        self.norms: list[float] = []
        """The norm of the gradients of all stages, call by call."""
        self.told = -1
        """The newest call whose loss, and the norm of the call before, every stage knows."""
        self.delays = [(len(stages) - 1 - k) * (1 + slack) for k in range(len(stages))]
        self.backward = {"stash": self._gradient_now, "current": self._gradient_later}[weights]
        self.replay = activations == "recompute"
        # A tied parameter belongs to the earliest stage that holds it, and has the delay of that stage.
        seen: set[nn.Parameter] = set()
        self.owned: list[list[nn.Parameter]] = []
        for stage in stages:
            self.owned.append([p for p in stage.parameters() if p not in seen])
            seen.update(self.owned[-1])
        # Each stage is a process with random numbers of its own.
        self.rng = [torch.get_rng_state() for _ in stages]
        self.waiting: list[deque[Callable[[], None]]] = [deque() for _ in stages]

    def train_batch(self, data_iter: Iterator[tuple[Any, Any]]) -> Tensor:
        """Run one call: M ticks on every stage, then one update of each stage that a gradient has reached.

        Args:
            data_iter: yields M micro-batches ``(inputs, labels)``; inputs are a tensor or a tuple of tensors.

        Returns:
            The mean loss of this call's own micro-batches, 0-dim and detached.

        Raises:
            StopIteration: the data ended inside the call, which then makes no update.
        """
        total = torch.zeros(())
        arrived = set()
        for _ in range(self.micro_batches):
            inputs, labels = next(data_iter)
            total = total + self.backward(_as_tuple(inputs), labels)
            for k, delay in enumerate(self.delays):
                if len(self.waiting[k]) > delay:
                    self.waiting[k].popleft()()
                    arrived.add(k)
        call = len(self.norms)
        self.norms.append(math.sqrt(sum(self._update(k) for k in sorted(arrived))))
        self.told = max(self.told, 0, call - -(-self.delays[0] // self.micro_batches))
        for scheduler in self.schedulers:
            scheduler.step()
        return total / self.micro_batches

    def drain(self) -> None:
        """Finish all backward passes in flight: one update whenever M gradients have come in, and one for the rest."""
        for k in reversed(range(len(self.stages))):
            while self.waiting[k]:
                for _ in range(min(self.micro_batches, len(self.waiting[k]))):
                    self.waiting[k].popleft()()
                self._update(k)
        self.told = len(self.norms) - 1

    def _update(self, k: int) -> float:
        """Clip and step stage `k`; return the square of the norm of its gradients before the clip."""
        for parameter in self.owned[k]:
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # as DeepSpeed does for a parameter without use
        gradients = [p.grad for p in self.owned[k] if p.grad is not None]
        norm = torch.zeros(())
        if gradients:
            norm = torch.stack([g.norm(2.0) for g in gradients]).square().sum().sqrt()
        if self.clip > 0:
            known = self.norms[self.told - 1] if self.clip_globally and self.told > 0 else 0.0
            largest = torch.tensor(known) if known > 0 else norm
            for gradient in gradients:
                gradient.mul_(torch.clamp(torch.tensor(self.clip) / (largest + 1e-6), max=1.0))
        self.optimizers[k].step()
        self.optimizers[k].zero_grad()
        return float(norm) ** 2

    def _gradient_now(self, inputs: _Values, labels: Any) -> Tensor:
        """Run plain autograd over the whole model; each stage's part of the gradient joins its queue."""
        values = inputs
        for k in range(len(self.stages)):
            values = self._forward(k, values)
        loss = self._loss(values, labels)
        parameters = [[p for p in owned if p.requires_grad] for owned in self.owned]
        flat = torch.autograd.grad(loss / self.micro_batches, tuple(itertools.chain(*parameters)), allow_unused=True)
        gradients = iter(flat)
        for k, own in enumerate(parameters):
            self.waiting[k].append(functools.partial(_accumulate, own, [next(gradients) for _ in own]))
        return loss.detach()

    def _gradient_later(self, inputs: _Values, labels: Any) -> Tensor:
        """Run the forward; each stage's backward joins its queue, and later takes the error of the stage behind."""
        between = _Between([None] * len(self.stages))
        values = inputs
        for k, stage in enumerate(self.stages):
            leaves = tuple(v.detach().requires_grad_(v.requires_grad) for v in values)
            seen = {p: p.detach().clone().requires_grad_(p.requires_grad) for p in stage.parameters()}
            state = {name: seen[p] for name, p in _places(stage, "_parameters")}
            copies = {buffer: buffer.clone() for buffer in stage.buffers()}
            past = {name: copies[buffer] for name, buffer in _places(stage, "_buffers")}, self.rng[k]
            values = self._forward(k, leaves, state)
            if k == len(self.stages) - 1:
                loss = self._loss(values, labels)
                values, between.errors[k] = (loss / self.micro_batches,), (torch.ones(()),)
            self.waiting[k].append(functools.partial(self._backward, k, leaves, state, past, values, between))
        return loss.detach()

    def _backward(
        self, k: int, leaves: _Values, state: _State, past: tuple[_State, Tensor], values: _Values, between: _Between
    ) -> None:
        """Run one stage's backward at its newest weights, which take the place of the weights that the forward saw."""
        weights = {parameter: state[name] for name, parameter in _places(self.stages[k], "_parameters")}
        for parameter, weight in weights.items():
            weight.data.copy_(parameter.data)
        if self.replay and self.delays[k] > 0:
            values = self._forward_again(k, leaves, state, *past)
        errors = between.errors[k]
        pairs = [(v, e) for v, e in zip(values, errors, strict=True) if v.requires_grad and e is not None]
        if pairs:  # nothing to train up to here, or nothing behind that depends on it
            torch.autograd.backward([v for v, _ in pairs], [e for _, e in pairs])
        if k > 0:
            between.errors[k - 1] = [leaf.grad for leaf in leaves]
        for parameter, weight in weights.items():
            gradient = weight.grad
            if parameter in between.ties and gradient is not None:
                gradient = between.ties[parameter] + gradient
            if parameter in set(self.owned[k]):
                _accumulate([parameter], [gradient])
            elif gradient is not None:
                between.ties[parameter] = gradient

    def _forward(self, k: int, values: _Values, state: _State | None = None) -> _Values:
        present = torch.get_rng_state()
        torch.set_rng_state(self.rng[k])
        values = tuple(value.clone() for value in values)  # a layer may write into what it gets
        value = values if len(values) > 1 else values[0]
        if state is None:
            output = self.stages[k](value)
        else:
            output = functional_call(self.stages[k], state, (value,), tie_weights=False)
        self.rng[k] = torch.get_rng_state()
        torch.set_rng_state(present)
        return _as_tuple(output)

    def _forward_again(self, k: int, leaves: _Values, state: _State, buffers: _State, random: Tensor) -> _Values:
        """Run a forward again with the buffers and random numbers of the first, and leave running statistics alone."""
        after, self.rng[k] = self.rng[k], random
        values = self._forward(k, leaves, {**state, **buffers})
        self.rng[k] = after
        return values

    def _loss(self, values: _Values, labels: Any) -> Tensor:
        return self.loss_fn(values if len(values) > 1 else values[0], labels)


def _allow(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")


def _places(stage: nn.Module, kind: str) -> Iterator[tuple[str, Any]]:
    """Yield every place of a parameter or buffer; several may hold the same, and a module used twice counts once."""
    for prefix, module in stage.named_modules():
        for name, value in getattr(module, kind).items():
            if value is not None:
                yield f"{prefix}.{name}".removeprefix("."), value


def _as_tuple(value: Any) -> _Values:
    return (value,) if torch.is_tensor(value) else tuple(value)


def _accumulate(parameters: Any, gradients: Any) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
