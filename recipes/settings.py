"""The settings of a run, as its checkpoints keep them: a run with other settings does not go on from them.

Settings that only decide where results go, or how much a run tells about itself, are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
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
"""Keys of its "ddg" block that change nothing; whether the block is enabled is recorded as the schedule."""


def recorded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` as they are read back from JSON, with only what decides about the training.

    Args:
        settings: name -> value; "config" is a DeepSpeed config, whose "ddg" block gets its defaults: a default is the
            same setting whether it is written out or not.
    """
    kept = dict(settings)
    if "config" in kept:
        ddg = DDGConfig.parse(kept["config"].get("ddg")).model_dump(exclude=DDG_REPORTS)
        kept["config"] = {key: value for key, value in {**kept["config"], "ddg": ddg}.items() if key not in REPORTS}
    read: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return read


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Compare the settings of an earlier run with those of this one, both made by `recorded`.

    Args:
        then: the earlier run's. Earlier versions recorded less, and no "config": then only what is there counts.
        now: this run's.

    Returns:
        Path of each setting that differs -> the old and the new value in words.
    """
    # Recorded again, as earlier versions left out the defaults of the "ddg" block.
    old, new = dict(_flat(recorded(then))), dict(_flat(now))
    unset = object()
    paths = {**old, **new} if "config" in then else old
    different = [path for path in paths if old.get(path, unset) != new.get(path, unset)]
    return {path: f"{path} {_word(old, path)}, now {_word(new, path)}" for path in different}


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _word(flat: Mapping[str, Any], path: str) -> str:
    return repr(flat[path]) if path in flat else "not set"
