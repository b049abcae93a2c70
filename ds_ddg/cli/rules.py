"""The rules of DeepSpeed and of the engine that a config can be held against without a run; ``ds-ddg check`` asks.

What DeepSpeed finds out only when it builds an optimizer or a scheduler is found here from their signatures.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hjson  # type: ignore[import-untyped]
import torch
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

from ds_ddg.config import DDGConfig
from ds_ddg.engine.compatibility import refuse_unsupported
from ds_ddg.weights.optimizer_wrappers import needs_closure

__all__ = ["automatic", "checked", "read"]

_BLOCKS = ("optimizer", "scheduler", "fp16", "bf16", "zero_optimization", "torch_autocast", "pipeline",
           "activation_checkpointing")  # fmt: skip
_DDG = sorted("ddg")
_COUNTS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def read(path: str) -> dict[str, Any]:
    """What DeepSpeed reads from the file; its JSON may have comments.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, says something twice, or leaves values to another program.
    """
    text = Path(path).read_bytes()
    try:
        values = hjson.loads(text.decode(), object_pairs_hook=dict_raise_error_on_duplicate_keys)
    except (UnicodeDecodeError, hjson.HjsonDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}; leave one of each") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a block of settings, {{...}}, got {type(values).__name__}")
    if left := [key for key in automatic(values) if "." not in key or key.startswith("optimizer.")]:
        raise ValueError(
            f'{path}: {", ".join(left)}: "auto" is for programs that fill it in, such as transformers; DeepSpeed '
            "itself needs a number here, or what else the key takes"
        )
    if "ddg" not in values and (meant := [key for key in values if sorted(key.lower().removeprefix("ds_")) == _DDG]):
        raise ValueError(f'{path}: unknown key {meant[0]!r}, which DeepSpeed would ignore; did you mean "ddg"?')
    return values


def automatic(values: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Paths of the keys whose value is "auto"."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from automatic(value, f"{above}{key}.")
        elif value == "auto":
            yield f"{above}{key}"


def checked(values: dict[str, Any], settings: DDGConfig, num_stages: int, replicas: int) -> tuple[int, float]:
    """DeepSpeed's own checks, then the engine's, on a pipeline of `num_stages` plain layers; M, and the clipping.

    Raises:
        ValueError: with what a run would end with.
    """
    config = _parsed(values, replicas)
    pipeline = SimpleNamespace(
        num_stages=num_stages,
        _num_layers=num_stages,
        _layer_specs=[],
        parts=list(range(num_stages + 1)),
        activation_checkpoint_interval=0,
        topology=lambda: PipeDataParallelTopology(num_pp=num_stages, num_dp=replicas),
    )
    refuse_unsupported(config, pipeline, settings.enabled)
    _check_optimizer(config)
    _check_scheduler(config)
    return int(config.gradient_accumulation_steps), float(config.gradient_clipping)


def _parsed(values: dict[str, Any], replicas: int) -> Any:
    """The ``DeepSpeedConfig`` of a run with so many `replicas`."""

    class Config(DeepSpeedConfig):
        def _configure_train_batch_size(self) -> None:
            self.world_size = replicas  # outside of a run DeepSpeed takes it to be 1
            super()._configure_train_batch_size()

    for problem in _wrong_types(values):
        raise ValueError(problem)
    try:
        return Config(values)
    except (AssertionError, DeepSpeedConfigError) as error:
        raise ValueError(f"DeepSpeed refuses the config: {error}") from error
    except Exception as error:  # it does not look at types before it uses a value
        raise ValueError(f"DeepSpeed refuses the config: {type(error).__name__}: {error}") from error


def _wrong_types(values: Mapping[str, Any]) -> Iterator[str]:
    """Where DeepSpeed would fail with an error that does not name the key, or go on with nonsense."""
    for key in _COUNTS:
        if values.get(key) is not None and type(values[key]) is not int:
            yield f'"{key}" must be a whole number, got {values[key]!r}'
    clipping = values.get("gradient_clipping", 0)
    if type(clipping) not in (int, float) or not clipping >= 0:
        yield f'"gradient_clipping" must be a number, 0 (none) or more, got {clipping!r}'
    for key in _BLOCKS:
        # A boolean turns on or off what has a block of its own in newer versions.
        allowed = (Mapping, bool) if key == "zero_optimization" else Mapping
        if values.get(key) is not None and not isinstance(values[key], allowed):
            yield f'"{key}" must be a block of settings, {{...}}, got {values[key]!r}'
    for key in ("optimizer", "scheduler"):
        block = values.get(key) or {}
        if block and "type" not in block:
            yield f'"{key}" must say its "type", such as {{"type": "Adam"}}, or DeepSpeed ignores it; got {block!r}'
        elif not isinstance(block.get("type"), str | None):
            yield f'"{key}": "type" must be a name, such as "Adam", got {block["type"]!r}'
        elif not isinstance(block.get("params", {}), Mapping | None):
            yield f'"{key}": "params" must be a block of settings, {{...}}, got {block["params"]!r}'


def _check_optimizer(config: Any) -> None:
    """That DeepSpeed can build it; what follows ``DeepSpeedEngine._configure_basic_optimizer``."""
    if config.optimizer_name is None:
        return
    parameters = dict(config.optimizer_params or {})
    if "max_grad_norm" in parameters:
        raise ValueError('"optimizer": DeepSpeed does not take "max_grad_norm" here; set "gradient_clipping" instead')
    kind = _optimizer(config.optimizer_name, parameters)
    if kind is None:
        return
    _check_parameters("optimizer", kind, parameters)
    if needs_closure(kind.step):
        raise ValueError(f'"optimizer": {kind.__name__} runs the model itself, which no stage can; use another')
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    stage = int(config.zero_config.stage)
    if stage > 0 and kind not in ZERO_SUPPORTED_OPTIMIZERS and not config.zero_allow_untested_optimizer:
        raise ValueError(
            f"DeepSpeed has not tested ZeRO-{stage} with {kind.__name__}; use another optimizer, or set "
            '"zero_allow_untested_optimizer": true'
        )


def _optimizer(name: str, parameters: dict[str, Any]) -> Any:
    """The class of that name, None if it is not known here; removes from `parameters` what DeepSpeed itself takes."""
    if name in ("adam", "adamw"):
        from deepspeed.ops.adam import FusedAdam

        decoupled = parameters.pop("adam_w_mode", True) or name == "adamw"
        parameters.pop("fp32_optimizer_states", None)
        if parameters.pop("torch_adam", False):
            return torch.optim.AdamW if decoupled else torch.optim.Adam
        return FusedAdam
    if name == "lamb":
        from deepspeed.ops.lamb import FusedLamb

        return FusedLamb
    if name == "lion":
        from deepspeed.ops.lion import FusedLion

        return FusedLion
    if name == "adagrad":
        return torch.optim.Adagrad
    if name in DEEPSPEED_OPTIMIZERS:
        return None
    return _known("optimizer", name, _kinds(torch.optim, torch.optim.Optimizer), DEEPSPEED_OPTIMIZERS)


def _check_scheduler(config: Any) -> None:
    """That DeepSpeed can build it; what follows ``DeepSpeedEngine._scheduler_from_config``."""
    if config.scheduler_name is None:
        return
    known = _kinds(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
    known |= {key: getattr(lr_schedules, key) for key in lr_schedules.VALID_LR_SCHEDULES}
    kind = _known("scheduler", config.scheduler_name, known)
    if config.scheduler_params is None:
        raise ValueError('"scheduler": DeepSpeed needs "params" with it; {} for the defaults')
    _check_parameters("scheduler", kind, config.scheduler_params)


def _kinds(module: Any, base: type) -> dict[str, type]:
    """Subclasses of `base` by the name that `module` has for them."""
    public = {name: value for name, value in vars(module).items() if not name.startswith("_") and value is not base}
    return {name: value for name, value in public.items() if isinstance(value, type) and issubclass(value, base)}


def _known(block: str, name: str, kinds: Mapping[str, Any], others: Any = ()) -> Any:
    if name in kinds:
        return kinds[name]
    spelled = {key.lower(): key for key in (*others, *kinds)}
    near = get_close_matches(name.lower(), spelled, n=1)
    hint = f"did you mean {spelled[near[0]]!r}?" if near else f"it knows {', '.join(sorted(spelled.values()))}"
    raise ValueError(f'"{block}": DeepSpeed knows no "type" {name!r}; {hint}')


def _check_parameters(block: str, kind: Any, given: Mapping[str, Any]) -> None:
    """ValueError if `kind` cannot be built with the parameters `given`, behind its first."""
    signature = inspect.signature(kind)
    _, *allowed = signature.parameters
    if unknown := [name for name in given if name not in allowed]:
        raise ValueError(
            f'"{block}": {kind.__name__} has no parameter {", ".join(map(repr, unknown))}; it has {", ".join(allowed)}'
        )
    try:
        signature.bind(None, **given)
    except TypeError as error:
        raise ValueError(f'"{block}": {kind.__name__}: {error}') from error
