"""``ds-ddg check``: whether a config is right, by the rules that a run goes by, and what each setting does."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_ddg.analysis.format import table
from ds_ddg.schedules.ddg import DDGPlan

if TYPE_CHECKING:
    from ds_ddg.config import DDGConfig

__all__ = ["HELP", "add_arguments"]

HELP = "a DeepSpeed config with its ddg block: is it right, and what does each setting do"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ds-ddg check`` to `parser`."""
    parser.set_defaults(run=_run)
    parser.add_argument("config", metavar="CONFIG.json", help="a DeepSpeed config; imports DeepSpeed to ask it")
    parser.add_argument("--stages", type=int, default=4, metavar="K", help="pipeline stages (default 4)")
    parser.add_argument("--replicas", type=int, default=1, metavar="R", help="data-parallel replicas (default 1)")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def _run(options: argparse.Namespace) -> str:
    for name in ("stages", "replicas"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(options, name)}")
    Path(options.config).stat()  # it takes seconds to import DeepSpeed, only to say that there is no such file
    # What DeepSpeed prints when it is imported must not get between the lines of the answer.
    with redirect_stdout(sys.stderr):
        from ds_ddg.config import DDGConfig
        from ds_ddg.telemetry.false_alarms import drop_false_alarms

        from .deepspeed_config import automatic, checked, read

        drop_false_alarms()
        values = read(options.config)
        settings = DDGConfig.parse(values.get("ddg"))
        micro_batches, clipping, optimizer = checked(values, settings, options.stages, options.replicas)
    slack = settings.slack if isinstance(settings.slack, int) else 0
    plan = DDGPlan(options.stages, micro_batches, slack)
    effects = _effects(settings, plan, clipping)
    if settings.enabled:
        effects["staleness"] = _staleness(settings, plan, clipping, optimizer)
    stages = [_stage(settings, plan, stage) for stage in range(plan.num_stages)] if settings.enabled else []
    notes = [*_notes(values), *_becomes(automatic(values))]
    if options.json:
        effective = {"settings": settings.model_dump(), "effects": effects, "per_stage": stages, "notes": notes}
        return json.dumps({"valid": True, "stages": options.stages, "micro_batches": micro_batches, **effective})
    given = values.get("ddg") or {}
    shown = {name: json.dumps(given.get(name, getattr(settings, name))) for name in effects}
    rows = [
        f"{json.dumps(name)}: {shown[name]}{'' if name in given else ' (default)'}\n    {text}"
        for name, text in effects.items()
    ]
    return "\n".join(
        [
            f"{options.config} is right for K = {options.stages} stages, M = {micro_batches} micro-batches a call, "
            f"{options.replicas} replica(s)",
            *notes,
            "",
            *rows,
            *(["", table(stages)] if stages else []),
            "",
            "What depends on the model (layers on each stage, tied weights, activation checkpointing, the axes of its "
            "topology)\nis checked when the engine is built.",
        ]
    )


def _notes(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield notes on what is not in the config, and may have been meant to be."""
    if values.get("ddg") is None:
        yield 'there is no "ddg" block, so all settings of ddg are defaults'
    if "optimizer" not in values:
        yield "there is no optimizer, so one must be passed to ds_ddg.initialize"
    elif str((values["optimizer"] or {}).get("type")).lower() == "muon":
        yield from _muon(values["optimizer"].get("params") or {})


def _muon(params: Mapping[str, Any]) -> Iterator[str]:
    """Yield a note on what Muon's two halves take, and at which learning rates."""
    rates = [params.get(key, params.get("lr", usual)) for key, usual in (("muon_lr", 0.02), ("adam_lr", 0.0003))]
    yield (
        f"Muon takes the weights of linear, attention and 2-d convolution layers, at learning rate {rates[0]:g}; "
        f"AdamW embeddings, the output layer and the rest, at {rates[1]:g}\n    (a parameter's use_muon, set before "
        "ds_ddg.initialize, wins; each stage logs its choice)"
    )


def _becomes(keys: Iterable[str]) -> Iterator[str]:
    """Yield what becomes of each "auto" that is left, but for the one of "slack"."""
    for key in keys:
        if key.startswith("scheduler."):
            yield f'{key} is "auto": the recipes put the number of calls there, in your own script it must be a number'
        elif key.startswith(("zero_optimization.", "fp16.", "bf16.")):
            yield f'{key} is "auto", which DeepSpeed takes for its default'


def _stage(settings: DDGConfig, plan: DDGPlan, stage: int) -> dict[str, Any]:
    recomputes = settings.activations == "recompute" and stage < plan.num_stages - 1
    return {
        "stage": stage,
        "delay": plan.delay(stage),
        "staleness": plan.staleness(stage),
        "versions": plan.versions(stage) if settings.weights == "stash" else 1,
        "graphs": 1 if recomputes else plan.activations(stage),
        "inputs": plan.activations(stage) if recomputes else None,
    }


def _effects(settings: DDGConfig, plan: DDGPlan, clipping: float) -> dict[str, str]:
    """Return the effect of each setting here, in a sentence."""
    if not settings.enabled:
        return {"enabled": "DeepSpeed's own 1F1B; the other settings do nothing"}
    if plan.num_stages == 1:
        return _effects_on_one_stage(settings, clipping)
    delay, staleness, held = plan.delay(0), plan.staleness(0), plan.activations(0)
    enabled = (
        f"stage k uses gradients (K-1-k)(1 + slack) micro-batches old: {delay} on stage 0, so up to {staleness} "
        f"update(s) stale, and none on the last"
    )
    weights = {
        "stash": f"a delayed backward sees the weights of its own forward, the paper's equation: up to "
        f"{plan.versions(0)} version(s) of the weights on stage 0 (and a copy of the newest in bf16, fp16 and ZeRO-1)",
        "current": "a delayed backward sees the newest weights: no copies, but not the paper's equation",
    }
    activations = {
        "keep": f"the graphs of up to {held} micro-batch(es) wait on stage 0",
        "recompute": f"the inputs of up to {held} micro-batch(es) wait on stage 0, and every stage but the last runs "
        "each forward twice",
    }
    loss = {
        "delayed": f"train_batch returns the loss of {staleness} call(s) ago (engine.loss_step says which), and waits "
        "for none but the first",
        "exact": "train_batch returns this call's own loss and waits for it, which brings back most of the bubble",
    }
    norms = {
        "stage": f"gradients are clipped to {clipping:g} by the norm of each stage, without a wait",
        "global": f"gradients are clipped to {clipping:g} by the norm of the whole pipeline {staleness + 2} call(s) "
        "ago, without a wait",
    }
    return {
        "enabled": enabled,
        "weights": weights[settings.weights],
        "activations": activations[settings.activations],
        "slack": _slack(settings),
        "clip": norms[settings.clip] if clipping > 0 else 'does nothing: "gradient_clipping" is 0',
        "loss": loss[settings.loss],
        "sync_steps": f"the first {settings.sync_steps} call(s) run DeepSpeed's 1F1B, with nothing stale"
        if settings.sync_steps
        else "DDG from the first call on",
        "trace": _trace(settings),
    }


def _effects_on_one_stage(settings: DDGConfig, clipping: float) -> dict[str, str]:
    nothing = "does nothing on one stage"
    return {
        "enabled": "one stage is plain training: nothing is delayed, and no gradient is stale",
        **dict.fromkeys(("weights", "activations", "slack"), nothing),
        "clip": f"gradients are clipped to {clipping:g} by their norm"
        if clipping > 0
        else 'does nothing: "gradient_clipping" is 0',
        "loss": "train_batch returns the loss of its own call",
        "sync_steps": nothing,
        "trace": _trace(settings),
    }


def _trace(settings: DDGConfig) -> str:
    return "records what each rank does, for ds-ddg trace" if settings.trace else "nothing is recorded"


def _staleness(settings: DDGConfig, plan: DDGPlan, clipping: float, optimizer: Any) -> str:
    """Say what the rules come to. ValueError as a run has it, if they need a number or cannot be followed."""
    from ds_ddg.staleness.choose import choose

    if settings.staleness == "off":
        return "nothing is done about stale gradients: the paper's algorithm" + (
            '; "auto" does what suits the optimizer' if plan.delay(0) > 0 else ""
        )
    if optimizer is None:
        return "goes by the optimizer that is passed to ds_ddg.initialize, which says it when it is built"
    return "\n    ".join(
        choose(settings.staleness_settings, optimizer, plan, clipping if settings.clip == "stage" else 0.0).lines
    )


def _slack(settings: DDGConfig) -> str:
    if settings.slack == "auto":
        return "the first calls run at slack 0 and are timed; then the smallest that hides the latency is chosen"
    if settings.slack == 0:
        return "each hop's latency is paid in every tick; 1 would hide half a tick of it, for twice the delay"
    hidden = f"{settings.slack / 2:g}"
    return f"hides a latency of up to {hidden} tick(s) per hop; delays are {1 + settings.slack} times those of slack 0"
