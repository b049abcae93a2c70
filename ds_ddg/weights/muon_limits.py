"""What of DeepSpeed's Muon cannot be trained in a pipeline, or would be silently wrong; and its settings, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from deepspeed.runtime.config import MUON_OPTIMIZER
from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["muon_refusals"]

_Rate = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, lt=1)]
_ONE_RATE = {"WarmupLR": "warmup_max_lr", "WarmupDecayLR": "warmup_max_lr"}
"""Schedulers that put a rate of their own in place of the optimizer's, and the setting that holds it."""


_FP32 = ("torch.float32", "fp32", "float32", "float")


class _Params(BaseModel):
    """The parameters of the optimizer ``"Muon"``, of which DeepSpeed 0.19.8 ignores what it does not know."""

    model_config = ConfigDict(strict=True, extra="forbid")

    lr: _Rate = 0.02
    muon_lr: _Rate = 0.02
    adam_lr: _Rate = 3e-4
    momentum: _Share = 0.95
    weight_decay: _Rate = 0.0
    ns_method: Literal["gram", "standard"] = "gram"
    betas: Annotated[tuple[_Share, _Share], Field(strict=False)] = (0.9, 0.95)
    eps: _Rate = 1e-10
    torch_adam: bool = False
    adam_w_mode: bool = True
    foreach: bool | None = None
    fp32_optimizer_states: bool | None = None
    per_head_muon: bool = False


def muon_refusals(config: Any, module: Any, enabled: bool) -> Iterable[tuple[bool, str, str]]:
    """Yield whether each limit is met, what it is, and what to do instead.

    Args:
        config: the parsed ``DeepSpeedConfig``.
        module: the ``PipelineModule``.
        enabled: whether the run is on the delayed schedule.
    """
    if config.optimizer_name != MUON_OPTIMIZER:
        return
    params = config.optimizer_params or {}
    for what, remedy in _wrong_params(params):
        yield True, what, remedy
    yield (
        bool(params.get("per_head_muon")),
        "Muon with per_head_muon",
        "DeepSpeed 0.19.8 goes by whole matrices without ZeRO; leave it out",
    )
    yield (
        module.topology().get_dim("model") > 1,
        "Muon with tensor parallelism",
        "each rank would orthogonalise its slice of a matrix for itself; use replicas, or AdamW",
    )
    yield (bool(config.float16_config.enabled), "Muon with fp16", "not supported yet; use bf16")
    in_bf16, partitioned = config.bfloat16_config.enabled, int(config.zero_config.stage) == 1
    yield (
        partitioned and not in_bf16,
        "Muon with ZeRO-1 in fp32",
        "not supported, as DeepSpeed 0.19.8 clips there what Muon has made of the gradients; set "
        '"zero_optimization": {"stage": 0}',
    )
    yield (
        in_bf16 and not (partitioned and config.grad_accum_dtype in _FP32),
        "Muon with bf16",
        "DeepSpeed 0.19.8 keeps whole matrices for it only with "
        '"zero_optimization": {"stage": 1} and "data_types": {"grad_accum_dtype": "fp32"}; set both',
    )
    yield (
        in_bf16 and not enabled,
        "Muon with bf16 on DeepSpeed's own schedule",
        'DeepSpeed 0.19.8 takes it in no pipeline of its own; use fp32, or "ddg": {"enabled": true}',
    )
    yield (
        in_bf16 and enabled and _clips_globally(config),
        'Muon with bf16 and "clip": "global"',
        'the updates would be clipped instead of the gradients; use "clip": "stage"',
    )
    key = _ONE_RATE.get(config.scheduler_name or "")
    given = {name for name in ("muon_lr", "adam_lr") if name in params}
    rate = (config.scheduler_params or {}).get(key, 0.001) if key else None
    yield (
        bool(given) and key is not None and not isinstance(rate, list | tuple),
        f'"{" and ".join(sorted(given))}" with {config.scheduler_name}, whose "{key}" takes its place',
        f"give it a rate for each group of parameters, \"{key}\": [Muon's, AdamW's], or use WarmupCosineLR",
    )


def _clips_globally(config: Any) -> bool:
    return config.gradient_clipping > 0 and (config._param_dict.get("ddg") or {}).get("clip") == "global"


def _wrong_params(params: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    try:
        _Params.model_validate(dict(params))
    except ValidationError as error:
        for problem in error.errors():
            key = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                yield f'"optimizer": Muon has no parameter {key!r}', f"it has {', '.join(_Params.model_fields)}"
            else:
                yield f'"optimizer": Muon with "{key}": {problem["input"]!r}', str(problem["msg"])
