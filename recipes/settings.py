"""The settings of a run, as its checkpoints keep them: a run with others is another one, and does not go on from them.

What only decides where a run's results go, or how much it tells about itself, is not among them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ds_ddg.config import DDGConfig

REPORTS = {
    "comet",
    "comms_logger",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
    "wall_clock_breakdown",
    "wandb",
}
"""Blocks and keys of a DeepSpeed config that change nothing about the training."""

DDG_REPORTS = {"enabled", "loss", "trace"}
"""Those of its "ddg" block; whether it is enabled is among the settings as the schedule."""


def recorded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they are read back from JSON; of a DeepSpeed config, under the key "config", what decides about training."""
    kept = dict(settings)
    if "config" in kept:
        kept["config"] = {key: value for key, value in kept["config"].items() if key not in REPORTS}
    read: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return read


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two of `recorded`, by path: the old and the new value in words.

    Args:
        then: earlier versions kept less, without a "config"; only what is there counts.
        now: of this run.
    """
    old, new = _flat(_with_defaults(then)), _flat(_with_defaults(now))
    paths = {**old, **new} if "config" in then else old
    different = [path for path in paths if path not in old or path not in new or old[path] != new[path]]
    return {path: f"{path} {_word(old, path)}, now {_word(new, path)}" for path in different}


def _with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Written out or not, a default is the same setting."""
    if "config" not in settings:
        return dict(settings)
    ddg = DDGConfig.parse(settings["config"].get("ddg")).model_dump(exclude=DDG_REPORTS)
    return {**settings, "config": {**settings["config"], "ddg": ddg}}


def _flat(value: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flat(inner, f"{above}{key}.") if isinstance(inner, dict) else {f"{above}{key}": inner})
    return flat


def _word(flat: Mapping[str, Any], path: str) -> str:
    return repr(flat[path]) if path in flat else "not set"
