"""Memory as the plan counts it, against counting by hand what is alive at a stage's fullest moment."""

from __future__ import annotations

import pytest

from ds_ddg.analysis.balance import LayerCost
from ds_ddg.analysis.memory import Backward, Sizes, fullest
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.schedules.interleaved import InterleavedPlan
from ds_ddg.schedules.plan import Plan
from ds_ddg.schedules.synchronous import DualPipeVPlan, GPipePlan, OneFOneBPlan
from ds_ddg.schedules.zero_bubble import ZeroBubbleH1Plan, ZeroBubbleVPlan


def sizes(first: float = 1500, later: float = 300, sent: float = 1) -> Sizes:
    """Digits tell them apart; a message is 1."""
    return Sizes(1000, 200, received=1, sent=sent, backward=Backward(first, later))


@pytest.mark.parametrize(
    ("slack", "stage", "expected"),
    [
        # Versions, two micro-batches that wait with their inputs and copies, the one at work, messages.
        (0, 0, 3000 + 2 * 202 + 1500 + 2 + 2),  # ... the gradient that is used, the next
        (0, 1, 2000 + 202 + 1500 + 2 + 2 + 1 + 2),  # ... two gradients held, the next activation, gradients as before
        (0, 2, 1000 + 1500 + 2 + 2 + 1),  # ... two gradients held, the next activation
        (1, 0, 5000 + 4 * 202 + 1500 + 2 + 1 + 1),
        (1, 1, 3000 + 2 * 202 + 1500 + 2 + 3 + 1 + 1 + 1),
        (1, 2, 1000 + 1500 + 2 + 3 + 1),
    ],
)
def test_with_one_micro_batch_no_gradients_are_there_before(slack: int, stage: int, expected: float) -> None:
    assert fullest(DDGPlan(3, 1, slack), stage, sizes(sent=stage < 2)) == expected


def test_with_more_the_fullest_backward_finds_gradients() -> None:
    plan = DDGPlan(3, 4)
    # The second of the call still uses an old version; the data of two more micro-batches waits.
    assert fullest(plan, 0, sizes(first=100)) == 2000 + 2 * 202 + 1000 + 300 + 2 + 2 + 2
    # On stage 1 only the first one does, before there are gradients: here, the update comes to as much as that.
    assert fullest(plan, 1, sizes(first=1100)) == 2000 + 202 + 1100 + 2 + 5
    assert fullest(plan, 1, sizes(first=100)) == 2000 + 202 + 1000 + 5, "at the update, with its new version"
    assert fullest(plan, 1, sizes(first=100, later=2000)) == 1000 + 202 + 1000 + 2000 + 2 + 5


def test_one_version_if_a_backward_may_see_newer_weights() -> None:
    assert fullest(DDGPlan(3), 0, sizes(), stash=False) == 1000 + 2 * 202 + 1500 + 2 + 2


def test_recomputing_keeps_inputs_and_what_is_on_its_way() -> None:
    assert fullest(DDGPlan(3), 0, sizes(), recompute=True) == 3000 + 2 * 1 + 1500 + 2 + 2 + 3
    assert fullest(DDGPlan(3), 1, sizes(), recompute=True) == 2000 + 1 * 1 + 1500 + 2 + 5 + 2


@pytest.mark.parametrize(
    ("plan", "stage", "expected"),
    [
        (OneFOneBPlan(3, 1), 0, 1000 + 2 + 1500 + 2),
        (OneFOneBPlan(3, 4), 0, 1000 + 1000 + 2 * 202 + 2 + 300 + 2 + 3),
        (GPipePlan(3, 4), 1, 1000 + 1000 + 3 * 202 + 2 + 300 + 4),
        # 7 passes, each through half of a stage.
        (DualPipeVPlan(3, 6), 1, 1000 + 1000 + 2.5 * 200 + 3.5 * 2 + 300 + 4),
        # Of the other two passes the activations, and buffers for 6 messages of each direction and chunk.
        (InterleavedPlan(3, 6), 1, 1000 + 1000 + 2 * 200 + 300 + 2 * 12),
        # Of 2 of 3 passes the activations, and as much in gradients for those whose W is put off, here 2 and 1.5.
        (ZeroBubbleH1Plan(3, 6), 1, 1000 + 1000 + (2 + 2) * 200 + 300 + 12),
        (ZeroBubbleVPlan(3, 6), 1, 1000 + 1000 + (2 + 1.5) * 200 + 300 + 2 * 12),
        (ZeroBubbleH1Plan(3, 1), 1, 1000 + 1500 + 200 + 2),
    ],
)
def test_synchronous_schedules(plan: Plan, stage: int, expected: float) -> None:
    assert fullest(plan, stage, sizes()) == expected


def test_gradients_take_the_place_of_activations() -> None:
    """Of a backward from the last layer to the first, the moment with most."""
    layers = [LayerCost("a", 1, 1, 10, 300, 5), LayerCost("b", 1, 1, 400, 20, 7)]
    # At b: all activations, b's gradient, those of its output and input. At a: a's own, both gradients.
    assert Backward.of_layers(layers, received=3) == (320 + 400 + 12, max(320 + 400 + 12, 300 + 10 + 8))
    other = [layers[1], layers[0]]
    assert Backward.of_layers(other, received=0) == (max(320 + 10 + 12, 20 + 410 + 7), max(342, 20 + 400 + 7))
    many = [LayerCost("x", 1, 1, 4, 3, 0)] * 1000
    assert Backward.of_layers(many, 0).first == pytest.approx(Backward.of_equal_layers(4000, 3000, 0).first, rel=0.01)
    assert Backward.of_layers(many, 0).later == pytest.approx(Backward.of_equal_layers(4000, 3000, 0).later, rel=0.01)
