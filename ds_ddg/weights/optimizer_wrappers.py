"""DeepSpeed's wrappers of optimizers, adapted where a stage is not a whole model.

DeepSpeed wraps the optimizer for bf16, fp16 and ZeRO-1. Its wrappers clip by the norm of their own gradients, and fail
on a stage that has nothing to train.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer, ZeROOptimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import is_optimized_parameter

from ds_ddg.weights.stage_groups import clip

__all__ = [
    "add_no_gradient",
    "anything_to_train",
    "clipping_by",
    "clocks_stopped",
    "fill_groups",
    "idle_optimizer",
    "innermost",
    "needs_closure",
    "norm_unscaled",
    "refuse_closure",
    "refuse_metric",
    "states_of",
    "with_a_parameter",
]


def innermost(optimizer: Any) -> Any:
    """Return the optimizer that updates weights, of one that DeepSpeed may have wrapped; None where there is none."""
    return optimizer.optimizer if isinstance(optimizer, DeepSpeedOptimizer) else optimizer


def states_of(optimizer: Any) -> list[dict[str, Any]]:
    """Return the state that the innermost optimizer has of each parameter, if it is of torch's kind."""
    return [state for state in getattr(innermost(optimizer), "state", {}).values() if isinstance(state, dict)]


@contextmanager
def clipping_by(known: float, wrapper: Any) -> Iterator[None]:
    """Inside this block an optimizer that DeepSpeed wraps clips by the `known` norm; it still measures its own.

    DeepSpeed's wrappers (bf16, fp16, ZeRO-1) unscale gradients, clip them and hand them to the optimizer inside, ZeRO
    one parameter group at a time. Here they clip to nothing, and what they hand on is clipped on its way.
    """
    inner, max_norm = wrapper.optimizer, wrapper.clip_grad
    before = inner.__dict__.get("step")  # set where a scheduler watches it
    step = inner.step

    @functools.wraps(step)
    def clipped_step(*args: Any, **kwargs: Any) -> Any:
        gradients = [p.grad for group in inner.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            clip(gradients, max_norm, torch.full((), known, device=gradients[0].device))
        return step(*args, **kwargs)

    inner.step, wrapper.clip_grad = clipped_step, 0.0
    try:
        yield
    finally:
        wrapper.clip_grad = max_norm
        del inner.step
        if before is not None:
            inner.step = before


class IdleOptimizer:
    """Replaces an optimizer that has no gradient to step on; all other attributes are those of the real one."""

    overflow = False
    _global_grad_norm = None

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self) -> None:
        """Do nothing, as there is no gradient."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing, as there is no gradient to clear."""


@contextmanager
def idle_optimizer(engine: Any) -> Iterator[None]:
    """Inside this block the optimizer of `engine` steps nothing, while schedulers and counts go on."""
    engine.optimizer, optimizer = IdleOptimizer(engine.optimizer), engine.optimizer
    try:
        with warnings.catch_warnings():
            # torch warns when a scheduler steps before its optimizer; here that is intended.
            warnings.filterwarnings("ignore", message=r".*lr_scheduler\.step\(\).*before.*optimizer\.step\(\)")
            yield
    finally:
        engine.optimizer = optimizer


def norm_unscaled(engine: Any, num_stages: int) -> AbstractContextManager[None]:
    """Inside this block a step of `engine` leaves the norm of its gradients without the loss scale of the stage.

    DeepSpeed 0.19.8 does so itself with ZeRO; without ZeRO it divides by the scale of the next step, or not at all.
    """
    optimizer = engine.optimizer
    is_unscaled = num_stages == 1 or not engine.fp16_enabled() or isinstance(optimizer, ZeROOptimizer)
    return nullcontext() if is_unscaled else _scale_of_this_step(engine)


@contextmanager
def _scale_of_this_step(engine: Any) -> Iterator[None]:
    optimizer = engine.optimizer
    before = float(optimizer.loss_scale)
    yield
    after = 1.0 if isinstance(optimizer, FP16_UnfusedOptimizer) else float(optimizer.loss_scale)
    if engine._global_grad_norm is not None:
        engine._global_grad_norm = engine._global_grad_norm * (after / before)


@contextmanager
def clocks_stopped(engine: Any) -> Iterator[None]:
    """Inside this block a step of `engine` moves weights only: no step count, no learning rate."""
    saved = {name: getattr(engine, name) for name in ("global_steps", "global_samples", "lr_scheduler")}
    engine.lr_scheduler = None
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(engine, name, value)


def needs_closure(step: Any) -> bool:
    """Return whether the method `step` needs a closure; False for C++ functions, which do not say."""
    try:
        closure = inspect.signature(step).parameters.get("closure")
    except ValueError:
        return False
    return closure is not None and closure.default is inspect.Parameter.empty


def refuse_metric(scheduler: Any) -> None:
    """Raise ValueError for a scheduler that goes by a metric: DeepSpeed 0.19.8 gives it the batch size for one.

    Source: ``DeepSpeedEngine._take_model_step``, which calls ``lr_scheduler.step(self.train_batch_size())``.
    """
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError(
            "ReduceLROnPlateau needs a metric in each step, and DeepSpeed would give it the batch size, which never "
            "gets better; call its step(loss) yourself between calls, or use a scheduler that goes by calls"
        )


def refuse_closure(optimizer: Any) -> None:
    """Raise ValueError for an optimizer that evaluates the model itself, several times a step."""
    if needs_closure(optimizer.step):
        raise ValueError(
            f"{type(optimizer).__name__} needs a closure that runs the whole model again, which no stage can; use an "
            "optimizer that steps on the gradients it is given, such as AdamW"
        )


def add_no_gradient(parameter: torch.nn.Parameter, optimizer: Any) -> None:
    """Give `parameter`, which has no gradient, a gradient of zeros where `optimizer` keeps gradients."""
    parameter.grad = torch.zeros_like(parameter)
    for i, group in enumerate(optimizer.bf16_groups if isinstance(optimizer, BF16_Optimizer) else ()):
        for j, own in enumerate(group):
            if own is parameter:
                optimizer._update_hp_grad(parameter, i, j, clear_lp_grads=False)
                parameter.grad = None


def anything_to_train(optimizer: Any) -> bool:
    """Return whether DeepSpeed's wrappers would find a parameter to train in `optimizer`."""
    return any(is_optimized_parameter(p) for group in optimizer.param_groups for p in group["params"])


def fill_groups(optimizer: Any, names: dict[Any, str], dtype: torch.dtype, device: torch.device) -> None:
    """Put a number into every group of `optimizer` without anything to train, and its name into `names`.

    DeepSpeed's wrappers flatten each group, and know each parameter by the name that it has in the model.
    """
    for group in optimizer.param_groups:
        if not any(map(is_optimized_parameter, group["params"])):
            shape = (1, 1) if group.get("use_muon") else (1,)  # DeepSpeed's Muon takes matrices
            stand_in = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
            names[stand_in] = f"ds_ddg.stand_in.{len(names)}"
            group["params"] = [stand_in, *(p for p in group["params"] if p.numel())]


def with_a_parameter(model_parameters: Any) -> Any:
    """Return `model_parameters`, with an empty one added for the optimizer of a stage without anything to train.

    torch refuses an empty list and DeepSpeed drops empty groups, with them the learning rate that callers ask for.
    """
    given = list(model_parameters)
    if any(_trains(item) for item in given):
        return given
    nothing = torch.nn.Parameter(torch.empty(0))
    nothing.use_muon = False  # type: ignore[attr-defined]  # DeepSpeed's Muon asks it of every parameter
    if given and isinstance(given[0], dict):
        return [{**given[0], "params": [nothing]}, *given[1:]]
    return [nothing]


def _trains(item: Any) -> bool:
    """Return whether `item`, a parameter, a named one or a group of them, has anything to train."""
    if torch.is_tensor(item):
        return item.requires_grad
    if isinstance(item, dict):
        item["params"] = item["params"] if torch.is_tensor(item["params"]) else list(item["params"])
        return _trains(item["params"])
    return not isinstance(item, str) and any(map(_trains, item))
