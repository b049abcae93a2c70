"""``ds-ddg simulate``: schedules compared under a cost model, over lists of settings, and the one to take."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import inf
from typing import Any

from ds_ddg.analysis.balance import LayerCost, load
from ds_ddg.analysis.format import size, table
from ds_ddg.analysis.recommend import Setup, candidates, setups, title
from ds_ddg.analysis.stage_costs import Model
from ds_ddg.analysis.sweep_plot import save_curves
from ds_ddg.analysis.timeline_plot import save
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.schedules.interleaved import InterleavedPlan
from ds_ddg.schedules.simulator import Cost, replay
from ds_ddg.schedules.synchronous import DualPipeVPlan

from .advice import advise
from .options import add_output, check_output, list_of, num_bytes, progress
from .plan import shown

__all__ = ["HELP", "add_arguments"]

HELP = "compare schedules under a cost model, over lists of settings"

_COSTS: dict[str, tuple[Any, Any, str]] = {
    "forward": (float, 1.0, "time of a stage's forward (default 1)"),
    "backward": (float, 2.0, "... of its backward (default 2)"),
    "update": (float, 0.0, "... of its optimizer step (default 0)"),
    "weight_share": (float, 0.5, "share of a backward that the gradients of the weights take (default 0.5)"),
    "overhead": (float, 0.0, "... of every forward and backward on top, of a whole stage or a part (default 0)"),
    "bytes": (num_bytes, 0.0, "size of an activation between stages, such as 25M (default 0)"),
    "scale": (list_of(float), (), "relative time of each stage, X,Y,.. (default equal)"),
    "weight_bytes": (list_of(num_bytes), (), "size of a stage's weights, such as 1.5G; one number, or one a stage"),
    "activation_bytes": (list_of(num_bytes), (), "what a micro-batch keeps on a stage until its backward; likewise"),
}
"""Options whose values a profile gives as well."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ds-ddg simulate`` to `parser`."""
    parser.set_defaults(run=_run)
    lists = "; a list such as 1,4,16 gives a row each"
    parser.add_argument("--stages", type=list_of(int), required=True, metavar="K", help="pipeline stages" + lists)
    for name, number, default, letter, text in (
        ("--micro-batches", int, "1", "M", "micro-batches per call"),
        ("--slack", int, "0,1", "S", "slack of ddg"),
        ("--link", float, "0", "T", "latency of a hop"),
    ):
        about = f"{text} (default {default}){lists}"
        parser.add_argument(name, type=list_of(number), default=default, metavar=letter, help=about)
    parser.add_argument(
        "--bandwidth",
        type=num_bytes,
        default=inf,
        metavar="X",
        help="bytes per unit of time over a hop, such as 10G (default: any)",
    )
    for name, (read, _, text) in _COSTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=read, metavar="X", help=text)
    parser.add_argument("--chunks", type=int, default=2, metavar="V", help="parts a stage of interleaved (default 2)")
    parser.add_argument(
        "--profile",
        metavar="FILE.json",
        help="take these costs from layers as ds-ddg partition --out has measured them; all times are then in ms",
    )
    parser.add_argument(
        "--memory-limit",
        type=num_bytes,
        metavar="X",
        help="bytes of a device for weights, gradients and activations, such as 20G, without optimizer states: "
        "also say which M, slack, weights and activations to take",
    )
    add_output(parser)


def _run(options: argparse.Namespace) -> str:
    if options.memory_limit is not None and not options.memory_limit > 0:
        raise ValueError(f"--memory-limit must be above 0, got {options.memory_limit:g}")
    check_output(options.out)
    layers = _profile(options)
    _check_memory(options)
    if options.bandwidth < inf and layers is None and not options.bytes:
        raise ValueError(
            f"--bandwidth {options.bandwidth:g} has no effect on empty messages; add --bytes or --profile"
        )
    stages, micro_batches, slacks, links = (
        list(dict.fromkeys(values)) for values in (options.stages, options.micro_batches, options.slack, options.link)
    )
    cells = []
    for num_stages, m, link in product(stages, micro_batches, links):
        cells.append(setups(num_stages, m, slacks, _model(options, layers, num_stages, link), options.chunks))
    _replay(cells, options)
    rows = [row for cell in cells for row in [*(setup.record() for setup in cell), _one_device(cell[-1])]]
    if options.out:
        _save(cells, rows, options)
    advice = [] if options.memory_limit is None else advise(cells, options.memory_limit)
    if options.json:
        chosen = {"recommended": [a.record(a.best) for a in advice], "rivals": [a.record(a.rival) for a in advice]}
        return json.dumps({"setups": rows, **(chosen if advice else {})})
    return "\n".join([table([_cells(row) for row in rows]), "", *_notes(cells, options), *map(str, advice)])


def _profile(options: argparse.Namespace) -> list[LayerCost] | None:
    given = [f"--{name.replace('_', '-')}" for name in _COSTS if getattr(options, name) is not None]
    if options.profile is None:
        return None
    # Neither the time of an update nor that of the parts of a backward is in a profile.
    if both := [name for name in given if name not in ("--update", "--weight-share")]:
        raise ValueError(f"{', '.join(both)} and --profile {options.profile} both say what a stage costs; use one")
    return load(options.profile)


def _check_memory(options: argparse.Namespace) -> None:
    names = ("weight_bytes", "activation_bytes")
    missing = [f"--{name.replace('_', '-')}" for name in names if not getattr(options, name)]
    if options.memory_limit is not None and options.profile is None and missing:
        raise ValueError(f"--memory-limit needs to know what a stage keeps: add {' and '.join(missing)}, or --profile")


def _replay(cells: Sequence[Sequence[Setup]], options: argparse.Namespace) -> None:
    """Find out all that takes time, with a bar; whoever asks a setup for it again has it at once."""
    found = [setup for cell in cells for setup in cell]
    if options.memory_limit is not None:
        found = [choice for setup in found for choice in candidates(setup)]
    for setup in progress(found, "replaying"):
        _ = setup.time_per_call


def _model(options: argparse.Namespace, layers: list[LayerCost] | None, num_stages: int, link: float) -> Model:
    given = {name: getattr(options, name) for name in _COSTS}
    value = {name: _COSTS[name][1] if got is None else got for name, got in given.items()}
    if layers is not None:
        model = Model.of_layers(layers, num_stages, value["update"], link, options.bandwidth)
        return replace(model, cost=replace(model.cost, weight_share=value["weight_share"]))
    cost = Cost(value["forward"], value["backward"], value["update"], link, value["bytes"], options.bandwidth,
                value["scale"], value["overhead"], value["weight_share"])  # fmt: skip
    weights, activations = (_each(name, value[name], num_stages) for name in ("weight_bytes", "activation_bytes"))
    return Model(cost, weights, activations)


def _each(name: str, values: Sequence[float], num_stages: int) -> Sequence[float]:
    """Return one number for each stage, of which the user may have given only one."""
    if len(values) not in (0, 1, num_stages):
        raise ValueError(
            f"--{name.replace('_', '-')} must be one number, or one for each of {num_stages} stages, got {len(values)}"
        )
    return tuple(values) * num_stages if len(values) == 1 else tuple(values)


def _one_device(setup: Setup) -> dict[str, Any]:
    """Return a row for the same work on one device."""
    row = setup.record()
    row |= {"schedule": "one device", "in_deepspeed": True, "slack": None, "time_per_call": round(setup.one_device, 6)}
    row |= {"speedup": 1.0, "efficiency": 1.0, "staleness": 0, "versions": 1, "activations": 1.0}
    if "memory" in row:
        whole = Model(Cost(), [sum(setup.model.weight_bytes)], [sum(setup.model.activation_bytes)])
        row["memory"] = Setup(DDGPlan(1, setup.plan.micro_batches), whole).record()["memory"]
    return row


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    """Return the cells of `row` for people; a star marks what DeepSpeed has not."""
    cells = {**row, "schedule": row["schedule"] + "*" * (not row["in_deepspeed"])}
    del cells["in_deepspeed"]
    return {**cells, "memory": size(max(row["memory"]))} if "memory" in row else cells


def _notes(cells: Sequence[Sequence[Setup]], options: argparse.Namespace) -> list[str]:
    notes = [
        f"times in {'ms' if options.profile else _unit(options)}",
        "speedup: over one device; efficiency: share of the devices' time spent on work; activations: on stage 0",
    ]
    if cells[0][0].memory is not None:
        notes.append(
            "memory: weights, gradients and activations of the fullest stage, no optimizer states; *: at most"
        )
    plans = [setup.plan for cell in cells for setup in cell]
    if any(plan.staleness(0) > 1 for plan in plans):
        notes.append("staleness: in updates; ddg's is at most 1 from M = (K - 1)(1 + slack) on, at the same speed")
    sizes = sorted({(plan.num_stages, plan.micro_batches) for plan in plans})
    if skipped := sorted({k for k, m in sizes if DualPipeVPlan.refusal(k, m)}):
        notes.append(f"dualpipev needs M >= 2K, so it is not everywhere (K = {', '.join(map(str, skipped))})")
    if uneven := [f"K = {k} with M = {m}" for k, m in sizes if InterleavedPlan.refusal(k, m)]:
        notes.append(f"interleaved and zb-h1 need M in rounds of equal length, of K or more: not {', '.join(uneven)}")
    for name, where in {plan.name: plan.elsewhere for plan in plans if plan.elsewhere}.items():
        notes.append(f"* not in DeepSpeed: {name} runs in {where}")
    return notes


def _unit(options: argparse.Namespace) -> str:
    """Say what the unit of time is, in terms of the first cost that takes any time."""
    times = {name: _COSTS[name][1] if (got := getattr(options, name)) is None else got for name in _COSTS}
    name = "forward" if times["forward"] else "backward"
    return f"units of which the {name} of a stage takes {times[name]:g}"


def _save(cells: Sequence[Sequence[Setup]], rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write curves over the longest list, or the timelines themselves for a single setting or a trace."""
    if len(cells) > 1 and not options.out.lower().endswith(".json"):
        save_curves(rows, options.out)
        return
    pictures = {}
    for cell in cells:
        calls = max(shown(setup.plan) for setup in cell)
        for setup in cell:
            name = f"{title(setup.plan)}, link {setup.model.cost.link:g}"
            pictures[name] = replay(setup.plan, calls, setup.model.cost, drain=True)
    save(pictures, options.out)
