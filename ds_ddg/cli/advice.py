"""What ``ds-ddg simulate`` advises: the set-up to take with DeepSpeed, and a schedule elsewhere that beats it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ds_ddg.analysis.format import size
from ds_ddg.analysis.recommend import Setup, candidates, recommend, rival

__all__ = ["Advice", "advise"]


@dataclass(frozen=True)
class Advice:
    """The advice for one number of stages and one latency; it prints as a line, and another for a rival."""

    where: str
    """What it is for: stages, latency and memory limit."""
    best: Setup | None
    """What to take with DeepSpeed; None if nothing fits."""
    least: Setup
    """What needs the least memory with DeepSpeed."""
    rival: Setup | None
    """A schedule that DeepSpeed has not and that beats `best`; None if none does."""

    def __str__(self) -> str:
        if self.best is None:
            line = f"{self.where}: nothing fits; the least is {size(max(self.least.memory or []))} ({self.least})"
        else:
            line = f"{self.where}: take {self.best}: {_took(self.best)}"
        if self.rival is None:
            return line
        other = f"{self.rival}: {_took(self.rival)}; runs in {self.rival.plan.elsewhere}"
        return f"{line}\n  a rival that is never stale, not in DeepSpeed: {other}"

    @staticmethod
    def record(setup: Setup | None) -> dict[str, Any] | None:
        """Return `setup` as plain data, with the two settings of DDG where they matter."""
        if setup is None:
            return None
        ddg = {"weights": setup.weights, "activations_setting": setup.activations}
        return {**setup.record(), **(ddg if setup.plan.name == "ddg" else {})}


def advise(cells: Sequence[Sequence[Setup]], limit: float) -> list[Advice]:
    """Return advice for each number of stages and latency in `cells`, for at most `limit` bytes on a stage."""
    groups: dict[tuple[int, float], list[Setup]] = {}
    for cell in cells:
        key = cell[0].plan.num_stages, cell[0].model.cost.link
        groups.setdefault(key, []).extend(choice for setup in cell for choice in candidates(setup))
    advice = []
    for (num_stages, link), choices in groups.items():
        where = f"K = {num_stages}, link {link:g}, at most {size(limit)} a stage"
        best = recommend(choices, limit)
        ours = [choice for choice in choices if not choice.plan.elsewhere]
        least = min(ours, key=lambda choice: max(choice.memory or []))
        advice.append(Advice(where, best, least, rival(choices, best, limit)))
    return advice


def _took(setup: Setup) -> str:
    return f"{size(max(setup.memory or []))}, {setup.time_per_micro_batch:g} per micro-batch"
