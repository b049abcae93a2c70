"""What "auto" stands for, by optimizer, and what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.staleness.choose import choose, explain, kind_of
from ds_ddg.staleness.rotation import BasisRotation
from ds_ddg.staleness.rules import Rules, Settings

AUTO = Settings(rules="auto")


def deepspeeds(name: str, **group: Any) -> Any:
    """An optimizer of a class that DeepSpeed has, without its kernels."""
    parent = type(name, (torch.optim.Optimizer,), {"__module__": "deepspeed.ops"})
    return type("Own", (parent,), {})([torch.nn.Parameter(torch.zeros(2, 2))], {"lr": 0.1, **group})


def made(kind: Any, **settings: Any) -> torch.optim.Optimizer:
    return kind([torch.nn.Parameter(torch.zeros(2, 2))], lr=0.1, **settings)


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        (made(torch.optim.SGD), "SGD"),
        (made(torch.optim.Adam), "Adam"),
        (made(torch.optim.AdamW), "Adam"),
        (deepspeeds("FusedAdam"), "Adam"),
        (deepspeeds("DeepSpeedCPUAdam"), "Adam"),
        (deepspeeds("MuonWithAuxAdam"), "Muon"),
        (made(BasisRotation), "BasisRotation"),
        (made(torch.optim.NAdam), None),
        (made(torch.optim.Adagrad), None),
        (type("FusedAdam", (torch.optim.Adagrad,), {})([torch.nn.Parameter(torch.zeros(1))]), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_knows_optimizers_by_their_classes(optimizer: Any, kind: str | None) -> None:
    assert kind_of(optimizer) == kind


def test_torchs_muon_is_known_where_there_is_one() -> None:
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("this torch has no Muon")
    assert kind_of(made(muon)) == "Muon"


def test_sgd_asks_for_the_norm_to_clip_to() -> None:
    optimizer, plan = made(torch.optim.SGD, momentum=0.9), DDGPlan(4)
    with pytest.raises(ValueError, match="scale of your loss") as caught:
        choose(AUTO, optimizer, plan)
    for part in ('"gradient_clipping"', '"staleness": {"rules": "auto", "clip": 1.0}', '"clip": 0'):
        assert part in str(caught.value)
    expected = Rules(learning_rate=1.75, tolerance=1.0, momentum="stretch", extrapolation=3.0)
    assert choose(AUTO, optimizer, plan, gradient_clipping=2.0).rules == expected
    assert choose(AUTO, optimizer, DDGPlan(1)).rules == expected, "nothing is stale, so nothing is asked"
    for clip in (0.0, 3.0):
        settings = Settings(rules="auto", clip=clip)
        assert choose(settings, optimizer, plan).rules == expected.model_copy(update={"clip": clip})


def test_adam_and_muon_need_no_number() -> None:
    adam = choose(AUTO, made(torch.optim.AdamW), DDGPlan(8))
    assert adam.rules == Rules(learning_rate=0.5, tolerance=1.0, momentum="stretch", extrapolation=3.0)
    muon = choose(AUTO, deepspeeds("MuonWithAuxAdam"), DDGPlan(8))
    assert muon.rules == Rules(learning_rate=0.75, tolerance=1.0, extrapolation=1.0)


def test_says_what_it_does_and_what_would_serve_better() -> None:
    lines = choose(AUTO, made(torch.optim.AdamW), DDGPlan(4, 2)).lines
    assert "1.5 update(s) old: learning rate times 0.816; momentum 0.9 -> 0.96 (stretch)" in lines[0]
    assert "step 5.5 u_t - 4.5 u_(t-1)" in lines[0]
    assert "3 micro-batches a call or more, not 2" in lines[1]
    assert "Muon" in lines[2]
    deep = choose(AUTO, made(torch.optim.AdamW), DDGPlan(8)).lines
    assert "hurt in another" in deep[2]
    assert len(choose(Settings(learning_rate=1.0), made(torch.optim.AdamW), DDGPlan(8)).lines) == 3
    enough = choose(AUTO, made(torch.optim.AdamW), DDGPlan(4, 3)).lines
    assert len(enough) == 2, "no advice that has been followed already"
    assert len(choose(AUTO, deepspeeds("MuonWithAuxAdam"), DDGPlan(4, 3)).lines) == 1


def test_other_optimizers_are_left_alone_and_it_says_so() -> None:
    choice = choose(AUTO, made(torch.optim.Adagrad), DDGPlan(4))
    assert choice.rules == Rules()
    assert "no rule has been tried with Adagrad" in choice.lines[0]
    named = choose(Settings(rules="auto", learning_rate=1.0), made(torch.optim.Adagrad), DDGPlan(4))
    assert named.rules == Rules(learning_rate=1.0)


def test_off_does_what_is_named_and_says_nothing_of_nothing() -> None:
    optimizer = made(torch.optim.SGD)
    assert choose(Settings(), optimizer, DDGPlan(4)) == (Rules(), ())
    choice = choose(Settings(clip=2.0), optimizer, DDGPlan(4))
    assert choice.rules == Rules(clip=2.0)
    assert "clipped to 2 by the norm of the stage" in choice.lines[0]


def test_one_stage_has_nothing_stale() -> None:
    assert choose(AUTO, made(torch.optim.AdamW), DDGPlan(1)).lines == (
        "no gradient is stale, so nothing is done about staleness",
    )


@pytest.mark.parametrize(
    ("optimizer", "what"),
    [
        (made(torch.optim.Adagrad), "neither a momentum nor betas"),
        (deepspeeds("MuonWithAuxAdam", momentum=0.9), "before the step in bf16 and ZeRO-1"),
        (made(torch.optim.RMSprop), "RMSprop and a momentum of 0"),
    ],
    ids=["adagrad", "muon", "rmsprop"],
)
def test_refuses_a_momentum_that_is_not_there(optimizer: Any, what: str) -> None:
    settings = Settings(momentum="stretch")
    with pytest.raises(ValueError, match=what):
        choose(settings, optimizer, DDGPlan(2))
    assert choose(settings, optimizer, DDGPlan(1)).rules == Rules(momentum="stretch")


def test_explains_a_discount_that_fades() -> None:
    text = explain(Rules(learning_rate=1.0, anneal=100), DDGPlan(2))
    assert text == "stage 0, whose gradients are 1 update(s) old: learning rate times 0.5, fading within 100 call(s)"
