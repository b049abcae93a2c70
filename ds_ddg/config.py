"""The ``"ddg"`` block of a DeepSpeed config, and what of the rest of that config DDG can run with.

DeepSpeed ignores top-level keys that it does not know, and typos with them. Here an unknown key, a wrong type or a
value out of range is an error that names the key, the value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["DDGConfig", "refuse_unsupported"]


class DDGConfig(BaseModel):
    """Settings of the delayed schedule, frozen once read."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    enabled: bool = True
    """False: DeepSpeed's own 1F1B, for A/B runs of one script."""

    weights: Literal["stash", "current"] = "stash"
    """Weights a delayed backward sees: those of its own forward (the paper's equation) or the newest."""

    activations: Literal["keep", "recompute"] = "keep"
    """Keep the graph until its gradient arrives, or only the stage's input and run the forward again."""

    slack: int = Field(default=0, ge=0)
    """Extra micro-batches in flight per hop: hides the latency of the links, costs staleness."""

    clip: Literal["stage", "global"] = "stage"
    """``gradient_clipping`` by the stage's own norm, or by that of the whole pipeline in the newest call for which
    every stage can know it without a wait: call t - L - 2 in call t, with L = ceil(d_0 / M)."""

    loss: Literal["delayed", "exact"] = "delayed"
    """What train_batch returns: the newest loss known without a wait, or this call's own (costs the overlap)."""

    sync_steps: int = Field(default=0, ge=0)
    """The first so many calls run DeepSpeed's 1F1B, then DDG."""

    @classmethod
    def parse(cls, block: Mapping[str, Any] | None) -> DDGConfig:
        """Read the block of a DeepSpeed config (None: not there, all defaults).

        Raises:
            ValueError: names every offending key, the value found and what is allowed.
        """
        try:
            return cls.model_validate({} if block is None else block)
        except ValidationError as error:
            raise ValueError("\n".join(_explain(problem) for problem in error.errors())) from None


_PLANNED = [("slack", "auto")]


def _explain(problem: Mapping[str, Any]) -> str:
    if not problem["loc"]:
        return f'"ddg" must be a block of settings such as {{"enabled": true}}, got {problem["input"]!r}'
    key = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        return (
            f'"ddg": unknown key {key!r} (value {problem["input"]!r}); known keys: {", ".join(DDGConfig.model_fields)}'
        )
    later = " (that value is planned, not supported yet)" if (key, problem["input"]) in _PLANNED else ""
    return f'"ddg": {{"{key}": {problem["input"]!r}}} is not valid: {problem["msg"]}{later}'


def refuse_unsupported(config: Any, module: Any) -> None:
    """Raise for what this version cannot run *exactly*, before any message is sent.

    Args:
        config: the parsed ``DeepSpeedConfig``.
        module: the ``PipelineModule``.

    Raises:
        ValueError: one line per refusal, each with what to do instead.
    """
    refusals = [f"- {what}: {remedy}" for wrong, what, remedy in _refusals(config, module) if wrong]
    if refusals:
        raise ValueError(
            "DDG cannot train this set-up:\n"
            + "\n".join(refusals)
            + '\n("ddg": {"enabled": false} runs DeepSpeed\'s own schedule instead.)'
        )


def _refusals(config: Any, module: Any) -> Iterable[tuple[bool, str, str]]:
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator().device_name()
    yield device != "cpu", f"accelerator {device!r}", "not supported yet; run on CPU (environment DS_ACCELERATOR=cpu)"
    stage = int(config.zero_config.stage)
    yield stage >= 2, f"ZeRO stage {stage}", 'no pipeline can run it; set "zero_optimization": {"stage": 0}'
    offload = config.zero_config.offload_optimizer
    yield (
        stage == 1 and offload is not None and str(getattr(offload.device, "value", offload.device)) != "none",
        "ZeRO's offload_optimizer",
        "no pipeline can run it; remove the block",
    )
    wrappers = {
        "ZeRO-1": stage == 1,
        "bf16": config.bfloat16_config.enabled,
        "fp16": config.float16_config.enabled,
    }
    wrapped = [name for name, on in wrappers.items() if on]
    yield (
        bool(wrapped) and DDGConfig.parse(config._param_dict.get("ddg")).clip == "global",
        f'"clip": "global" with {" and ".join(wrapped)}',
        'DeepSpeed clips inside its optimizer there; use "clip": "stage"',
    )
    yield (
        bool(config.torch_autocast_enabled) and str(config.torch_autocast_dtype) == "torch.float16",
        "torch_autocast in float16",
        'not supported yet; use "dtype": "bfloat16"',
    )
    yield from _checkpointing_refusals(config, module)
    if module.num_stages > module._num_layers:
        yield (
            True,
            f"{module.num_stages} stages for {module._num_layers} layers",
            f"every stage needs a layer; use at most {module._num_layers} stages",
        )
    else:
        empty = [k for k in range(module.num_stages) if module.parts[k] == module.parts[k + 1]]
        yield (
            bool(empty),
            f"stages without a layer: {empty} (partition {list(module.parts)})",
            'use fewer stages or another partition_method, such as "uniform"',
        )
    axes = set(module.topology().get_axis_names()) - {"pipe", "data", "model"}
    wide = [axis for axis in sorted(axes) if module.topology().get_dim(axis) > 1]
    yield bool(wide), f"parallel axes {wide}", "use PipeModelDataParallelTopology: pipe, data and model"
    pipeline = config._param_dict.get("pipeline") or {}  # as given: DeepSpeed's own default is true
    asked = [key for key in ("pipe_partitioned", "grad_partitioned") if pipeline.get(key)]
    yield (
        bool(asked) and module.topology().get_dim("model") > 1,
        f"{' and '.join(asked)} with tensor parallelism",
        "each tensor slice sends whole activations to its own successor; leave it out, or set it to false",
    )


def _checkpointing_refusals(config: Any, module: Any) -> Iterable[tuple[bool, str, str]]:
    from deepspeed.runtime.activation_checkpointing import checkpointing

    if max(module.activation_checkpoint_interval, config.pipeline.get("activation_checkpoint_interval", 0)) <= 0:
        return
    ddg = DDGConfig.parse(config._param_dict.get("ddg"))
    yield (
        (ddg.weights, ddg.activations) == ("current", "keep"),
        'activation checkpointing with "weights": "current" and "activations": "keep"',
        'what is run again would see other weights than what was kept; use "stash" or "recompute"',
    )
    settings = config.activation_checkpointing_config
    for name, wanted, configured in (
        ("contiguous_memory_optimization", settings.contiguous_memory_optimization, "CONTIGUOUS_CHECKPOINTING"),
        ("partition_activations", settings.partition_activations, "PARTITION_ACTIVATIONS"),
        ("cpu_checkpointing", settings.cpu_checkpointing, "CPU_CHECKPOINT"),
    ):
        yield (
            bool(wanted or getattr(checkpointing, configured)),
            f"activation checkpointing with {name}",
            "its buffers hold one micro-batch, and several are in flight; set it to false",
        )
