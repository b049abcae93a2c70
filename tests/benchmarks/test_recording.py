"""The benchmark of what recording costs: its statistics."""

from __future__ import annotations

import random
from math import inf

import pytest

from benchmarks import recording


def test_differences_are_of_the_slower_stage_or_of_all() -> None:
    stages = [
        {"without": [(1.0, 0.5), (2.0, 0.5)], "with": [(1.0, 0.5), (2.1, 0.6)]},
        {"without": [(0.9, 0.5), (2.0, 0.5)], "with": [(1.1, 0.5), (2.0, 0.5)]},
    ]
    assert recording.differences(stages, 0, max) == pytest.approx([0.1, 0.05])
    assert recording.differences(stages, 1, sum) == pytest.approx([0.0, 0.1])


def test_microseconds_are_of_one_micro_batch_on_one_stage() -> None:
    stages = [
        {"without": [(9.0, 1.0), (9.0, 1.0)], "with": [(9.0, 1.004), (9.0, 1.0)]},
        {"without": [(9.0, 1.0), (9.0, 1.0)], "with": [(9.0, 1.0), (9.0, 1.008)]},
    ]
    assert recording.microseconds(stages, calls=100) == pytest.approx([10.0, 20.0])


def test_the_interval_holds_the_median_19_times_of_20() -> None:
    generator = random.Random(0)
    for n, expected in ((6, 0), (40, 13)):  # binomial tables: ranks 1 and 6, ranks 14 and 27
        assert recording.interval(list(range(n))) == (expected, n - 1 - expected)
    assert recording.interval([3, 1, 2, 4, 5]) == (-inf, inf), "of five none is sure enough"
    inside = 0
    for _ in range(1000):
        low, high = recording.interval([generator.expovariate(1.0) for _ in range(25)])
        inside += low <= 0.6931 <= high
    assert 940 <= inside <= 985


def test_pairs_needed_follow_the_spread() -> None:
    generator = random.Random(0)
    values = [generator.gauss(0.005, 0.03) for _ in range(1000)]
    needed = recording.pairs_needed(values)
    assert needed == pytest.approx((1.96 * 1.2533 * 3) ** 2, rel=0.15)
    low, high = recording.interval(values[:needed])
    assert 0.014 < high - low < 0.03
    assert recording.pairs_needed([0.01, 0.01]) == 1


@pytest.mark.parametrize(
    ("interval", "said"),
    [((-0.01, 0.009), "below 1%"), ((0.011, 0.03), "above 1%"), ((0.0, 0.02), "cannot tell whether below 1%")],
)
def test_a_verdict_only_where_there_is_one(interval: tuple[float, float], said: str) -> None:
    assert recording.verdict(*interval) == said
