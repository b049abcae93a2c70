"""A picture of a study: what was measured over the number of stages, a panel for each problem and M."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from ds_ddg.extras import extra

__all__ = ["save_quality"]

_SETTINGS = ("problem", "stages", "micro_batches", "rules", "learning_rate", "seeds", "diverged")


def save_quality(rows: Sequence[Mapping[str, Any]], path: str | Path, measure: str | None = None) -> None:
    """Draw a measure over K: a line for each rule and learning rate, and the lowest and the highest of the seeds.

    Args:
        rows: the summary of a study, as ``ds-ddg study`` makes it.
        path: ends in .svg or .png.
        measure: the name of what is drawn; default: the last one that was measured.

    Raises:
        ValueError: nothing of that name was measured.
        MissingExtraError: matplotlib is not installed.
    """
    with extra("plot", "a picture"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    measures = [name for name in rows[0] if name not in _SETTINGS] if rows else []
    measure = measure or (measures[-1] if measures else None)
    if measure not in measures:
        raise ValueError(f"nothing named {measure!r} was measured; there is {', '.join(measures) or 'nothing'}")
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    batches = sorted({row["micro_batches"] for row in rows})
    figure = Figure(figsize=(3.2 * len(batches) + 0.8, 2.6 * len(problems) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(problems), len(batches), sharex=True, sharey="row", squeeze=False)
    for (i, problem), (j, micro_batches) in product(enumerate(problems), enumerate(batches)):
        ax = panels[i, j]
        here = [row for row in rows if row["problem"] == problem and row["micro_batches"] == micro_batches]
        synchronous = [row for row in here if row["stages"] == 1]
        for rules, rate in dict.fromkeys((row["rules"], row["learning_rate"]) for row in here if row["stages"] > 1):
            line = [row for row in here if (row["rules"], row["learning_rate"]) == (rules, rate)]
            line += [row for row in synchronous if row["learning_rate"] == rate and row not in line]
            line = sorted((row for row in line if row[measure]), key=lambda row: int(row["stages"]))
            if not line:
                continue
            values = [row[measure] for row in line]
            spread = [[v[0] - v[1] for v in values], [v[2] - v[0] for v in values]]
            label = rules if rate == 1 else f"{rules}, lr x {rate:g}"
            ax.errorbar([row["stages"] for row in line], [v[0] for v in values], spread, label=label, marker="o",
                        markersize=3, capsize=2)  # fmt: skip
        ax.set_title(f"{Path(problem).name}, M = {micro_batches}", fontsize=8, loc="left")
        ax.set_xscale("log", base=2)
        ax.grid(alpha=0.3)
    for ax in panels[-1]:
        ax.set_xlabel("stages, K")
    for ax in panels[:, 0]:
        ax.set_ylabel(measure)
    panels[0, 0].legend(fontsize=7)
    figure.savefig(Path(path), dpi=120)
