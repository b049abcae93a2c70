"""A DeepSpeed config, held against the rules of DeepSpeed and of the engine without a run; ``ds-ddg check`` asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hjson  # type: ignore[import-untyped]
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

from ds_ddg.cli.deepspeed_build import check_optimizer_and_scheduler
from ds_ddg.config import DDGConfig
from ds_ddg.engine.compatibility import refuse_unsupported

__all__ = ["automatic", "checked", "read"]

_BLOCKS = ("optimizer", "scheduler", "fp16", "bf16", "zero_optimization", "torch_autocast", "pipeline",
           "activation_checkpointing")  # fmt: skip
_DDG = sorted("ddg")
_COUNTS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def read(path: str) -> dict[str, Any]:
    """Return what DeepSpeed reads from the file at `path`; its JSON may have comments.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no JSON, says something twice, or leaves values to another program.
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
    """Yield the dotted path of each key whose value is "auto"."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from automatic(value, f"{above}{key}.")
        elif value == "auto":
            yield f"{above}{key}"


def checked(values: dict[str, Any], settings: DDGConfig, num_stages: int, replicas: int) -> tuple[int, float, Any]:
    """Run DeepSpeed's checks, then the engine's, for `num_stages` plain layers.

    Returns:
        M, the clipping norm, and the optimizer for throw-away parameters, None if the config has none.

    Raises:
        ValueError: a run would end with the same message.
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
    optimizer = check_optimizer_and_scheduler(config, settings.enabled)
    return int(config.gradient_accumulation_steps), float(config.gradient_clipping), optimizer


def _parsed(values: dict[str, Any], replicas: int) -> Any:
    """Return the ``DeepSpeedConfig`` of a run with so many `replicas`."""

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
    """Yield the keys with which DeepSpeed would fail without naming them, or go on with nonsense."""
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
