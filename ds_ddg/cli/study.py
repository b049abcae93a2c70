"""``ds-ddg study``: what delay would do to a training, run in this process over lists of settings."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ds_ddg.analysis.format import table
from ds_ddg.extras import require

from .options import list_of, progress
from .user_function import failed, load_function

if TYPE_CHECKING:
    from ds_ddg.study.grid import Cell
    from ds_ddg.study.problem import Problem

__all__ = ["HELP", "add_arguments"]

HELP = "train with the delays of pipelines in one process, and compare"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ds-ddg study`` to `parser`."""
    parser.set_defaults(run=_run)
    parser.add_argument(
        "problems",
        nargs="+",
        metavar="FILE.py:FUNCTION",
        help="a function that takes a seed and returns a ds_ddg.study.problem.Problem",
    )
    lists = "; a list such as 1,4 makes runs for each"
    parser.add_argument("--stages", type=list_of(int), default="1,2,4,8", metavar="K", help="stages (1,2,4,8)" + lists)
    parser.add_argument("--micro-batches", type=list_of(int), default="1", metavar="M", help="M (default 1)" + lists)
    parser.add_argument("--rules", nargs="+", default=["off", "auto"], metavar="R", help='off, auto or a block as in '
                        '"ddg": {"staleness": ...} (default: off auto)')  # fmt: skip
    parser.add_argument(
        "--learning-rates", type=list_of(float), default="1", metavar="X", help="factors of the problem's (1)" + lists
    )
    parser.add_argument("--seeds", type=list_of(int), default="0,1,2", metavar="S", help="seeds (0,1,2)" + lists)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, each on one thread (default 1)")
    parser.add_argument("--results", required=True, metavar="FILE.jsonl", help="a line for each run; what is there is "
                        "not run again")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.add_argument("--out", metavar="FILE", help="also draw a picture (.svg, .png)")


class _UserProblems:
    """Makes problems by the functions of the user's files; picklable, for other processes."""

    def __call__(self, source: str, seed: int) -> Problem:
        """Call the function that `source` names, a file and a function, with `seed`."""
        from ds_ddg.study.problem import Problem

        path, _, name = source.rpartition(":")
        if not path.endswith(".py"):
            raise ValueError(f"{source!r} is not FILE.py:FUNCTION")
        function = load_function(path, name)
        try:
            problem = function(seed)
        except Exception as error:
            raise failed(path, error) from error
        if not isinstance(problem, Problem):
            raise ValueError(f"{source} must return a ds_ddg.study.problem.Problem, got {type(problem).__name__}")
        return problem


def _run(options: argparse.Namespace) -> str:
    _check(options)
    with redirect_stdout(sys.stderr):  # what DeepSpeed and the user's file print
        from ds_ddg.study import grid

        problems = _UserProblems()
        for source in options.problems:
            problems(source, options.seeds[0])  # a mistake in the file shows at once
        cells = grid.cells(
            options.problems,
            options.stages,
            options.micro_batches,
            options.rules,
            options.learning_rates,
            options.seeds,
        )
        path = Path(options.results)
        done = grid.read(path)
        left = [cell for cell in cells if cell not in done]
        runs = grid.run(problems, left, path, options.jobs)
        for _ in progress(left, "training"):
            next(runs)
        results = grid.read(path)
    rows = summary({cell: results[cell] for cell in cells})
    if options.out:
        from ds_ddg.analysis.quality_plot import save_quality

        save_quality(rows, options.out)
    return json.dumps({"rows": rows}) if options.json else table([_shown(row, rows) for row in rows])


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError or OSError for what would be found only after hours."""
    if options.jobs < 1:
        raise ValueError(f"--jobs must be 1 or more, got {options.jobs}")
    if not options.results.endswith(".jsonl"):
        raise ValueError(f"--results {options.results!r} must end in .jsonl")
    for name, path in (("--results", options.results), ("--out", options.out)):
        if path is not None and not Path(path).parent.is_dir():
            raise ValueError(f"{name} {path!r}: there is no folder {str(Path(path).parent)!r}; make it first")
    if options.out:
        if Path(options.out).suffix.lower() not in (".svg", ".png"):
            raise ValueError(f"--out {options.out!r} must end in .svg or .png")
        require("plot", f"--out {options.out!r}")
    from ds_ddg.config import DDGConfig

    for rules in options.rules:
        if rules.startswith("{"):
            try:
                DDGConfig.parse({"staleness": json.loads(rules)})
            except json.JSONDecodeError as error:
                raise ValueError(f"--rules {rules!r} is not JSON: {error}") from None
        else:
            DDGConfig.parse({"staleness": rules})


def summary(results: Mapping[Cell, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each setting, over its seeds.

    Returns:
        Rows with "problem", "stages", "micro_batches", "rules", "learning_rate", "seeds" (how many), "diverged" (how
        many) and, for each measure, its [mean, lowest, highest] over the seeds that did not diverge, None if all did.
    """
    by_setting: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for cell, result in results.items():
        by_setting.setdefault(cell[:-1], []).append(result)
    measures = dict.fromkeys(name for result in results.values() for name in result)
    measures = {name: None for name in measures if name not in ("seconds", "diverged")}
    rows = []
    for (problem, stages, micro_batches, rules, rate), found in by_setting.items():
        row: dict[str, Any] = {"problem": problem, "stages": stages, "micro_batches": micro_batches, "rules": rules}
        row |= {"learning_rate": rate, "seeds": len(found), "diverged": sum("diverged" in one for one in found)}
        for name in measures:
            values = [one[name] for one in found if name in one]
            row[name] = [fmean(values), min(values), max(values)] if values else None
        rows.append(row)
    return rows


def _shown(row: Mapping[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a row as people read it, without what is the same in all."""
    names = {"problem": "problem", "stages": "K", "micro_batches": "M", "rules": "rules", "learning_rate": "lr x"}
    shown: dict[str, Any] = {}
    for key, value in row.items():
        if key in ("problem", "learning_rate", "diverged") and len({other[key] for other in rows}) == 1 and (
            key != "diverged" or not value
        ):  # fmt: skip
            continue
        if isinstance(value, list):
            mean, low, high = value
            value = f"{mean:.4g}" if low == high else f"{mean:.4g} ({low:.4g} to {high:.4g})"
        shown[names.get(key, key)] = value
    return shown
