"""The picture of a training run: its loss above, what was measured on held-out data below."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
from matplotlib import pyplot as plt

WIDE_RANGE = 20
"""Values that differ by more than this factor are drawn on a logarithmic axis."""


def draw_curves(
    path: Path,
    title: str,
    losses: Mapping[int, float],
    held_out: Mapping[str, Mapping[int, float]],
    window: int,
    calls_per_epoch: int | None,
) -> None:
    """Write a PNG.

    Args:
        path: the file to write.
        title: the title above the picture.
        losses: training loss by call (0, 1, ...).
        held_out: name -> number of calls made -> value; one line each.
        window: calls that one point of the smoothed loss stands for.
        calls_per_epoch: the unit of the common axis; None for calls.
    """
    unit = calls_per_epoch or 1
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 7), layout="constrained")
    calls = sorted(losses)
    above.plot(
        [(call + 1) / unit for call in calls],
        [losses[call] for call in calls],
        color="tab:blue",
        alpha=0.3,
        linewidth=0.8,
        label="one call",
    )
    chunks = [calls[start : start + window] for start in range(0, len(calls), window)]
    above.plot(
        [_mean([call + 1 for call in chunk]) / unit for chunk in chunks],
        [_mean([losses[call] for call in chunk]) for chunk in chunks],
        color="tab:blue",
        marker="o",
        markersize=4,
        label=f"mean of {window} calls",
    )
    above.set(title=title, ylabel="training loss", yscale="log")
    if calls:
        above.legend()
    for name, values in held_out.items():
        below.plot(
            [call / unit for call in values], list(values.values()), marker="o", markersize=4, label=words(name)
        )
    below.set(xlabel="epoch" if calls_per_epoch else "calls made", ylabel="held-out data")
    drawn = [value for values in held_out.values() for value in values.values()]
    if drawn:
        below.legend()
        if min(drawn) > 0 and max(drawn) > WIDE_RANGE * min(drawn):
            below.set(yscale="log")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def words(name: str) -> str:
    """Return the name of a metric as people write it."""
    return name.replace("_", " ")


def _mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values)
