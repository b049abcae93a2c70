"""DDG in an ordinary training loop: the gradients of stage k come d_k micro-batches late.

The gradient that stage k of K uses in tick n is that of micro-batch n - d_k, at the weights that its forward saw on
every stage. So it is an ordinary gradient of an ordinary model, only kept for a while: what delay would do to a
training shows in one process, in any loop, for the memory of d_k gradients of each parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from deepspeed.utils import logger
from torch import Tensor

from ds_ddg.config import DDGConfig
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.staleness.apply import DELAYED, StaleSteps, forget_previous_steps
from ds_ddg.staleness.choose import choose
from ds_ddg.staleness.rules import Staleness
from ds_ddg.study.late_gradients import LateGradients
from ds_ddg.study.stages import Stages, parameters_by_stage
from ds_ddg.weights.muon_step import stepping
from ds_ddg.weights.stage_groups import clip, square_norm

__all__ = ["delayed"]

_Optimizer = TypeVar("_Optimizer", bound=torch.optim.Optimizer)


def delayed(
    optimizer: _Optimizer,
    stages: Stages,
    *,
    model: Any = None,
    micro_batches: int = 1,
    slack: int = 0,
    rules: str | Mapping[str, Any] = "off",
    gradient_clipping: float = 0.0,
) -> _Optimizer:
    """Have `optimizer` train as on the stages of a DDG pipeline: ``loss.backward()`` then gives late gradients.

    The loop stays as it is. With gradient accumulation each backward pass is a micro-batch, its loss divided by
    `micro_batches` as ever. Clipping between backward and step sees what the step will use. The first d_k passes give
    stage k no gradient, and ``step`` leaves its parameters alone, weight decay and Adam's count included.

    Args:
        optimizer: one of torch's kind, of a model in this process, on one device; changed in place.
        stages: modules or lists of parameters, in order from the inputs to the loss; or, with `model`, the stage of
            each layer by the beginning of its name, ``{"embed": 0, "layers.0.": 0, "layers.1.": 1, "head": 1}``, or
            the number of stages to divide a list of layers into.
        model: the model that names or number are of.
        micro_batches: M, the number of backward passes for each step. The last step of an epoch may have fewer.
        slack: extra micro-batches of delay per hop.
        rules: as ``"ddg": {"staleness": ...}``: "off", "auto" or a block of rules.
        gradient_clipping: the largest norm of a stage's gradients, which a step clips to as the engine does; 0 for
            any. Where it is used, leave out clipping of your own, which goes by the norm of the whole model.

    Returns:
        `optimizer`. Its ``state_dict`` also has the gradients in flight; load it into one made in the same way.

    Raises:
        TypeError, ValueError: `stages` do not divide the parameters of `optimizer`, or the rules are wrong.
        RuntimeError: from ``step`` or ``backward``, for what could not be as in a pipeline; it says what.
    """
    if not isinstance(optimizer, torch.optim.Optimizer) or "optimizer" in vars(optimizer):
        raise TypeError(
            f"delayed takes an optimizer of torch's kind, got {type(optimizer).__name__}; give it the innermost one, "
            "before accelerate or DeepSpeed wraps it"
        )
    if DELAYED in vars(optimizer):
        raise ValueError("this optimizer is delayed already; make a new one")
    settings = DDGConfig.parse({"staleness": rules if isinstance(rules, str) else dict(rules)}).staleness_settings
    plan = DDGPlan(len(parts := parameters_by_stage(stages, model)), micro_batches, slack)
    choice = choose(settings, optimizer, plan, gradient_clipping)
    for line in choice.lines:
        logger.warning(line)
    vars(optimizer)[DELAYED] = _Delay(optimizer, parts, plan, gradient_clipping)
    vars(optimizer)[DELAYED].attach(optimizer, choice.rules)
    return optimizer


class _Delay:
    """What happens around the steps of a delayed optimizer.

    Args:
        optimizer: the optimizer.
        stages: the parameters of each stage.
        plan: the delay of each stage.
        gradient_clipping: the largest norm of a stage's gradients; 0 for any.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, stages: list[list[Tensor]], plan: DDGPlan, gradient_clipping: float
    ) -> None:
        self._plan, self._gradient_clipping = plan, gradient_clipping
        self._stage_of = {parameter: k for k, parameters in enumerate(stages) for parameter in parameters}
        given = _parameters(optimizer)
        if outside := [tuple(p.shape) for p in given if p not in self._stage_of]:
            raise ValueError(
                f"{len(outside)} parameter(s) of the optimizer are on no stage, of the shapes {outside[:4]}; every "
                "parameter that is trained needs a stage"
            )
        trained = {p for p in given if p.requires_grad}
        if len(devices := {p.device for p in trained}) > 1:
            raise ValueError(f"parameters on several devices ({', '.join(map(str, devices))}); train on one")
        self._stages = [[p for p in parameters if p in trained] for parameters in stages]
        self._late = LateGradients({p: plan.delay(self._stage_of[p]) for p in given if p.requires_grad})
        self._steps = 0
        self._passes_before = 0
        """The number of backward passes for the steps so far."""
        self._stepping = False
        self._written_out = ExitStack()
        """Open while DeepSpeed's Muon steps: it then computes as it does in the engine, which does not compile it."""

    def attach(self, optimizer: torch.optim.Optimizer, rules: Any) -> None:
        """Check and clip before each step, which then goes by `rules`."""
        self._rules = rules
        # torch's GradScaler tells an optimizer of this kind that it is at work.
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
        optimizer.register_step_pre_hook(self._before_step)
        StaleSteps(optimizer, rules, self._by_age)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_state_dict_post_hook(self._save)
        optimizer.register_load_state_dict_pre_hook(self._load)

    def _by_age(self, parameters: list[Tensor]) -> dict[Staleness, list[Tensor]]:
        ages = [Staleness.of(self._plan, k, self._steps) for k in range(self._plan.num_stages)]
        result: dict[Staleness, list[Tensor]] = {}
        for parameter in parameters:
            result.setdefault(ages[self._stage_of[parameter]], []).append(parameter)
        return result

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._late.check()
        passes, self._passes_before = self._late.passes - self._passes_before, self._late.passes
        if self._stepping and passes == 0:
            return  # a subclass has called its parent's step
        self._refuse(optimizer, args, kwargs, passes)
        self._stepping = True
        self._written_out.enter_context(stepping(optimizer))
        for k, parameters in enumerate(self._stages):
            max_norm = self._rules.max_norm(self._gradient_clipping, Staleness.of(self._plan, k))
            gradients = [p.grad for p in parameters if p.grad is not None]
            if max_norm > 0 and gradients:
                clip(gradients, max_norm, square_norm(gradients).pow(0.5))

    def _after_step(self, *_: Any) -> None:
        self._written_out.close()
        self._steps += self._stepping
        self._stepping = False

    def _refuse(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any, passes: int) -> None:
        """Raise RuntimeError for what has no counterpart in a pipeline."""
        wanted, why = self._plan.micro_batches, None
        if getattr(optimizer, "found_inf", None) is not None or kwargs.get("grad_scaler") is not None:
            why = "a GradScaler divides late gradients by the scale of now, not theirs: use bfloat16, or no scaler"
        elif any(closure is not None for closure in (*args[1:2], kwargs.get("closure"))):
            why = "step was given a closure: call backward before it, and step without one"
        elif dist.is_initialized() and dist.get_world_size() > 1:
            why = "there are several processes, whose gradients are averaged before or after the delay: use one"
        elif passes > wanted or passes < (wanted if self._steps == 0 else 1):
            why = (
                f"there were {passes} backward passes before it, and micro_batches is {wanted}: say how many there "
                "are, and call backward once for each micro-batch, on the sum of its losses; activation checkpointing "
                "needs use_reentrant=False"
            )
        elif any(p.grad is not None and p not in self._late.delays for p in _parameters(optimizer)):
            why = "a parameter was frozen, or not there, when the optimizer was delayed: delay it after that"
        if why is not None:
            raise RuntimeError(f"this step would not be that of a delayed pipeline: {why}")

    def _save(self, _: Any, state: dict[str, Any]) -> None:
        state[DELAYED] = {**self._late.state(), "steps": self._steps, "passes_before": self._passes_before}

    def _load(self, _: Any, state: dict[str, Any]) -> None:
        given = state.get(DELAYED)
        if given is None:  # an optimizer without rules may have carried along what these had noted
            state["state"] = {key: dict(values) for key, values in state["state"].items()}
            forget_previous_steps(state["state"].values())
        self._late.load(given)
        self._steps, self._passes_before = (given["steps"], given["passes_before"]) if given else (0, 0)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
