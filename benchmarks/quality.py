"""What delay costs in quality: K x M x optimizers x rules over seeds, in one process as ``ds-ddg study`` trains.

    python benchmarks/quality.py                   # all runs, about an hour and a half on one core; resumable
    python benchmarks/quality.py --page-only       # write the page from the runs that are there

Runs go to docs/benchmarks/quality.jsonl, and docs/quality.md and a picture are written from them. The problems are
those of ``quality_problems.py``. "auto" for SGD clips to a norm of 1, which its rule asks for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from ds_ddg.study.grid import Cell, cells, read, run
from ds_ddg.study.problem import Problem

ROOT = Path(__file__).resolve().parents[1]
STAGES, MICRO_BATCHES, SEEDS = (1, 2, 4, 8), (1, 2, 4, 8), (0, 1, 2)
PROBLEMS = {"digits_gn": "accuracy", "digits_bn": "accuracy", "bytes": "nats"}
OPTIMIZERS = ("sgd", "adamw", "muon")
TITLES = {
    "digits_gn": "Digits, GroupNorm: accuracy in %, higher is better",
    "digits_bn": "Digits, BatchNorm: accuracy in %, higher is better",
    "bytes": "Bytes of Python's manual: nats per byte on pages held out, lower is better",
}
CLIPPED = '{"rules": "auto", "clip": 1.0}'


def problem(name: str, seed: int) -> Problem:
    """Return the problem of a name in ``quality_problems.py``."""
    from benchmarks import quality_problems

    return getattr(quality_problems, name)(seed)


def grid() -> list[Cell]:
    """Return all runs, seed by seed."""
    found: list[Cell] = []
    for seed, kind, optimizer in product(SEEDS, PROBLEMS, OPTIMIZERS):
        rules = ["off", CLIPPED if optimizer == "sgd" else "auto"]
        found += cells([f"{kind}_{optimizer}"], STAGES, MICRO_BATCHES, rules, [1.0], [seed])
    return found


def page(results: Mapping[Cell, Mapping[str, Any]]) -> str:
    """Return the page, of the runs that are there."""
    seeds = sorted({cell.seed for cell in results})
    lines = [
        "# Quality under delay",
        "",
        f"Written by `python benchmarks/quality.py` from {len(results)} of {len(grid())} runs, of {len(seeds)} "
        "seed(s). Every run is a training in one process whose gradients come as late as on K stages of a DDG "
        "pipeline (`ds_ddg.delayed`, which equals the engine to the last bit in fp32). Small problems, short "
        "runs: 370 updates on digits, 800 on bytes; learning rates were chosen for synchronous training and "
        "are the same everywhere. One test image is .17 points. `off` is the paper's algorithm, `auto` the "
        "[rules by stage](staleness.md). Cells: mean (lowest to highest), or the only one; `-`: not run.",
        "",
        "![quality over K](benchmarks/quality.png)",
        "",
    ]
    for kind, measure in _there(results).items():
        lines += [
            f"## {TITLES[kind]}",
            "",
            "| optimizer | rules | M | " + " | ".join(f"K = {k}" for k in STAGES) + " |",
        ]
        lines.append("|" + "---|" * (3 + len(STAGES)))
        for optimizer, automatic, m in product(OPTIMIZERS, (False, True), MICRO_BATCHES):
            row = [_cell(results, kind, optimizer, automatic, k, m, measure) for k in STAGES]
            if any(value != "-" for value in row[1:]):
                lines.append(f"| {optimizer} | {'auto' if automatic else 'off'} | {m} | " + " | ".join(row) + " |")
        lines.append("")
    lines += _verdicts(results)
    return "\n".join(lines) + "\n"


def _there(results: Mapping[Cell, Mapping[str, Any]]) -> dict[str, str]:
    """Return the problems that there are runs of, and what is measured of each."""
    names = {cell.problem.rpartition("_")[0] for cell in results}
    return {kind: measure for kind, measure in PROBLEMS.items() if kind in names}


def _values(
    results: Mapping[Cell, Mapping[str, Any]], name: str, automatic: bool, k: int, m: int, measure: str
) -> list[float]:
    """Return the results of the seeds; a run that diverged has the worst that there is."""
    worst = 10.0 if measure == "accuracy" else float("inf")
    found = []
    for cell, result in results.items():
        rules = cell.rules != "off" if k > 1 else automatic
        if (cell.problem, cell.stages, cell.micro_batches, rules) == (name, k, m, automatic):
            found.append(float(result.get(measure, worst)))
    return found


def _cell(
    results: Mapping[Cell, Mapping[str, Any]], kind: str, optimizer: str, automatic: bool, k: int, m: int, measure: str
) -> str:
    values = _values(results, f"{kind}_{optimizer}", automatic, k, m, measure)
    if not values:
        return "-"
    digits = 1 if measure == "accuracy" else 3
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _verdicts(results: Mapping[Cell, Mapping[str, Any]]) -> list[str]:
    """Return a table of the differences from synchronous training, where M >= K - 1 and where M = 1."""
    lines = [
        "## Beside synchronous training",
        "",
        "The mean with delay minus the mean without at the same M and optimizer: points of accuracy for "
        "digits, and for bytes % of the loss. The targets are -0.5 points and +2% where M >= K - 1, and -1 "
        "point and +2% at K = 2 and M = 1, with `auto`.",
        "",
        "| problem | optimizer | K | M | off | auto | target | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (kind, measure), optimizer, k, m in product(PROBLEMS.items(), OPTIMIZERS, STAGES[1:], MICRO_BATCHES):
        if not (m >= k - 1 or m == 1):
            continue
        name = f"{kind}_{optimizer}"
        synchronous = _values(results, name, False, 1, m, measure)
        cells_ = [_values(results, name, automatic, k, m, measure) for automatic in (False, True)]
        if not synchronous or not all(cells_):
            continue
        base = fmean(synchronous)
        accuracy = measure == "accuracy"
        off, auto = ((fmean(c) - base) if accuracy else 100 * (fmean(c) / base - 1) for c in cells_)
        target = (-1.0 if k == 2 and m == 1 else -0.5 if m >= k - 1 else None) if accuracy else 2.0
        if not accuracy and not (m >= k - 1 or k == 2):
            target = None
        met = "" if target is None else "within" if (auto >= target if accuracy else auto <= target) else "missed"
        unit = " points" if accuracy else "%"
        lines.append(
            f"| {kind} | {optimizer} | {k} | {m} | {off:+.1f}{unit} | {auto:+.1f}{unit} | "
            f"{'-' if target is None else f'{target:+g}{unit}'} | {met} |"
        )
    return lines


def picture(results: Mapping[Cell, Mapping[str, Any]], path: Path) -> None:
    """Draw a panel for each problem and M: the measure over K, a line for each optimizer and rule."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    there = _there(results)
    figure = Figure(figsize=(3 * len(MICRO_BATCHES) + 1, 2.5 * len(there) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(there), len(MICRO_BATCHES), sharex=True, sharey="row", squeeze=False)
    colours = dict(zip(OPTIMIZERS, ("#14507a", "#d17a00", "#6b8f3c"), strict=True))
    for (i, (kind, measure)), (j, m) in product(enumerate(there.items()), enumerate(MICRO_BATCHES)):
        ax = panels[i, j]
        for optimizer, automatic in product(OPTIMIZERS, (False, True)):
            name = f"{kind}_{optimizer}"
            found = [(k, _values(results, name, automatic and k > 1, k, m, measure)) for k in STAGES]
            points = [(k, fmean(values)) for k, values in found if values]
            style = {
                "linestyle": "-" if automatic else ":",
                "color": colours[optimizer],
                "marker": "o",
                "markersize": 3,
            }
            label = f"{optimizer}, {'auto' if automatic else 'off'}"
            ax.plot([k for k, _ in points], [value for _, value in points], label=label, **style)
        ax.set_title(f"{kind}, M = {m}", fontsize=9, loc="left")
        ax.set_xscale("log", base=2)
        ax.set_xticks(STAGES, [str(k) for k in STAGES])
        ax.grid(alpha=0.3)
        if j == 0:
            ax.set_ylabel(measure)
        if i == len(there) - 1:
            ax.set_xlabel("stages, K")
    panels[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs that are missing, then the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-only", action="store_true", help="make no runs")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each on one thread")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/benchmarks/quality.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/quality.md")
    options = parser.parse_args(arguments)
    if not options.page_only:
        done = read(options.results)
        left = [cell for cell in grid() if cell not in done]
        for _ in tqdm(
            run(problem, left, options.results, options.jobs), total=len(left), disable=not sys.stderr.isatty()
        ):
            pass
    results = read(options.results)
    options.page.write_text(page(results), encoding="utf-8")
    picture(results, options.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
