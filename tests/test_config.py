"""The ``"ddg"`` block and the refusals: what a user gets to read for every mistake that we could think of.

Single process; that real engines raise the same on every rank is in tests/engine.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, ProcessTopology
from pydantic import ValidationError
from torch import nn

from ds_ddg.config import DDGConfig
from ds_ddg.engine.compatibility import refuse_unsupported
from ds_ddg.engine.schedule_switch import refuse_switch

DEFAULTS = {
    "enabled": True,
    "weights": "stash",
    "activations": "keep",
    "slack": 0,
    "clip": "stage",
    "loss": "delayed",
    "sync_steps": 0,
    "trace": None,
    "staleness": "off",
}
EVERYTHING = {
    "enabled": False,
    "weights": "current",
    "activations": "recompute",
    "slack": 3,
    "clip": "stage",
    "loss": "exact",
    "sync_steps": 10,
    "trace": "runs/trace",
    "staleness": "auto",
}


def complaint(block: Any) -> str:
    """What `block` is refused with."""
    with pytest.raises(ValueError, match="ddg") as caught:
        DDGConfig.parse(block)
    assert not isinstance(caught.value, ValidationError), "a raw pydantic error is no message for users"
    return str(caught.value)


@pytest.mark.parametrize("block", [None, {}])
def test_no_block_means_defaults(block: Any) -> None:
    assert DDGConfig.parse(block).model_dump() == DEFAULTS


def test_reads_every_key() -> None:
    assert DDGConfig.parse(EVERYTHING).model_dump() == EVERYTHING
    assert set(EVERYTHING) == set(DDGConfig.model_fields)


def test_is_frozen() -> None:
    settings = DDGConfig.parse({"slack": 1})
    with pytest.raises(ValidationError, match="frozen"):
        settings.slack = 2  # type: ignore[misc]
    assert settings.slack == 1


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("enabled", "yes", ["boolean"]),
        ("enabled", 1, ["boolean"]),
        ("enabled", None, ["boolean"]),
        ("weights", "stach", ["'stash'", "'current'"]),
        ("weights", ["stash"], ["'stash'", "'current'"]),
        ("activations", "Keep", ["'keep'", "'recompute'"]),
        ("activations", None, ["'keep'", "'recompute'"]),
        ("slack", "1", ["integer"]),
        ("slack", 1.5, ["integer"]),
        ("slack", 1.0, ["integer"]),
        ("slack", True, ["integer"]),
        ("slack", -1, ["greater than or equal to 0"]),
        ("slack", "Auto", ["integer", "'auto'"]),
        ("loss", "late", ["'delayed'", "'exact'"]),
        ("sync_steps", -3, ["greater than or equal to 0"]),
        ("sync_steps", "10", ["integer"]),
        ("trace", "", ["at least 1 character"]),
        ("trace", True, ["string"]),
        ("staleness", "on", ["'off'", "'auto'", "a block of rules"]),
        ("staleness", True, ["'off'", "'auto'", "a block of rules"]),
    ],
)
def test_wrong_value_names_key_value_and_what_is_allowed(key: str, value: Any, allowed: list[str]) -> None:
    message = complaint({key: value})
    for part in ('"ddg"', f'"{key}"', repr(value), *allowed):
        assert part in message
    assert "\n" not in message, "one mistake, one line"


@pytest.mark.parametrize(
    ("block", "parts"),
    [
        ({"clip": "1"}, ['"ddg": {"staleness": {"clip": \'1\'}}', "number"]),
        ({"anneal": -1}, ['{"staleness": {"anneal": -1}}', "greater than or equal to 0"]),
        ({"momentum": "long"}, ["{\"momentum\": 'long'}", "'keep', 'stretch' or 'asyncpp'"]),
        ({"lr": 1}, ['"ddg": "staleness": unknown key \'lr\' (value 1); known keys: learning_rate, tolerance']),
    ],
)
def test_rules_are_as_strict_inside(block: dict[str, Any], parts: list[str]) -> None:
    message = complaint({"staleness": block})
    for part in parts:
        assert part in message
    assert "\n" not in message, "one mistake, one line"


def test_reads_a_block_of_rules() -> None:
    settings = DDGConfig.parse({"staleness": {"rules": "auto", "clip": 1}}).staleness_settings
    assert (settings.rules, settings.named) == ("auto", {"clip": 1.0})
    assert DDGConfig.parse({}).staleness_settings.rules == "off"
    assert DDGConfig.parse({"staleness": "auto"}).staleness_settings.rules == "auto"


@pytest.mark.parametrize("key", ["slak", "Slack", "stash", ""])
def test_unknown_key_is_named_with_the_known_ones(key: str) -> None:
    message = complaint({key: "value-of-it"})
    for part in (repr(key), "'value-of-it'", *DDGConfig.model_fields):
        assert part in message


@pytest.mark.parametrize("block", [True, 5, "stash", ["slack", 1], [{"slack": 1}]])
def test_block_that_is_no_block(block: Any) -> None:
    message = complaint(block)
    assert "must be a block" in message
    assert repr(block) in message


def test_all_mistakes_at_once() -> None:
    message = complaint({"slak": 1, "weights": "stach", "slack": "1", "loss": None, "enabled": True})
    assert len(message.splitlines()) == 4
    for part in ("'slak'", "'stach'", '"slack"', '"loss"'):
        assert part in message
    assert '"enabled"' not in message


# -- what DDG refuses ------------------------------------------------------------------------------------------------


def zero(stage: int, offload: str | None = None) -> Any:
    return SimpleNamespace(stage=stage, offload_optimizer=offload and SimpleNamespace(device=offload))


def fake_config(**changes: Any) -> Any:
    """The part of a parsed ``DeepSpeedConfig`` that matters here; a real one needs process groups."""
    values: dict[str, Any] = {
        "_param_dict": {},
        "zero_config": zero(0),
        "bfloat16_config": SimpleNamespace(enabled=False),
        "float16_config": SimpleNamespace(enabled=False),
        "optimizer_name": None,
        "optimizer_legacy_fusion": False,
        "torch_autocast_enabled": False,
        "torch_autocast_dtype": torch.float16,
        "expert_parallel_config": SimpleNamespace(enabled=False),
        "pipeline": {"activation_checkpoint_interval": 0},
        "activation_checkpointing_config": SimpleNamespace(
            contiguous_memory_optimization=False, partition_activations=False, cpu_checkpointing=False
        ),
    }
    return SimpleNamespace(**{**values, **changes})


def fake_module(**changes: Any) -> Any:
    """The part of a ``PipelineModule`` of four layers on two stages that matters here."""
    values: dict[str, Any] = {
        "activation_checkpoint_interval": 0,
        "dynamic_shape": False,
        "num_stages": 2,
        "_num_layers": 4,
        "_layer_specs": [LayerSpec(nn.Linear, 2, 2) for _ in range(4)],
        "parts": [0, 2, 4],
        "topology": lambda: PipeDataParallelTopology(num_pp=2, num_dp=2),
    }
    module = SimpleNamespace(**{**values, **changes})
    module.stage_owner = lambda index: next(k for k in range(len(module.parts) - 1) if index < module.parts[k + 1])
    return module


def tied(*positions: int) -> list[Any]:
    """Four layers, those at `positions` tied."""
    return [
        TiedLayerSpec("embed", nn.Linear, 2, 2) if index in positions else LayerSpec(nn.Linear, 2, 2)
        for index in range(4)
    ]


HALF = {"float16_config": SimpleNamespace(enabled=True)}
GLOBAL = {"_param_dict": {"ddg": {"clip": "global"}}}


def test_accepts_what_it_can_train() -> None:
    refuse_unsupported(fake_config(), fake_module())


@pytest.mark.parametrize(
    "config",
    [
        {"zero_config": zero(1)},
        {"zero_config": zero(1, "none")},
        {"bfloat16_config": SimpleNamespace(enabled=True)},
        {"float16_config": SimpleNamespace(enabled=True)},
        GLOBAL,
        {**GLOBAL, **HALF},
        {**GLOBAL, **HALF, "zero_config": zero(1), "optimizer_name": "lamb"},
        {**GLOBAL, "zero_config": zero(1)},
        {"torch_autocast_enabled": True, "torch_autocast_dtype": torch.bfloat16},
    ],
)
def test_accepts_formats(config: dict[str, Any]) -> None:
    refuse_unsupported(fake_config(**config), fake_module())


@pytest.mark.parametrize("module", [{"dynamic_shape": True}, {"_layer_specs": tied(0, 3)}])
def test_accepts_models(module: dict[str, Any]) -> None:
    refuse_unsupported(fake_config(), fake_module(**module))


@pytest.mark.parametrize(
    ("config", "module", "name", "remedy"),
    [
        ({"zero_config": zero(2)}, {}, "ZeRO stage 2", '"stage": 0'),
        ({"zero_config": zero(3)}, {}, "ZeRO stage 3", '"stage": 0'),
        ({"zero_config": zero(1, "cpu")}, {}, "offload_optimizer", "remove"),
        (
            {**HALF, **GLOBAL, "optimizer_name": "lamb"},
            {},
            '"clip": "global" with fp16 and Lamb',
            '"clip": "stage"',
        ),
        ({**HALF, **GLOBAL, "optimizer_legacy_fusion": True}, {}, "fp16 and legacy_fusion", '"clip": "stage"'),
        ({"torch_autocast_enabled": True}, {}, "torch_autocast in float16", "bfloat16"),
        ({}, {"num_stages": 5, "parts": [0, 1, 2, 3, 4, 4]}, "5 stages for 4 layers", "at most 4 stages"),
        ({}, {"parts": [0, 4, 4]}, "stages without a layer: [1] (partition [0, 4, 4])", "uniform"),
        (
            {},
            {"topology": lambda: ProcessTopology(axes=["pipe", "expert"], dims=[2, 2])},
            "parallel axes ['expert']",
            "pipe, data and model",
        ),
    ],
)
def test_refuses_by_name_with_what_to_do_instead(
    config: dict[str, Any], module: dict[str, Any], name: str, remedy: str
) -> None:
    with pytest.raises(ValueError, match="DDG cannot train this set-up") as caught:
        refuse_unsupported(fake_config(**config), fake_module(**module))
    lines = [line for line in str(caught.value).splitlines() if line.startswith("- ")]
    assert len(lines) == 1
    assert name in lines[0]
    assert remedy in lines[0]
    way_back = '"enabled": false' in str(caught.value)
    assert way_back == ("no pipeline can run it" not in lines[0]), "DeepSpeed's own schedule, where it can"


def test_names_all_refusals_at_once() -> None:
    config = fake_config(zero_config=zero(2), torch_autocast_enabled=True)
    with pytest.raises(ValueError, match="DDG cannot train") as caught:
        refuse_unsupported(config, fake_module(parts=[0, 4, 4]))
    assert [line.split(":")[0] for line in str(caught.value).splitlines() if line.startswith("- ")] == [
        "- ZeRO stage 2",
        "- torch_autocast in float16",
        "- stages without a layer",
    ]


BRAIN = {"bfloat16_config": SimpleNamespace(enabled=True)}
TIED = {"_layer_specs": tied(0, 3)}


@pytest.mark.parametrize(
    ("name", "enabled", "config", "module", "words"),
    [
        ("1f1b", True, HALF, {}, "fp16"),
        ("ddg", False, BRAIN, {}, "bf16"),
        ("ddg", False, {"zero_config": zero(1)}, {}, "ZeRO-1"),
        ("ddg", False, {}, TIED, "tied weights"),
        (
            "ddg",
            False,
            {"_param_dict": {"ddg": {"staleness": "auto"}}},
            {},
            '"staleness": the optimizer was built for',
        ),
    ],
)
def test_refuses_a_switch_that_would_train_something_else(
    name: str, enabled: bool, config: dict[str, Any], module: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        refuse_switch(name, enabled, fake_config(**config), fake_module(**module))


@pytest.mark.parametrize(
    ("name", "enabled", "config", "module"),
    [("1f1b", True, {}, TIED), ("1f1b", True, BRAIN, TIED), ("ddg", True, HALF, TIED), ("ddg", False, {}, {})],
)
def test_lets_others_switch(name: str, enabled: bool, config: dict[str, Any], module: dict[str, Any]) -> None:
    refuse_switch(name, enabled, fake_config(**config), fake_module(**module))


def test_a_tie_inside_one_stage_is_none() -> None:
    refuse_switch("ddg", False, fake_config(), fake_module(_layer_specs=tied(0, 1)))
