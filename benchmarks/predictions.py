"""Predictions of ``ds-ddg simulate`` for each row of `off_cpu.py`, from measurements of the parts.

The parts are a stage alone, which tells what a pass takes besides its sleep and what comes once a call, and a message
between two idle stages. What a pass takes besides is Python, so it is the same however little of the model it runs.
"""

from __future__ import annotations

from itertools import groupby
from statistics import median
from typing import Any

from ds_ddg.analysis.recommend import Setup
from ds_ddg.analysis.stage_costs import Model
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.schedules.plan import Plan
from ds_ddg.schedules.simulator import Cost
from ds_ddg.schedules.synchronous import DualPipeVPlan, OneFOneBPlan

_SYNCHRONOUS = {"1f1b": OneFOneBPlan, "dualpipev": DualPipeVPlan}


def predict(results: dict[str, Any]) -> None:
    """Set ``predicted_seconds`` per call and the ``efficiency`` that this means, in every row."""
    about, alone = results["about"], results["alone"]
    forward, backward = about["forward_ms"] / 1e3, about["backward_ms"] / 1e3
    tick = forward + backward
    overhead = max(0.0, alone["tick"] - tick) / 2
    for num_stages, group in groupby(results["rows"], key=lambda row: row["stages"]):
        rows: list[dict[str, Any]] = list(group)
        # Each setting has one row of DDG, whose links have the latency that was added.
        hop = max(0.0, median(row["hop_ms"] / 1e3 - row["link"] * tick for row in rows if row["schedule"] == "ddg"))
        for row in rows:
            scale = uneven(num_stages) if row["uneven"] else ()
            link = hop + row["link"] * tick
            cost = Cost(forward, backward, alone["update"], link, scale=scale, overhead=overhead)
            row["predicted_seconds"] = Setup(_plan(row), Model(cost)).time_per_call
            work = tick * (sum(scale) / num_stages if scale else 1) * row["micro_batches"]
            row["efficiency"] = work / row["predicted_seconds"]


def uneven(num_stages: int) -> tuple[float, ...]:
    """Return relative times of stages of which one in the middle takes half as long again as the others."""
    return tuple(1.0 + 0.5 * (stage == num_stages // 2) for stage in range(num_stages))


def _plan(row: dict[str, Any]) -> Plan:
    if row["schedule"] == "ddg":
        return DDGPlan(row["stages"], row["micro_batches"], row["chosen"])
    return _SYNCHRONOUS[row["schedule"]](row["stages"], row["micro_batches"])
