"""Bubble-free pipeline training for DeepSpeed: decoupled delayed gradients (DDG, Huo et al., ICML 2018).

``ds_ddg.initialize`` takes the place of ``deepspeed.initialize``; the training loop stays as it is. The
algorithm itself is ``ds_ddg.schedules.ddg``; docs/architecture.md has the folders in reading order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_ddg import models as models
    from ds_ddg import partition as partition
    from ds_ddg import reference as reference
    from ds_ddg.config import DDGConfig
    from ds_ddg.engine.engine import DDGEngine
    from ds_ddg.entry import ddg_engine, initialize, swap
    from ds_ddg.study.delayed import delayed

__all__ = ["DDGConfig", "DDGEngine", "ddg_engine", "delayed", "initialize", "swap"]
__version__ = "0.2.0"

_HOME = {
    "DDGConfig": "config",
    "DDGEngine": "engine",
    "ddg_engine": "entry",
    "delayed": "study.delayed",
    "initialize": "entry",
    "swap": "entry",
}
_MODULES = ("models", "partition", "reference")


def __getattr__(name: str) -> Any:
    """Import torch and DeepSpeed only when they are asked for: the plan and the simulator need neither."""
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"ds_ddg.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'ds_ddg' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"ds_ddg.{_HOME[name]}"), name)
    return value
