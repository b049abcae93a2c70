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

    clip: Literal["stage"] = "stage"
    """``gradient_clipping`` by the stage's own norm, so that no stage waits for another's."""

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


_PLANNED = [("slack", "auto"), ("clip", "global")]


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
    yield stage == 1, "ZeRO stage 1", 'not supported yet; set "zero_optimization": {"stage": 0}'
    yield bool(config.bfloat16_config.enabled), "bf16", 'not supported yet; train in fp32 ("bf16": {"enabled": false})'
    yield bool(config.float16_config.enabled), "fp16", 'not supported yet; train in fp32 ("fp16": {"enabled": false})'
    autocast = getattr(config, "torch_autocast_enabled", False)
    yield bool(autocast), "torch_autocast", "not supported yet; train in fp32"

    tied = {key: stages for key, stages in _tied_across_stages(module).items() if len(stages) > 1}
    where = "; ".join(f"{key!r} on stages {sorted(stages)}" for key, stages in tied.items())
    yield bool(tied), f"a layer tied across stages ({where})", "not supported yet; untie it, or keep it in one stage"

    interval = max(module.activation_checkpoint_interval, config.pipeline.get("activation_checkpoint_interval", 0))
    yield (
        interval > 0,
        f"activation_checkpoint_interval={interval}",
        'not supported yet; set it to 0 and use "ddg": {"activations": "recompute"}',
    )
    yield bool(module.dynamic_shape), "dynamic_shape=True", "not supported yet; pad every batch to one shape"
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
    axes = set(module.topology().get_axis_names()) - {"pipe", "data"}
    wide = [axis for axis in sorted(axes) if module.topology().get_dim(axis) > 1]
    yield bool(wide), f"parallel axes {wide}", "not supported yet; use pipe and data only"


def _tied_across_stages(module: Any) -> dict[str, set[int]]:
    from deepspeed.runtime.pipe.module import TiedLayerSpec

    stages: dict[str, set[int]] = {}
    for index, spec in enumerate(module._layer_specs):
        if isinstance(spec, TiedLayerSpec):
            stages.setdefault(spec.key, set()).add(module.stage_owner(index))
    return stages
