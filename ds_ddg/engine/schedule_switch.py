"""Refuses, by name, a switch between the schedules within a run that would train something else than either does."""

from __future__ import annotations

from typing import Any

from ds_ddg.config import DDGConfig
from ds_ddg.engine.compatibility import one_f_one_b_refusals, wrappers

__all__ = ["refuse_switch"]


def refuse_switch(name: str, enabled: bool, config: Any, module: Any) -> None:
    """Raise for a switch to schedule `name` that would train something else than either schedule; on every rank alike.

    Args:
        name: "ddg" or "1f1b".
        enabled: whether the engine was built for DDG.
        config: the parsed ``DeepSpeedConfig``.
        module: the ``PipelineModule``.

    Raises:
        ValueError: why, and what to do instead.
    """
    wrapped, tied = wrappers(config), _tied_across_stages(module)
    rules = DDGConfig.parse(config._param_dict.get("ddg")).staleness != "off"
    if name == "ddg" and not enabled and (wrapped or tied or rules):
        reasons = " and ".join([*wrapped, *["tied weights"] * tied, *['"staleness"'] * rules])
        raise ValueError(
            f"{reasons}: the optimizer was built for DeepSpeed's "
            'schedule; set "ddg": {"enabled": true}, and switch to "1f1b" where you want it'
        )
    if name == "1f1b" and enabled:
        for wrong, what, remedy in one_f_one_b_refusals(config, module):
            if wrong:
                raise ValueError(f"{what}: {remedy}")


def _tied_across_stages(module: Any) -> bool:
    from deepspeed.runtime.pipe.module import TiedLayerSpec

    stages: dict[str, set[int]] = {}
    for index, spec in enumerate(module._layer_specs):
        if isinstance(spec, TiedLayerSpec):
            stages.setdefault(spec.key, set()).add(module.stage_owner(index))
    return any(len(holders) > 1 for holders in stages.values())
