"""Balanced stages: the split against brute force."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ds_ddg.analysis.balance import Balance, LayerCost, balance
from helpers.timed_layers import costs


def merit(split: Balance) -> tuple[float, int, int]:
    """What counts, in this order: pace, bytes between stages, largest memory."""
    memory = [sum(layer.parameter_bytes + layer.activation_bytes for layer in stage) for stage in split.stages]
    return split.pace_ms, sum(stage[-1].output_bytes for stage in split.stages[:-1]), max(memory)


def every_split(layers: list[LayerCost], num_stages: int) -> Iterator[Balance]:
    for cuts in itertools.combinations(range(1, len(layers)), num_stages - 1):
        yield Balance(tuple(layers), (0, *cuts, len(layers)))


def test_no_split_is_better() -> None:
    """Small whole numbers, so that many splits tie."""
    draw = random.Random(5)
    for _ in range(400):
        layers = [
            LayerCost("", *(draw.choice([0, 1, 2, 3, 7]) for _ in range(2)), *(draw.randrange(4) for _ in range(3)))
            for _ in range(draw.randint(1, 9))
        ]
        num_stages = draw.randint(1, len(layers))
        found = balance(layers, num_stages)
        assert all(first < end for first, end in itertools.pairwise(found.parts)), "an empty stage"
        assert merit(found) == min(map(merit, every_split(layers, num_stages)))
        assert balance(layers, num_stages) == found


def test_no_split_is_faster_for_any_times() -> None:
    draw = random.Random(6)
    for _ in range(100):
        layers = costs(*(draw.expovariate(1) for _ in range(draw.randint(2, 9))))
        num_stages = draw.randint(2, len(layers))
        fastest = min(split.pace_ms for split in every_split(layers, num_stages))
        assert balance(layers, num_stages).pace_ms == pytest.approx(fastest, rel=1e-12)


def test_rounding_does_not_break_a_tie() -> None:
    """Both cuts of a, b, a are equally fast, so the traffic decides, whatever rounding makes of a + b."""
    draw = random.Random(8)
    for _ in range(200):
        a, b = draw.random(), draw.random()
        for traffic, parts in [((1, 9), (0, 1, 3)), ((9, 1), (0, 2, 3))]:
            layers = [
                LayerCost("", time, 0, output_bytes=out) for time, out in zip((a, b, a), (*traffic, 0), strict=True)
            ]
            assert balance(layers, 2).parts == parts


def test_hundreds_of_layers() -> None:
    draw = random.Random(7)
    assert balance(costs(*(draw.random() for _ in range(400))), 32).efficiency > 0.85


def test_layers_that_cost_nothing() -> None:
    found = balance(costs(0, 0, 0), 2)
    assert (found.parts, found.pace_ms, found.efficiency) == ((0, 1, 3), 0, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: balance(costs(1, 1), 3), "3 stages for 2 layers; use 1 to 2 stages"),
        (lambda: balance(costs(1, 1), 0), "0 stages for 2 layers"),
        (lambda: balance([], 1), "1 stages for 0 layers"),
        (lambda: LayerCost("Linear", -1, 0), "layer 'Linear': forward_ms must be finite and 0 or more, got -1"),
        (lambda: LayerCost("Linear", 1, 0, output_bytes=float("nan")), "output_bytes must be finite"),
    ],
)
def test_what_cannot_be_split(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


def test_prediction_as_a_table_and_as_data() -> None:
    layers = [
        LayerCost("Stem", 1, 2, 1200, 3_000_000, 400),
        LayerCost("Block", 2, 4, 5_000_000, 1_000_000, 400),
        LayerCost("Head", 1, 1, 10, 20, 4),
    ]
    assert (
        str(Balance(tuple(layers), (0, 2, 3)))
        == """\
stage             layers  forward ms  backward ms  parameters  memory   share
    0  0 Stem .. 1 Block       3.000        6.000      5.0 MB  9.0 MB  100.0%
    1             2 Head       1.000        1.000        10 B    30 B   22.2%

pace: 9.000 ms per micro-batch; efficiency (mean / slowest): 61.1%
memory: parameters and the activations of one micro-batch; share: of the slowest stage's time"""
    )
    record = balance(layers, 2).record()
    assert record["parts"] == [0, 1, 3]
    assert record["per_stage"][1] == {
        "stage": 1,
        "layers": ["Block", "Head"],
        "forward_ms": 3,
        "backward_ms": 5,
        "parameter_bytes": 5_000_010,
        "memory_bytes": 6_000_030,
        "share": 1,
    }
