"""``ds-ddg check``: the messages of a run without a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.utils import logger

from ds_ddg.cli import main
from helpers.paths import ROOT

RIGHT = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}


def check(capsys: pytest.CaptureFixture[str], path: Path, config: Any, arguments: str = "", status: int = 0) -> str:
    path = path / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    assert main(["check", str(path), *arguments.split()]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def test_explains_every_setting(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {**RIGHT, "ddg": {"slack": 1, "activations": "recompute", "clip": "global"}}
    answer = json.loads(check(capsys, tmp_path, config, "--stages 3 --json"))
    assert answer["settings"]["slack"] == 1
    assert set(answer["effects"]) == set(answer["settings"])
    assert "4 on stage 0, so up to 2 update(s) stale" in answer["effects"]["enabled"]
    assert "up to 3 version(s)" in answer["effects"]["weights"]
    assert "inputs of up to 5 micro-batch(es)" in answer["effects"]["activations"]
    assert "up to 0.5 tick(s)" in answer["effects"]["slack"]
    assert "clipped to 1 by the norm of the whole pipeline 4 call(s) ago" in answer["effects"]["clip"]
    assert "loss of 2 call(s) ago" in answer["effects"]["loss"]
    assert answer["per_stage"] == [
        {"stage": 0, "delay": 4, "staleness": 2, "versions": 3, "graphs": 1, "inputs": 5},
        {"stage": 1, "delay": 2, "staleness": 1, "versions": 2, "graphs": 1, "inputs": 3},
        {"stage": 2, "delay": 0, "staleness": 0, "versions": 1, "graphs": 1, "inputs": None},
    ]


ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True}}}
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}, "gradient_clipping": 0.0}


@pytest.mark.parametrize(
    ("config", "stages", "parts"),
    [
        ({}, 4, ["the paper's algorithm", '"auto" does what suits']),
        ({}, 1, ["the paper's algorithm"]),
        ({"ddg": {"staleness": "auto"}}, 4, ["optimizer that is passed to ds_ddg.initialize"]),
        (
            {"ddg": {"staleness": "auto"}, **ADAMW},
            4,
            ["1.5 update(s) old: learning rate times 0.816; momentum 0.9 -> 0.96", "with 3 micro-batches", "Muon"],
        ),
        ({"ddg": {"staleness": {"clip": 2}}, **SGD}, 2, ["clipped to 2 by the norm of the stage"]),
        ({"ddg": {"staleness": "auto"}, **SGD, "gradient_clipping": 1.0}, 2, ["learning rate times 0.667"]),
    ],
)
def test_explains_the_rules_for_stale_gradients(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: dict[str, Any], stages: int, parts: list[str]
) -> None:
    answer = json.loads(check(capsys, tmp_path, {**RIGHT, **config}, f"--stages {stages} --json"))
    for part in parts:
        assert part in answer["effects"]["staleness"]
    assert '"staleness": ' in check(capsys, tmp_path, {**RIGHT, **config}, f"--stages {stages}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ddg": {"staleness": "auto"}, **SGD}, 'goes by the scale of your loss: set "gradient_clipping"'),
        ({"ddg": {"staleness": "auto", "clip": "global"}, **SGD, "gradient_clipping": 1.0}, "scale of your loss"),
        ({"ddg": {"staleness": {"clip": 1}, "clip": "global"}}, '"staleness": {"clip": 1} with "clip": "global"'),
        (
            {"ddg": {"staleness": {"momentum": "stretch"}}, "optimizer": {"type": "Adagrad", "params": {"lr": 0.1}}},
            "neither a momentum nor betas",
        ),
        (
            {"ddg": {"staleness": "auto"}, "optimizer": {"type": "Lamb"}, "fp16": {"enabled": True}},
            '"staleness" with fp16 and Lamb',
        ),
    ],
)
def test_refuses_rules_that_cannot_be_followed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    assert message in check(capsys, tmp_path, {**RIGHT, **config}, status=2)


def test_says_what_was_given_and_what_is_a_default(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    answer = check(capsys, tmp_path, {**RIGHT, "ddg": {"slack": 0}}, "--stages 2 --replicas 3")
    assert "is right for K = 2 stages, M = 2 micro-batches a call, 3 replica(s)" in answer
    assert '"slack": 0\n' in answer
    assert '"weights": "stash" (default)\n' in answer
    assert "is checked when the engine is built" in answer


def test_disabled(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {**RIGHT, "ddg": {"enabled": False}, "zero_optimization": {"stage": 1}}
    assert "DeepSpeed's own 1F1B" in check(capsys, tmp_path, config)


@pytest.mark.parametrize(
    ("config", "arguments", "parts"),
    [
        ({**RIGHT, "ddg": {"slak": 1}}, "", ["\"ddg\": unknown key 'slak' (value 1); known keys: enabled, weights"]),
        ({**RIGHT, "ddg": {"loss": 0, "clip": "all"}}, "", ['{"loss": 0}', "{\"clip\": 'all'}"]),
        ({**RIGHT, "zero_optimization": {"stage": 3}}, "", ["ZeRO stage 3: no pipeline can run it"]),
        (
            {**RIGHT, "optimizer": {"type": "Lamb"}, "fp16": {"enabled": True}, "ddg": {"clip": "global"}},
            "",
            ['"clip": "global" with fp16 and Lamb', 'use "clip": "stage"'],
        ),
        ({"steps_per_print": 5}, "", ["DeepSpeed refuses the config: Either train_batch_size or"]),
        ({**RIGHT, "train_batch_size": 8}, "--replicas 2", ["refuses the config: Check batch", "8 != 4 * 2 * 2"]),
        ("[1]", "", ["must hold a block of settings, {...}, got list"]),
        ("{", "", ["is not JSON"]),
        (RIGHT, "--stages 0", ["--stages must be 1 or more, got 0"]),
    ],
)
def test_refuses_as_a_run_does(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: Any, arguments: str, parts: list[str]
) -> None:
    error = check(capsys, tmp_path, config, arguments, status=2)
    for part in parts:
        assert part in error


# -- what DeepSpeed fails on, or silently reads otherwise than it was meant -----------------------------------

PLAIN = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "ddg": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"zero_optimization": {"stage": 2}, "ddg": {"enabled": False}},
            'ZeRO stage 2: no pipeline can run it; set "zero_optimization": {"stage": 0}',
        ),
        ({"optimizer": {"type": "sgd"}}, "\"optimizer\": DeepSpeed knows no \"type\" 'sgd'; did you mean 'SGD'?"),
        ({"optimizer": {"type": "Mine"}}, "knows no \"type\" 'Mine'; it knows ASGD, Adadelta"),
        ({"optimizer": {"type": "LBFGS"}}, "LBFGS runs the model itself"),
        ({"scheduler": {"type": "ReduceLROnPlateau", "params": {}}}, "ReduceLROnPlateau needs a metric"),
        ({"optimizer": {"type": "Optimizer"}}, "knows no \"type\" 'Optimizer'"),
        (
            {"optimizer": {"type": "SGD", "params": {"learning_rate": 1}}},
            "\"optimizer\": SGD has no parameter 'learning_rate'; it has lr, momentum",
        ),
        ({"optimizer": {"type": "AdamW", "params": {"fused": True}}}, "FusedAdam has no parameter 'fused'"),
        ({"optimizer": {"type": "Lion", "params": {"eps": 1}}}, "FusedLion has no parameter 'eps'"),
        ({"optimizer": {"type": "Lamb", "params": {"max_grad_norm": 1}}}, 'set "gradient_clipping" instead'),
        ({"optimizer": {"type": "SGD"}, "zero_optimization": {"stage": 1}}, "not tested ZeRO-1 with SGD"),
        ({"scheduler": {"type": "WarmupLr", "params": {}}}, "knows no \"type\" 'WarmupLr'; did you mean 'WarmupLR'?"),
        ({"scheduler": {"type": "WarmupLR"}}, '"scheduler": DeepSpeed needs "params" with it'),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {}}}, "missing a required argument: 'total_num_steps'"),
        ({"scheduler": {"type": "StepLR", "params": {"step": 1}}}, "StepLR has no parameter 'step'; it has step_size"),
        ({"gradient_clipping": -1}, '"gradient_clipping" must be a number, 0 (none) or more, got -1'),
        ({"gradient_clipping": None}, '"gradient_clipping" must be a number, 0 (none) or more, got None'),
        (
            {"train_micro_batch_size_per_gpu": "x"},
            "_micro_batch_size_per_gpu\" must be a whole number, got 'x'",
        ),
        ({"gradient_accumulation_steps": 1.5}, '"gradient_accumulation_steps" must be a whole number, got 1.5'),
        ({"bf16": 3}, '"bf16" must be a block of settings, {...}, got 3'),
        ({"optimizer": "SGD"}, "\"optimizer\" must be a block of settings, {...}, got 'SGD'"),
        ({"optimizer": {"name": "SGD"}}, '"optimizer" must say its "type"'),
        ({"optimizer": {"type": "SGD", "params": 1}}, '"optimizer": "params" must be a block of settings'),
        (
            {"fp16": {"enabled": True, "loss_scale": "x"}},
            "refuses the config: ValidationError: 1 validation",
        ),
        ({"wall_clock_breakdown": "x"}, "DeepSpeed refuses the config: TypeError: "),
        ({"steps_per_print": 0}, '"steps_per_print": 0: no pipeline can run it; give a number of calls, 1 or more'),
        ({"steps_per_print": 0, "ddg": {"enabled": False}}, "DeepSpeed's schedule cannot train this set-up:"),
        ({"steps_per_print": "ten"}, "\"steps_per_print\": 'ten': no pipeline"),
        ({"wall_clock_breakdown": True}, '"wall_clock_breakdown" without "steps_per_print"'),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer: not supp"),
        (
            {"train_micro_batch_size_per_gpu": "auto", "optimizer": {"type": "SGD", "params": {"lr": "auto"}}},
            'train_micro_batch_size_per_gpu, optimizer.params.lr: "auto" is for programs that fill it in, such as '
            "transformers",
        ),
        ({"gradient_clipping": "auto"}, 'gradient_clipping: "auto" is for programs'),
    ],
)
def test_what_a_run_would_fail_on_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    error = check(capsys, tmp_path, {**PLAIN, **change}, status=2).splitlines()
    assert message in "\n".join(error[[line.startswith("ds-ddg: error: ") for line in error].index(True) :])


SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": {"type": "SGD", "params": {"lr": -1}}}, "SGD: ValueError: Invalid learning rate: -1"),
        ({"optimizer": {"type": "SGD", "params": {"nesterov": True}}}, "Nesterov momentum requires a momentum"),
        ({"optimizer": {"type": "SGD", "params": {"differentiable": True}}}, '"optimizer": SGD: RuntimeError: a leaf'),
        ({"optimizer": {"type": "SparseAdam"}}, "SparseAdam does not support dense gradients"),
        ({"optimizer": {"type": "Adam", "params": {"torch_adam": True, "betas": [1, 2]}}}, "Invalid beta parameter"),
        (
            {"optimizer": {"type": "Adam", "params": {"amsgrad": True}}},
            "FusedAdam does not support the AMSG",
        ),
        (
            {"optimizer": {"type": "Lamb", "params": {"amsgrad": True}}},
            "FusedLamb does not support the AMSG",
        ),
        ({"optimizer": {"type": "MuAdam"}}, '"optimizer": muadam needs the package "mup"'),
        ({"optimizer": {"type": "Muon", "params": {"muon_lr": -1}}}, 'Muon with "muon_lr": -1: Input should be'),
        ({"optimizer": {"type": "Muon", "params": {"muon_momentum": 0.9}}}, "Muon has no parameter 'muon_momentum'"),
        ({"optimizer": {"type": "SGD", "params": {"lr": "x"}}}, "'<' not supported between instances of 'str' and"),
        ({**SGD, "scheduler": {"type": "StepLR", "params": {"step_size": 0}}}, "StepLR: ZeroDivisionError"),
        ({**SGD, "scheduler": {"type": "LambdaLR", "params": {"lr_lambda": 1}}}, "LambdaLR: TypeError: 'int' object"),
        (
            {**SGD, "scheduler": {"type": "LRRangeTest", "params": {"lr_range_test_step_size": 0}}},
            "a positive integer",
        ),
        (
            {**SGD, "scheduler": {"type": "StepLR", "params": {"step_size": 1}}, "bf16": {"enabled": True}},
            "StepLR is PyTorch's, and takes no optimizer that DeepSpeed has wrapped",
        ),
        ({**SGD, "data_types": {"grad_accum_dtype": "bf16"}}, "unsupported mix of model_dtype=torch.float32"),
        ({**SGD, "data_types": {"param_dtype": "bf16"}}, "conflicts with the enabled precision mode"),
    ],
)
def test_what_a_run_refuses_while_it_builds(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """The parameters have names that are right, and values that are not."""
    assert message in check(capsys, tmp_path, {**PLAIN, **change}, status=2)


def test_keys_that_are_there_twice(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = '{"train_batch_size": 4, "ddg": {"slack": 1, "slack": 2}}'
    assert "Duplicate keys in DeepSpeed config: ['slack']" in check(capsys, tmp_path, config, status=2)


@pytest.mark.parametrize("key", ["DDG", "Ddg", "dgd", "ds_ddg"])
def test_a_block_that_is_spelled_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path, key: str) -> None:
    error = check(capsys, tmp_path, {"train_batch_size": 4, key: {"slack": 1}}, status=2)
    assert f'unknown key {key!r}, which DeepSpeed would ignore; did you mean "ddg"?' in error


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.99], "adam_w_mode": False}}},
        {"optimizer": {"type": "Adam", "params": {"torch_adam": True, "fused": False, "fp32_optimizer_states": True}}},
        {"optimizer": {"type": "RMSprop", "params": {"alpha": 0.9}}, "gradient_clipping": 1},
        {"optimizer": {"type": "Muon", "params": {"muon_lr": 0.1, "betas": [0.9, 0.98], "torch_adam": True}}},
        {"optimizer": {"type": "SGD"}, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True},
        {"optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 1}},
        {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 10}}},
        {"scheduler": {"type": "CosineAnnealingLR", "params": {"T_max": 10}}},
        {"ddg": {"slack": "auto"}},
        {"train_batch_size": None, "keys_of_others": {"a": 1}},
        {"zero_optimization": {"stage": 1}, "ddg": {"enabled": False}},
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}, "ddg": {"enabled": False}},
        {"steps_per_print": None},
        {"steps_per_print": 1, "wall_clock_breakdown": True},
        {"bf16": {"enabled": "auto"}, "wandb": {"project": "auto"}},
        {"bf16": None, "zero_optimization": False, "optimizer": {"type": "Adam", "params": None}},
        {"scheduler": {}},
        {"ddg": None, "ddp": {"a": 1}},
    ],
)
def test_what_a_run_takes_is_right(capsys: pytest.CaptureFixture[str], tmp_path: Path, change: dict[str, Any]) -> None:
    assert "is right for" in check(capsys, tmp_path, {**PLAIN, **change})


def test_says_what_becomes_of_auto(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = check(capsys, tmp_path, {**PLAIN, "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}})
    assert 'zero_optimization.reduce_bucket_size is "auto", which DeepSpeed takes for its default' in said


def test_comments_are_read_as_deepspeed_reads_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "is right for" in check(capsys, tmp_path, '{\n  # all\n  "train_batch_size": 4, "ddg": {}\n}')


def test_says_what_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    block, optimizer = 'there is no "ddg" block, so all settings of ddg are defaults', "there is no optimizer, so one"
    answer = check(capsys, tmp_path, {"train_batch_size": 4})
    assert block in answer
    assert optimizer in answer
    answer = check(capsys, tmp_path, {**PLAIN, "optimizer": {"type": "SGD"}})
    assert block not in answer
    assert optimizer not in answer
    notes = json.loads(check(capsys, tmp_path, {"train_batch_size": 4}, "--json"))["notes"]
    assert [note[:20] for note in notes] == [block[:20], optimizer[:20]]


def test_says_what_muon_takes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    answer = check(
        capsys, tmp_path, {**PLAIN, "optimizer": {"type": "Muon", "params": {"lr": 0.01, "adam_lr": 0.001}}}
    )
    assert "Muon takes the weights of linear, attention and 2-d convolution layers, at learning rate 0.01;" in answer
    assert "AdamW embeddings, the output layer and the rest, at 0.001" in answer


def test_one_stage_is_plain_training(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {**PLAIN, "gradient_clipping": 0.5}
    effects = json.loads(check(capsys, tmp_path, config, "--stages 1 --json"))["effects"]
    assert effects["enabled"] == "one stage is plain training: nothing is delayed, and no gradient is stale"
    assert effects["slack"] == effects["weights"] == effects["activations"] == "does nothing on one stage"
    assert effects["clip"] == "gradients are clipped to 0.5 by their norm"
    assert effects["loss"] == "train_batch returns the loss of its own call"
    assert set(effects) == set(json.loads(check(capsys, tmp_path, config, "--json"))["effects"])


def test_the_recipes_own_configs_are_right(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They leave the number of calls to the recipe, which is said; of a number that nobody gave nothing is."""
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    configs = sorted((ROOT / "configs").glob("*.json"))
    assert len(configs) > 5
    left = []
    for path in configs:
        assert main(["check", str(path), "--stages", "4"]) == 0, path
        if 'total_num_steps is "auto": the recipes put the number of calls there' in capsys.readouterr().out:
            left.append(path.name)
    assert "resnet20_digits.json" in left
    assert len(left) < len(configs)
    assert [text for record in caplog.records if "num_steps" in (text := record.getMessage())] == []
