"""The results of ``quality.py``, by what they are of."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from ds_ddg.study.grid import Cell

__all__ = ["MICRO_BATCHES", "OPTIMIZERS", "PROBLEMS", "STAGES", "Means", "Results", "name_of"]

Results = Mapping[Cell, Mapping[str, Any]]

STAGES, MICRO_BATCHES = (1, 2, 4, 8), (1, 2, 4, 8)
PROBLEMS = {"digits_gn": "accuracy", "digits_bn": "accuracy", "bytes": "nats"}
OPTIMIZERS = ("sgd", "adamw", "muon")


def name_of(kind: str, optimizer: str, length: float = 1.0) -> str:
    """Return the name of a problem for ``quality.problem``."""
    return f"{kind}_{optimizer}" + (f"@{length:g}" if length != 1 else "")


class Means:
    """The results of runs, by what they are of."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.kinds = {kind: measure for kind, measure in PROBLEMS.items() if self.values(kind)}

    def values(self, kind: str, optimizer: str | None = None, length: float = 1.0, **wanted: Any) -> list[float]:
        """Return the results, seed by seed, of the runs of a problem whose cells are as `wanted`.

        A run that diverged has the worst that there is. "automatic" is whether rules were at work; there are none to
        be without delay.
        """
        worst, measure = (10.0, "accuracy") if kind.startswith("digits") else (float("inf"), "nats")
        wanted = {"learning_rate": 1.0, **wanted}
        automatic = wanted.pop("automatic", None)
        names = [name_of(kind, one, length) for one in ([optimizer] if optimizer else OPTIMIZERS)]
        return [
            float(result.get(measure, worst))
            for cell, result in self.results.items()
            if cell.problem in names
            and all(getattr(cell, key) == value for key, value in wanted.items())
            and (automatic is None or cell.stages == 1 or automatic == (cell.rules != "off"))
        ]

    def cell(self, kind: str, optimizer: str, **wanted: Any) -> str:
        """Return the mean (lowest to highest)."""
        values, digits = self.values(kind, optimizer, **wanted), 1 if kind.startswith("digits") else 3
        if not values:
            return "-"
        mean = f"{fmean(values):.{digits}f}"
        return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    def behind(self, kind: str, optimizer: str, stages: int, micro_batches: int, automatic: bool) -> float | None:
        """Return how far the mean with delay is behind that without: points of accuracy, or % of the loss.

        Only seeds that there are both runs of count; None: there is none.
        """
        base, found = [], []
        for seed in sorted({cell.seed for cell in self.results}):
            where = {"micro_batches": micro_batches, "seed": seed}
            pair = (
                self.values(kind, optimizer, stages=1, **where),
                self.values(kind, optimizer, stages=stages, automatic=automatic, **where),
            )
            if all(pair):
                base += pair[0]
                found += pair[1]
        if not base:
            return None
        if kind.startswith("digits"):
            return fmean(base) - fmean(found)
        return 100 * (fmean(found) / fmean(base) - 1)
