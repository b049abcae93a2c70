"""Models as files of the transformers library, and as pipelines."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from ds_ddg import models
from helpers.transformers_models import MODELS, build_config, in_a_row

transformers = pytest.importorskip("transformers")


def auto_class(name: str) -> Any:
    return getattr(transformers, f"AutoModelFor{MODELS[name][1]}")


def pipeline(specs: list[Any], stages: int, loss_fn: Any, method: str) -> Any:
    from deepspeed.pipe import PipelineModule

    return PipelineModule(specs, num_stages=stages, loss_fn=loss_fn, partition_method=method)


def layers_of(name: str, **changes: Any) -> nn.ModuleList:
    config, auto = build_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    return in_a_row(models.from_transformers(config, auto))[0]
