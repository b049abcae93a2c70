"""The formulas of the rules, in numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.staleness.rules import FRESH, Rules, Settings, Staleness

EVERYTHING = {"learning_rate": 1.5, "anneal": 10, "momentum": "stretch", "extrapolation": 0.5, "clip": 2.0}


@pytest.mark.parametrize(
    ("plan", "stage", "updates", "share"),
    [
        (DDGPlan(4), 0, 3.0, 0.75),
        (DDGPlan(4), 3, 0.0, 0.0),
        (DDGPlan(4, 2), 0, 1.5, 0.75),
        (DDGPlan(8, 8, slack=1), 1, 1.5, 0.75),
        (DDGPlan(1), 0, 0.0, 0.0),
    ],
)
def test_staleness_is_the_delay_in_updates(plan: DDGPlan, stage: int, updates: float, share: float) -> None:
    assert Staleness.of(plan, stage, call=5) == Staleness(updates, share, 5)


@pytest.mark.parametrize("momentum", ["keep", "stretch", "asyncpp"])
def test_nothing_changes_where_nothing_is_stale(momentum: str) -> None:
    rules = Rules.model_validate({**EVERYTHING, "momentum": momentum})
    for call in (0, 3, 100):
        fresh = FRESH._replace(call=call)
        assert rules.rate_factor(fresh) == 1.0
        assert rules.momentum_at(0.3, fresh) == 0.3, "to the last bit"
        assert rules.lead(fresh) == 0.0
        assert rules.max_norm(0.0, fresh) == 0.0
        assert rules.max_norm(5.0, fresh) == 5.0


def test_default_rules_do_nothing() -> None:
    old = Staleness(7.0, 0.875, 3)
    assert not Rules().steps
    assert (Rules().rate_factor(old), Rules().momentum_at(0.9, old), Rules().lead(old)) == (1.0, 0.9, 0.0)
    assert Rules().max_norm(0.0, old) == 0.0
    assert str(Rules()) == "nothing"


def test_discount_falls_with_the_staleness_and_fades() -> None:
    rules = Rules(learning_rate=2.5)
    assert rules.rate_factor(Staleness(3.0)) == 1 / 32
    tolerant = Rules(learning_rate=0.5, tolerance=1.0)
    assert [tolerant.rate_factor(Staleness(s)) for s in (0.5, 1.0, 4.0)] == [1.0, 1.0, 0.5]
    fading = Rules(learning_rate=2.0, anneal=4)
    factors = [fading.rate_factor(Staleness(1.0, call=call)) for call in (0, 1, 2, 4, 9)]
    assert factors == pytest.approx([0.25, 2**-1.5, 0.5, 1.0, 1.0], rel=1e-15)


def test_momentum_is_stretched_or_taken_from_the_depth() -> None:
    old = Staleness(3.0, 0.75)
    assert Rules(momentum="stretch").momentum_at(0.9, old) == pytest.approx(0.975, rel=1e-15)
    assert Rules(momentum="stretch").momentum_at(0.0, old) == 0.75, "memory of one update becomes that of four"
    assert Rules(momentum="stretch").rate_factor(old) == 1.0
    assert Rules(momentum="stretch").rate_factor(old, momentum_sums=True) == 0.25, "a gradient moves as far in all"
    assert Rules(momentum="asyncpp").rate_factor(old, momentum_sums=True) == 1.0
    assert Rules(momentum="asyncpp").momentum_at(0.9, old) == pytest.approx(0.9675, rel=1e-15)


def test_smaller_of_two_norms_holds_where_gradients_are_old() -> None:
    rules, old = Rules(clip=2.0), Staleness(1.0)
    assert [rules.max_norm(norm, old) for norm in (0.0, 1.0, 3.0)] == [2.0, 1.0, 2.0]
    assert Rules().max_norm(3.0, old) == 3.0


@pytest.mark.parametrize(
    "block",
    [
        {"learning_rate": -1.0},
        {"learning_rate": math.inf},
        {"extrapolation": math.nan},
        {"clip": "1"},
        {"anneal": 1.5},
        {"momentum": "nesterov"},
        {"beta": 1},
        {"rules": "S"},
    ],
)
def test_wrong_numbers_are_refused(block: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings.model_validate(block)


def test_block_knows_what_it_names() -> None:
    settings = Settings.model_validate({"rules": "auto", "clip": 0, "momentum": "keep"})
    assert settings.named == {"clip": 0.0, "momentum": "keep"}
    assert str(Rules.model_validate(EVERYTHING)).startswith("learning_rate 1.5, anneal 10, momentum stretch")
