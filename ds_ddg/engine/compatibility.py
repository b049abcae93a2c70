"""Refuses, by name, what DDG cannot train of a DeepSpeed config and a model, and says what to do instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.nn import Module

from ds_ddg.config import DDGConfig
from ds_ddg.weights.muon_limits import muon_refusals

__all__ = ["one_f_one_b_refusals", "refuse_experts", "refuse_unsupported", "wrappers"]

_ANY_PIPELINE = "no pipeline can run it"


def refuse_unsupported(config: Any, module: Any, enabled: bool = True) -> None:
    """Raise for what this version cannot run *exactly*, before any message is sent.

    Args:
        config: the parsed ``DeepSpeedConfig``.
        module: the ``PipelineModule``.
        enabled: whether it is to run DDG; DeepSpeed's own schedule otherwise, which checks the rest for itself.

    Raises:
        ValueError: one line per refusal, each with what to do instead.
    """
    found = _refusals(config, module) if enabled else _sending_refusals(module)
    _refuse([*_refusals_of_any_pipeline(config), *muon_refusals(config, module, enabled), *found], enabled)


def refuse_experts(config: Any, module: Any, sizes: Sequence[int]) -> None:
    """Raise for expert layers that this version cannot run exactly, on every rank alike.

    Args:
        config: the parsed ``DeepSpeedConfig``.
        module: the ``PipelineModule``.
        sizes: the ``ep_size`` of every ``MoE`` layer of all stages.

    Raises:
        ValueError: one line per refusal, each with what to do instead.
    """
    _refuse(_expert_refusals(config, module, sizes), enabled=True)


def _refuse(found: Iterable[tuple[bool, str, str]], enabled: bool) -> None:
    refusals = [f"- {what}: {remedy}" for wrong, what, remedy in found if wrong]
    if refusals:
        name = "DDG" if enabled else "DeepSpeed's schedule"
        ours = enabled and not all(_ANY_PIPELINE in refusal or "Muon" in refusal for refusal in refusals)
        other = '\n("ddg": {"enabled": false} runs DeepSpeed\'s own schedule instead.)' if ours else ""
        raise ValueError(f"{name} cannot train this set-up:\n" + "\n".join(refusals) + other)


def _refusals_of_any_pipeline(config: Any) -> Iterable[tuple[bool, str, str]]:
    stage = int(config.zero_config.stage)
    yield stage >= 2, f"ZeRO stage {stage}", _ANY_PIPELINE + '; set "zero_optimization": {"stage": 0}'
    period = config._param_dict.get("steps_per_print")
    yield (
        period is not None and (not isinstance(period, (int, float)) or period == 0),
        f'"steps_per_print": {period!r}',
        f"{_ANY_PIPELINE}; give a number of calls, 1 or more, or leave it out to have nothing printed",
    )
    yield (
        period is None and bool(config._param_dict.get("wall_clock_breakdown")),
        '"wall_clock_breakdown" without "steps_per_print"',
        f"{_ANY_PIPELINE}; say how many calls to print it after",
    )


def _refusals(config: Any, module: Any) -> Iterable[tuple[bool, str, str]]:
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator().device_name()
    yield (
        device not in ("cpu", "cuda"),
        f"accelerator {device!r}",
        'not supported; run on "cuda" or on CPU (environment DS_ACCELERATOR=cpu)',
    )
    offload = config.zero_config.offload_optimizer
    yield (
        int(config.zero_config.stage) == 1
        and offload is not None
        and str(getattr(offload.device, "value", offload.device)) != "none",
        "ZeRO's offload_optimizer",
        "not supported yet; remove the block",
    )
    yield (
        bool(config.expert_parallel_config.enabled),
        '"expert_parallel" (AutoEP)',
        "it replaces layers after the pipeline has been built; build the layers with deepspeed.moe.layer.MoE",
    )
    ddg = DDGConfig.parse(config._param_dict.get("ddg"))
    # There the optimizer itself divides gradients by their scale and clips them, in one kernel.
    legacy = "Lamb" if config.optimizer_name == "lamb" else "legacy_fusion" if config.optimizer_legacy_fusion else ""
    yield (
        bool(legacy) and wrappers(config) == ["fp16"] and ddg.clip == "global",
        f'"clip": "global" with fp16 and {legacy}',
        'its optimizer clips by itself; use "clip": "stage", ZeRO-1 or another optimizer',
    )
    yield (
        bool(legacy) and wrappers(config) == ["fp16"] and ddg.staleness != "off",
        f'"staleness" with fp16 and {legacy}',
        'its optimizer is handed gradients that no rule sees; use "staleness": "off", ZeRO-1 or another optimizer',
    )
    yield (
        ddg.staleness_settings.clip > 0 and ddg.clip == "global",
        f'"staleness": {{"clip": {ddg.staleness_settings.clip:g}}} with "clip": "global"',
        'one is the norm of the stage, the other that of all; use "clip": "stage", or "staleness": {"clip": 0}',
    )
    yield (
        bool(config.torch_autocast_enabled) and str(config.torch_autocast_dtype) == "torch.float16",
        "torch_autocast in float16",
        'not supported yet; use "dtype": "bfloat16"',
    )
    if ddg.sync_steps > 0:
        yield from one_f_one_b_refusals(config, module)
    yield from _checkpointing_refusals(config, module)
    yield from _sharing_refusals(module)
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


def one_f_one_b_refusals(config: Any, module: Any) -> Iterable[tuple[bool, str, str]]:
    """Yield what an engine that was built for DDG cannot run on DeepSpeed's schedule."""
    yield from _sending_refusals(module)
    yield (
        module.num_stages > 1 and "fp16" in wrappers(config),
        "1F1B between calls of DDG in fp16, whose stages have scales of their own",
        'run DeepSpeed\'s schedule with "ddg": {"enabled": false}, from a checkpoint if need be',
    )


def _sending_refusals(module: Any) -> Iterable[tuple[bool, str, str]]:
    """Yield the case in which DeepSpeed's own messages break their connection."""
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    yield (
        module.num_stages > 1
        and get_accelerator().device_name() != "cpu"
        and dist.is_initialized()  # or it is no run yet
        and dist.get_backend() == "gloo",
        "1F1B of GPU stages over gloo, which cannot send from a device",
        'give every stage a GPU of its own and initialize "nccl", or leave DDG on throughout',
    )


def _expert_refusals(config: Any, module: Any, sizes: Sequence[int]) -> Iterable[tuple[bool, str, str]]:
    yield (
        bool(sizes) and module.topology().get_dim("model") > 1,
        "expert layers (MoE) with tensor parallelism",
        "DeepSpeed 0.19.8 sums the gradients of experts over the tensor slices as if these were replicas; "
        "use replicas alone",
    )


def wrappers(config: Any) -> list[str]:
    """Return the reasons why DeepSpeed wraps the optimizer; none if it does not."""
    reasons = {
        "ZeRO-1": int(config.zero_config.stage) == 1,
        "bf16": config.bfloat16_config.enabled,
        "fp16": config.float16_config.enabled,
    }
    return [name for name, on in reasons.items() if on]


def _sharing_refusals(module: Any) -> Iterable[tuple[bool, str, str]]:
    """Yield layers that share weights without a spec that says so: each stage would train a copy of its own."""
    holders: dict[int, list[int]] = {}
    for index, layer in enumerate(module._layer_specs):
        if isinstance(layer, Module):
            for parameter in {id(p) for p in layer.parameters() if p.requires_grad}:
                holders.setdefault(parameter, []).append(index)
    torn = {tuple(layers) for layers in holders.values() if len(set(map(module.stage_owner, layers))) > 1}
    for layers in sorted(torn):
        yield (
            True,
            f"layers {list(layers)} share weights, and are on stages {[module.stage_owner(i) for i in layers]}",
            "make each of them a TiedLayerSpec with the same key, or give each its own weights (copy.deepcopy)",
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
