"""What delay costs in quality: K x M x optimizers x rules over seeds, in one process as ``ds-ddg study`` trains.

    python benchmarks/quality.py                   # all runs, about two and a half hours on one core; resumable
    python benchmarks/quality.py --page-only       # write the page from the runs that are there

Runs go to docs/benchmarks/quality.jsonl, and docs/quality.md and a picture are written from them
(``quality_page.py``). The problems are those of ``quality_problems.py``. "auto" for SGD clips to a norm of 1, which
its rule asks for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from benchmarks import quality_page
from benchmarks.quality_means import MICRO_BATCHES, OPTIMIZERS, PROBLEMS, STAGES, name_of
from ds_ddg.study.grid import Cell, cells, read, run
from ds_ddg.study.problem import Problem

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)
CLIPPED = '{"rules": "auto", "clip": 1.0}'


def problem(name: str, seed: int) -> Problem:
    """Return the problem of a name in ``quality_problems.py``; ``NAME@1.25`` trains longer by that factor."""
    from benchmarks import quality_problems

    name, _, length = name.partition("@")
    return getattr(quality_problems, name)(seed, length=float(length or 1))


def grid() -> list[Cell]:
    """Return all runs: the main table seed by seed, and then what else the page shows."""
    found = [cell for seed in SEEDS for cell in _cells(PROBLEMS, STAGES, MICRO_BATCHES, [seed])]
    found += _cells(["docs"], STAGES, [1], SEEDS)
    found += _cells(["docs"], [1, 4], [4], SEEDS[:1])
    found += _cells(PROBLEMS, [1, 4, 8], [1], SEEDS[:1], learning_rates=[0.5, 2.0])
    found += _cells(["bytes"], [1, 4, 8], [1], SEEDS[:1], ["adamw", "muon"], length=quality_page.LONG)
    found += _cells(["digits_gn", "bytes"], STAGES, [1], SEEDS[:1], ["rotation"])
    for stages, length in product((4, 8), quality_page.LENGTHS[1:]):
        longer = _cells(["bytes"], [stages], [stages], SEEDS, ["adamw", "muon"], length=length)
        found += [cell for cell in longer if cell.rules != "off"]
    return found


def _cells(
    kinds: Sequence[str],
    stages: Sequence[int],
    micro_batches: Sequence[int],
    seeds: Sequence[int],
    optimizers: Sequence[str] = OPTIMIZERS,
    learning_rates: Sequence[float] = (1.0,),
    length: float = 1.0,
) -> list[Cell]:
    found: list[Cell] = []
    for kind, optimizer in product(kinds, optimizers):
        name = name_of(kind, optimizer, length)
        rules = ["off", CLIPPED if optimizer == "sgd" else "auto"]
        found += cells([name], stages, micro_batches, rules, learning_rates, seeds)
    return found


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
    options.page.write_text(quality_page.page(results, grid()), encoding="utf-8")
    quality_page.picture(results, options.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
