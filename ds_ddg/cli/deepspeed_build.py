"""The optimizer and the scheduler of a DeepSpeed config, built by DeepSpeed's own code for throw-away parameters.

What a run refuses, and how, is therefore not said here a second time; only the words are, where DeepSpeed's have none
for the user.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from importlib import import_module
from typing import Any
from unittest.mock import MagicMock, patch
from warnings import catch_warnings, simplefilter

import torch
from deepspeed.runtime import engine as deepspeed_engine
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

from ds_ddg.weights.optimizer_wrappers import needs_closure, refuse_metric

__all__ = ["check_optimizer_and_scheduler"]

_KERNELS = {
    "deepspeed.ops.adam.fused_adam": "FusedAdamBuilder",
    "deepspeed.ops.adam.cpu_adam": "CPUAdamBuilder",
    "deepspeed.ops.lamb.fused_lamb": "FusedLambBuilder",
    "deepspeed.ops.lion.fused_lion": "FusedLionBuilder",
    "deepspeed.ops.lion.cpu_lion": "CPULionBuilder",
    "deepspeed.ops.adagrad.cpu_adagrad": "CPUAdagradBuilder",
}
"""Modules of DeepSpeed's optimizers, and the builders that compile their kernels."""

_MANY_CALLS = 10**9
"""The calls of a run whose length the config leaves open: no warm-up is longer, of which DeepSpeed would warn."""


class _Builder(deepspeed_engine.DeepSpeedEngine):
    """DeepSpeed's own choice of optimizer and scheduler, without the rest of an engine.

    Args:
        config: the parsed ``DeepSpeedConfig``.
    """

    def __init__(self, config: Any) -> None:
        torch.nn.Module.__init__(self)
        self._config = config
        self.client_optimizer = None
        self.has_moe_layers = False
        self.global_rank = 0
        self.zenflow = config.zero_config.zenflow is not None
        self.overlap_step = False
        self.pipeline_parallelism = True

    def optimizer(self) -> Any:
        """Build the optimizer as ``_configure_basic_optimizer`` of a run does, for two throw-away parameters."""
        matrix, vector = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (2,)))
        # As deepspeed.initialize marks them for Muon, before it builds an engine.
        matrix.use_muon, vector.use_muon = True, False  # type: ignore[attr-defined]
        for parameter in (matrix, vector):
            parameter.grad = torch.zeros_like(parameter)
        with _without_kernels():
            return self._configure_basic_optimizer([matrix, vector])

    def wrapper(self, optimizer: Any) -> str | None:
        """Return the name of the wrapper that `optimizer` has in a run; None if it has none."""
        # The check that is replaced asks for the number of this rank, and outside of a run there are none.
        with patch.object(deepspeed_engine, "is_zero_supported_optimizer", _tested_with_zero):
            self._assert_valid_mixed_precision_config()
            kind: str | None = self._do_optimizer_sanity_check(optimizer)
        return kind

    def scheduler(self, optimizer: Any, wrapped: bool) -> Any:
        """Build the scheduler as ``_scheduler_from_config`` of a run does for `optimizer`, which may be wrapped."""
        if wrapped:
            wrapper = DeepSpeedOptimizer()
            wrapper.optimizer, wrapper.param_groups = optimizer, optimizer.param_groups
            optimizer = wrapper
        return self._scheduler_from_config(optimizer)


def _tested_with_zero(optimizer: Any) -> bool:
    return type(optimizer) in ZERO_SUPPORTED_OPTIMIZERS


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Inside this block DeepSpeed's optimizers can be built without their kernels, which take a minute or a GPU."""
    with ExitStack() as stack:
        for module, name in _KERNELS.items():
            stack.enter_context(patch.object(import_module(module), name, MagicMock()))
        yield


def check_optimizer_and_scheduler(config: Any, delayed: bool = True) -> Any:
    """Build both as a run does; return the optimizer, or None if the config has none.

    Args:
        config: the parsed ``DeepSpeedConfig``.
        delayed: whether the run is on the delayed schedule.

    Raises:
        ValueError: DeepSpeed refuses the config, or the optimizer or scheduler refuses its parameters.
    """
    builder = _Builder(config)
    # One that is passed to ds_ddg.initialize may have all that a scheduler changes, as AdamW has.
    optimizer: Any = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    if config.optimizer_name is not None:
        parameters = dict(config.optimizer_params or {})
        if "max_grad_norm" in parameters:
            raise ValueError(
                '"optimizer": DeepSpeed does not take "max_grad_norm" here; set "gradient_clipping" instead'
            )
        if config.optimizer_name not in DEEPSPEED_OPTIMIZERS:
            _known(
                "optimizer", config.optimizer_name, _kinds(torch.optim, torch.optim.Optimizer), DEEPSPEED_OPTIMIZERS
            )
        with _refusing("optimizer", config.optimizer_name, parameters):
            optimizer = builder.optimizer()
        kind = type(optimizer)
        if needs_closure(kind.step):
            raise ValueError(f'"optimizer": {kind.__name__} runs the model itself, which no stage can; use another')
        if kind.__module__.startswith("torch."):  # the others' kernels are not here
            with _refusing("optimizer", config.optimizer_name, parameters):
                optimizer.step()
        stage = int(config.zero_config.stage)
        if stage > 0 and not (_tested_with_zero(optimizer) or config.zero_allow_untested_optimizer):
            raise ValueError(
                f"DeepSpeed has not tested ZeRO-{stage} with {kind.__name__}; use another optimizer, or set "
                '"zero_allow_untested_optimizer": true'
            )
    built = None if config.optimizer_name is None else optimizer
    wrapped = _wrapped(builder, optimizer)
    if config.scheduler_name is None:
        return built
    kind = _known("scheduler", config.scheduler_name, _schedulers())
    if config.scheduler_params is None:
        raise ValueError('"scheduler": DeepSpeed needs "params" with it; {} for the defaults')
    if wrapped and issubclass(kind, torch.optim.lr_scheduler.LRScheduler):
        raise ValueError(
            f'"scheduler": {kind.__name__} is PyTorch\'s, and takes no optimizer that DeepSpeed has wrapped (as in '
            f"bf16, fp16 and ZeRO); use one of DeepSpeed's own: {', '.join(lr_schedules.VALID_LR_SCHEDULES)}"
        )
    # What the recipes put in place of "auto" is a number of calls.
    params = {key: _MANY_CALLS if value == "auto" else value for key, value in config.scheduler_params.items()}
    config.scheduler_params = params
    with _refusing("scheduler", config.scheduler_name, params):
        scheduler = builder.scheduler(optimizer, wrapped)
        with catch_warnings():
            simplefilter("ignore")  # PyTorch's warning that the optimizer has not stepped before
            _step(scheduler)
    if delayed:
        refuse_metric(scheduler)
    return built


def _wrapped(builder: _Builder, optimizer: Any) -> bool:
    """Return whether DeepSpeed wraps `optimizer`; ValueError if it has no wrapper for the types in the config."""
    try:
        return builder.wrapper(optimizer) is not None
    except (NotImplementedError, ValueError, AssertionError) as error:
        raise ValueError(f"DeepSpeed refuses the config: {error}") from error


def _step(scheduler: Any) -> None:
    """Step as ``DeepSpeedEngine._take_model_step`` does, which passes the size of a batch to who wants a number."""
    try:
        scheduler.step()
    except TypeError:
        scheduler.step(1)


@contextmanager
def _refusing(block: str, name: str, given: Mapping[str, Any]) -> Iterator[None]:
    """Inside this block any error of what is built from the parameters `given` is a ValueError that names `block`."""
    try:
        yield
    except UnboundLocalError as error:  # how DeepSpeed fails where it could not import what it needs
        raise ValueError(f'"{block}": {name} needs the package "mup"; install it, or use another') from error
    except Exception as error:  # every optimizer and scheduler has errors of its own
        why = _explained(error, given) if isinstance(error, TypeError) else None
        raise ValueError(f'"{block}": {why or f"{name}: {type(error).__name__}: {error}"}') from error


def _explained(error: TypeError, given: Mapping[str, Any]) -> str | None:
    """Put into words which of the parameters `given` the class in `error` does not take; None for other errors."""
    called = re.match(r"(\w+)\.__init__\(\) (got an unexpected|missing)", str(error))
    kind = {**_optimizers(), **_schedulers()}.get(called[1]) if called else None
    if kind is None:
        return None
    signature = inspect.signature(kind)
    _, *allowed = signature.parameters
    if unexpected := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
        return f"{kind.__name__} has no parameter {unexpected[1]!r}; it has {', '.join(allowed)}"
    try:
        signature.bind(None, **given)
    except TypeError as reason:
        return f"{kind.__name__}: {reason}"
    return None


def _optimizers() -> dict[str, Any]:
    """Return all classes that DeepSpeed may build from a config, by name."""
    modules = torch.optim, *(import_module(name) for name in _KERNELS)
    return {name: kind for module in modules for name, kind in _kinds(module, torch.optim.Optimizer).items()}


def _schedulers() -> dict[str, Any]:
    """Return all schedulers that DeepSpeed may build from a config, by name."""
    own = {name: getattr(lr_schedules, name) for name in lr_schedules.VALID_LR_SCHEDULES}
    return {**_kinds(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler), **own}


def _kinds(module: Any, base: type) -> dict[str, type]:
    """Return the subclasses of `base` by the name that `module` has for them."""
    public = {name: value for name, value in vars(module).items() if not name.startswith("_") and value is not base}
    return {name: value for name, value in public.items() if isinstance(value, type) and issubclass(value, base)}


def _known(block: str, name: str, kinds: Mapping[str, Any], others: Any = ()) -> Any:
    if name in kinds:
        return kinds[name]
    spelled = {key.lower(): key for key in (*others, *kinds)}
    near = get_close_matches(name.lower(), spelled, n=1)
    hint = f"did you mean {spelled[near[0]]!r}?" if near else f"it knows {', '.join(sorted(spelled.values()))}"
    raise ValueError(f'"{block}": DeepSpeed knows no "type" {name!r}; {hint}')
