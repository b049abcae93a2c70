"""Set-ups that cannot be trained exactly are refused: the same error on every rank, before training."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import ds_ddg
from helpers.distributed import GetRanks
from helpers.failing import (
    TIMEOUT,
    End,
    Misbehaves,
    batches,
    build,
    catch,
    config,
    train,
)

REFUSALS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "unknown key": ({"ddg": {"slak": 1}}, "ValueError", ["'slak'", "slack, clip"]),
    "wrong type": ({"ddg": {"slack": "1"}}, "ValueError", ['"slack"', "'1'", "integer"]),
    "global clip where the optimizer clips": (
        {"ddg": {"clip": "global"}, "fp16": {"enabled": True}, "optimizer": {"type": "Lamb"}},
        "ValueError",
        ['"clip": "global" with fp16 and Lamb', '"stage"'],
    ),
    "DeepSpeed's schedule first, in fp16": (
        {"ddg": {"sync_steps": 2}, "fp16": {"enabled": True}},
        "ValueError",
        ["1F1B between calls of DDG in fp16", '"enabled": false'],
    ),
    "no block": ({"ddg": [1]}, "ValueError", ['"ddg" must be a block', "[1]"]),
    "several": ({"ddg": {"slak": 1, "weights": 0}}, "ValueError", ["'slak'", '"weights"']),
    "ZeRO-1 offload": (
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
        "ValueError",
        ["offload_optimizer", "remove"],
    ),
    "ZeRO-2": ({"zero_optimization": {"stage": 2}}, "ValueError", ["ZeRO stage 2"]),
    "ZeRO-2 on DeepSpeed's schedule": (
        {"zero_optimization": {"stage": 2}, "ddg": {"enabled": False}},
        "ValueError",
        ["DeepSpeed's schedule cannot train this set-up", "ZeRO stage 2"],
    ),
    "lines every 0 calls": ({"steps_per_print": 0}, "ValueError", ['"steps_per_print": 0', "1 or more"]),
    "lines every 0 calls of DeepSpeed's schedule": (
        {"steps_per_print": 0, "ddg": {"enabled": False}},
        "ValueError",
        ['"steps_per_print": 0', "1 or more"],
    ),
    "lines every word": ({"steps_per_print": "ten"}, "ValueError", ["\"steps_per_print\": 'ten'"]),
    "a breakdown without lines": (
        {"steps_per_print": None, "wall_clock_breakdown": True},
        "ValueError",
        ['"wall_clock_breakdown" without "steps_per_print"'],
    ),
    "ZeRO-3": ({"zero_optimization": {"stage": 3}}, "ValueError", ["ZeRO stage 3"]),
    "fp16 on CPU": ({"fp16": {"enabled": True}}, "ValueError", ["fp16", "not supported on your device"]),
    "autocast in fp16": (
        {"torch_autocast": {"enabled": True, "dtype": "float16"}},
        "ValueError",
        ["torch_autocast", "bfloat16"],
    ),
    "checkpointing with current and keep": (
        {
            "module": {"activation_checkpoint_interval": 1},
            "ddg": {"weights": "current", "activations": "keep"},
        },
        "ValueError",
        ["activation checkpointing", "recompute"],
    ),
    "an optimizer that runs the model itself": (
        {"optimizer": {"type": "LBFGS", "params": {}}},
        "ValueError",
        ["LBFGS needs a closure", "AdamW"],
    ),
    "a scheduler that goes by a metric": (
        {"scheduler": {"type": "ReduceLROnPlateau", "params": {}}},
        "ValueError",
        ["ReduceLROnPlateau needs a metric", "batch size"],
    ),
    "weights of two stages": (
        {"layers": [0, 1, 0, 2]},
        "ValueError",
        ["layers [0, 2] share weights", "on stages [0, 1]", "TiedLayerSpec"],
    ),
    "fewer layers than stages": ({"layers": [0]}, "ValueError", ["2 stages for 1 layers"]),
    "more stages than ranks": ({"num_stages": 3}, "", []),
}


def initialize_badly(rank: int, world_size: int, what: str) -> tuple[End, bool]:
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.pipe.engine import PipelineEngine

    settings = {"num_stages": 2, **REFUSALS[what][0]}
    if "layers" in settings:
        modules = [Misbehaves() for _ in range(3)]
        settings["layers"] = [modules[index] for index in settings["layers"]]
    with pytest.MonkeyPatch.context() as patch:  # some CPUs have fp16
        patch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: False)
        end = catch(lambda: build(**settings))
    return end, deepspeed.PipelineEngine is PipelineEngine


REMEDIES = {
    "global clip where the optimizer clips": (
        '"clip": "global" in fp16 without ZeRO-1 with `Lamb` or `legacy_fusion`',
        '"clip": "stage", ZeRO-1',
    ),
    "DeepSpeed's schedule first, in fp16": (
        "`sync_steps` or switching to 1F1B in fp16",
        '"enabled": false in a run of its own',
    ),
    "an optimizer that runs the model itself": ("optimizers that need a closure (LBFGS)", "any other"),
    "a scheduler that goes by a metric": (
        "schedulers that need a metric (ReduceLROnPlateau)",
        "one that goes by calls",
    ),
    "weights of two stages": ("a layer's weights in layers of two stages, without `TiedLayerSpec`", "`TiedLayerSpec`"),
    "ZeRO-1 offload": ("ZeRO's `offload_optimizer`", "ZeRO-1 without it"),
    "ZeRO-2": ("ZeRO stage 2", "stage 0 or 1; no pipeline of DeepSpeed's can run it"),
    "ZeRO-3": ("ZeRO stage 3", "stage 0 or 1; no pipeline of DeepSpeed's can run it"),
    "fp16 on CPU": ("fp16 on a CPU without instructions for it (by DeepSpeed)", "bf16"),
    "autocast in fp16": ("`torch_autocast` in float16", "bfloat16"),
    "checkpointing with current and keep": (
        'activation checkpointing with "weights": "current" and "activations": "keep"',
        '"stash" or "recompute"',
    ),
}
"""What the support matrix says of them."""


def refusals() -> list[Any]:
    return [
        pytest.param(what, marks=pytest.mark.refuses(*REMEDIES[what]) if what in REMEDIES else ()) for what in REFUSALS
    ]


@pytest.mark.parametrize("what", refusals())
def test_refuses_on_every_rank(ranks: GetRanks, what: str) -> None:
    _, kind, parts = REFUSALS[what]
    for end, restored in ranks(2).run(initialize_badly, what, timeout=TIMEOUT):
        assert end.kind == kind or (not kind and end.kind), end
        assert end.text, "an error without a word"
        for part in parts:
            assert part in end.text
        no_pipeline = "no pipeline can run it" in end.text
        assert not (no_pipeline and "runs DeepSpeed's own schedule instead" in end.text), "which cannot either"
        assert restored, "DeepSpeed stays patched"


def share_what_is_frozen(rank: int, world_size: int) -> int:
    shared = Misbehaves().requires_grad_(False)
    engine = build(2, [shared, Misbehaves(), shared, Misbehaves()])
    return train(engine, batches(), calls=3).calls


def test_frozen_weights_may_be_shared(ranks: GetRanks) -> None:
    assert ranks(2).run(share_what_is_frozen, timeout=TIMEOUT) == [2, 2]


def initialize_other_model(rank: int, world_size: int) -> list[End]:
    models = [nn.Linear(2, 2), None]
    return [catch(lambda model=model: ds_ddg.initialize(model=model, config=config())) for model in models]


def test_refuses_a_model_that_is_no_pipeline(ranks: GetRanks) -> None:
    for ends in ranks(2).run(initialize_other_model, timeout=TIMEOUT):
        for end, name in zip(ends, ("Linear", "NoneType"), strict=True):
            assert end.kind == "TypeError"
            assert "PipelineModule" in end.text
            assert name in end.text
