"""Rules at work in the steps of an optimizer, any subclass of ``torch.optim.Optimizer``.

Inside a step, and there alone, the optimizer finds groups of parameters with another learning rate and momentum, one
for each age of gradients in a group. The groups that schedulers, checkpoints and scripts see are never touched. It
works below DeepSpeed's wrappers, which step the optimizer inside (ZeRO one group at a time), as the hooks are torch's
own: every ``step`` runs them, whoever has wrapped it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_ddg.staleness.choose import momentum_sums
from ds_ddg.staleness.rules import Rules, Staleness

__all__ = ["DELAYED", "PREVIOUS_STEP", "StaleSteps", "forget_previous_steps"]

DELAYED = "ddg_delayed"
"""The attribute that an optimizer has under ``ds_ddg.delayed``, and the key of what is in flight in its state."""

PREVIOUS_STEP = "ddg_previous_step"
"""The key of u_{t-1} in the optimizer's state of a parameter, which is saved and loaded with the rest."""
_STEPS = "ddg_steps"
"""The name of the attribute by which an optimizer has its `StaleSteps`."""

_Group = dict[str, Any]


def forget_previous_steps(states: Iterable[dict[str, Any]]) -> None:
    """Have the extrapolation begin anew for the parameters with these `states`: there was no step before the next."""
    for state in states:
        state.pop(PREVIOUS_STEP, None)


class _Part(NamedTuple):
    """The parameters of a group whose gradients are equally old, as a group of its own."""

    group: _Group
    """The optimizer's own."""
    values: _Group
    changed: frozenset[str]
    """What it has other than the optimizer's own."""
    lead: float = 0.0
    """The c s of the step (1+cs) u_t - cs u_{t-1}."""


class StaleSteps:
    """Has an optimizer step by rules from now on.

    Args:
        optimizer: the innermost one, whose parameters are those that it updates.
        rules: what to change.
        by_age: divides the parameters of a group by the present staleness of their gradients.

    Raises:
        TypeError: `optimizer` is none of torch's, or hides one without torch's hooks.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rules: Rules,
        by_age: Callable[[list[Tensor]], Mapping[Staleness, list[Tensor]]],
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer) or "_optimizer_step_pre_hooks" not in vars(optimizer):
            raise TypeError(
                '"staleness" changes the steps of subclasses of torch.optim.Optimizer that call its __init__, '
                f'got {type(optimizer).__name__}; use such an optimizer, or "staleness": "off"'
            )
        self._rules, self._by_age = rules, by_age
        self.taken = 0
        """The number of steps so far."""
        self._given: list[_Group] | None = None
        """The groups of the optimizer, inside a step that finds others."""
        self._step: FrameType | None = None
        """The call of that step."""
        self._parts: list[_Part] = []
        self._led: list[tuple[list[Tensor], list[Tensor], float]] = []
        """Parameters to extrapolate, their values before the step, and c s, for each part."""
        self.remove_from(optimizer)  # that of an engine before
        vars(optimizer)[_STEPS] = self
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    @staticmethod
    def remove_from(optimizer: Any) -> None:
        """Have `optimizer` step as ever from here on."""
        if (steps := vars(optimizer).pop(_STEPS, None)) is not None:
            for hook in steps._hooks:
                hook.remove()

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        call = sys._getframe(1)
        if self._under_way(call):
            return
        self.taken += 1
        self._put_back(optimizer)  # a step may have failed halfway
        parts = [part for group in optimizer.param_groups for part in self._split(optimizer, group)]
        if not any(part.changed for part in parts):
            return
        if any(given is not None for given in (*args[1:2], kwargs.get("closure"), kwargs.get("grads"))):
            raise ValueError(
                f"{type(optimizer).__name__}.step was given a closure or gradients; the rules for stale gradients "
                "find them in .grad before the step: call backward first, and step without arguments"
            )
        self._given, self._parts, self._step = list(optimizer.param_groups), parts, call
        optimizer.param_groups[:] = [part.values for part in parts]  # a wrapper shares the list with what it wraps
        self._led = [
            (parameters, [parameter.detach().clone() for parameter in parameters], part.lead)
            for part in parts
            if part.lead > 0 and (parameters := part.values["params"])
        ]

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._step is sys._getframe(1):
            self._extrapolate(optimizer)
            self._put_back(optimizer)

    @torch.no_grad()
    def _extrapolate(self, optimizer: torch.optim.Optimizer) -> None:
        for parameters, steps, lead in self._led:
            torch._foreach_sub_(steps, parameters)
            torch._foreach_sub_(parameters, steps, alpha=lead)
            # Written only now, as optimizers take an empty state for that of a parameter without a step.
            states = [optimizer.state[parameter] for parameter in parameters]
            if stepped := [i for i, state in enumerate(states) if PREVIOUS_STEP in state]:
                before = [states[i][PREVIOUS_STEP] for i in stepped]
                torch._foreach_add_([parameters[i] for i in stepped], before, alpha=lead)
            for state, step in zip(states, steps, strict=True):
                state[PREVIOUS_STEP] = step

    def _put_back(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimizer its own groups again, with what it has noted in those of the step."""
        if self._given is not None:
            optimizer.param_groups[:] = self._given
        for part in self._parts:
            part.group.update({name: value for name, value in part.values.items() if name not in part.changed})
        self._given, self._step, self._parts, self._led = None, None, [], []

    def _under_way(self, call: FrameType) -> bool:
        """Whether `call`, of a step, is within another: a subclass calls its parent's, whose hooks may run as well.

        Whether they do depends on what this process has made before: torch puts the hooks into the ``step`` of a
        class with the first optimizer of that class. So the outermost step is the one that counts.
        """
        around = call.f_back if self._step is not None else None
        while around is not None and around is not self._step:
            around = around.f_back
        return around is not None

    def _split(self, optimizer: torch.optim.Optimizer, group: _Group) -> Iterator[_Part]:
        """Yield what takes the place of `group`: itself if all its gradients are fresh, else a group for each age."""
        by_age = self._by_age(group["params"])
        if not by_age:
            yield _Part(group, group, frozenset())
        for age, parameters in by_age.items():
            if self._rules.lead(age) == 0:
                forget_previous_steps(optimizer.state.get(parameter, {}) for parameter in parameters)
            if age.updates > 0:
                yield self._part(group, parameters, age, momentum_sums(optimizer, group))
            elif len(by_age) == 1:
                yield _Part(group, group, frozenset())
            else:
                yield _Part(group, {**group, "params": parameters}, frozenset(["params"]))

    def _part(self, group: _Group, parameters: list[Tensor], age: Staleness, momentum_sums: bool) -> _Part:
        rules = self._rules
        # DeepSpeed's Muon also steps parameters without a gradient, when none is due yet.
        changes: _Group = {"params": [parameter for parameter in parameters if parameter.grad is not None]}
        if (factor := rules.rate_factor(age, momentum_sums)) != 1:
            changes["lr"] = group["lr"] * factor
        if rules.momentum != "keep":
            if "betas" in group:
                first, *others = group["betas"]
                changes["betas"] = (rules.momentum_at(first, age), *others)
            else:
                changes["momentum"] = rules.momentum_at(group["momentum"], age)
        return _Part(group, {**group, **changes}, frozenset(changes), rules.lead(age))
