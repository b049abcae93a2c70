"""Does a recipe learn as well under DDG as under DeepSpeed's 1F1B? The same runs with both, over several seeds.

    python benchmarks/recipes.py               # resnet and bert, 24 runs: one to two hours on two cores
    python benchmarks/recipes.py --recipe resnet --stages 2 4 --seeds 0 1 2
    python benchmarks/recipes.py --recipe resnet --stages 2 --seeds 0 -- --epochs 1     # more arguments for the recipe

Each run is what a user would start with the ``deepspeed`` launcher. One whose metrics.json is in `--output-dir`, made
by the same command, is not repeated, so an interrupted benchmark goes on where it was. Prints a markdown table, then
one JSON line, and writes both beside the runs; `--docs FILE` also puts the table between markers in that file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from benchmarks import launch

SCHEDULES = ("1f1b", "ddg")
START, END = "<!-- measured: python benchmarks/recipes.py -->", "<!-- end of measured -->"


@dataclass(frozen=True)
class Recipe:
    """A recipe to run, and the metric of it that is compared."""

    command: tuple[str, ...]
    metric: str
    relative: bool
    """Whether a difference is a share of 1F1B's value (%), or a difference of shares (points)."""
    limit: float
    """The difference that is still as good, in that unit; negative where more is better."""

    def difference(self, ddg: float, one_f_one_b: float) -> float:
        """Return the difference in % or points."""
        return 100 * (ddg - one_f_one_b) / (one_f_one_b if self.relative else 1)

    def as_good(self, difference: float) -> bool:
        """Return whether the difference is within the limit."""
        difference = round(difference, 9)
        return difference >= self.limit if self.limit < 0 else difference <= self.limit


RECIPES = {
    "resnet": Recipe(
        ("recipes/resnet/train.py", "--deepspeed_config", "configs/resnet20_digits.json"),
        metric="test_accuracy",
        relative=False,
        limit=-0.5,
    ),
    "bert": Recipe(
        ("recipes/bert/pretrain.py", "--deepspeed_config", "configs/bert_pretrain.json"),
        metric="perplexity",
        relative=True,
        limit=3.0,
    ),
}


@dataclass(frozen=True)
class Run:
    """One training run."""

    recipe: str
    stages: int
    seed: int
    schedule: str
    extra: tuple[str, ...]

    def metrics(self, directory: Path) -> dict[str, Any]:
        """Return the metrics of an earlier run of the same command, or of a new one; SystemExit if it fails."""
        output = directory / self.recipe / f"{self.stages}_stages_{self.schedule}_seed_{self.seed}"
        command = [*RECIPES[self.recipe].command, "--schedule", self.schedule, "--seed", str(self.seed), *self.extra]
        return launch.metrics(command, self.stages, output)


def row(name: str, stages: int, runs: dict[Run, dict[str, Any]]) -> dict[str, Any]:
    """Return a line of the table: both schedules over all seeds, and their differences, seed by seed."""
    recipe = RECIPES[name]
    values, rates = {}, {}
    for schedule in SCHEDULES:
        chosen = sorted(
            (run for run in runs if (run.recipe, run.stages, run.schedule) == (name, stages, schedule)),
            key=lambda run: run.seed,
        )
        values[schedule] = [runs[run][recipe.metric] for run in chosen]
        rates[schedule] = mean(runs[run]["samples_per_second"] for run in chosen)
    differences = [recipe.difference(*pair) for pair in zip(values["ddg"], values["1f1b"], strict=True)]
    return {
        "recipe": name,
        "stages": stages,
        "metric": recipe.metric,
        "1f1b": values["1f1b"],
        "ddg": values["ddg"],
        "differences": differences,
        "unit": "%" if recipe.relative else "points",
        "limit": recipe.limit,
        "as_good": recipe.as_good(mean(differences)),
        "samples_per_second": rates,
    }


def markdown(rows: Iterable[dict[str, Any]]) -> str:
    """Return the table: mean (lowest to highest) over the seeds; the difference is DDG minus 1F1B at a seed."""
    lines = [
        "| recipe | stages | seeds | metric | 1F1B | DDG | difference | limit | samples/s, 1F1B and DDG |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["recipe"],
            str(row["stages"]),
            str(len(row["ddg"])),
            row["metric"].replace("_", " "),
            _spread(row["1f1b"], ".4g"),
            _spread(row["ddg"], ".4g"),
            f"{_spread(row['differences'], '+.2f')} {row['unit']}",
            f"{row['limit']:+g}: {'within' if row['as_good'] else '**missed**'}",
            ", ".join(f"{row['samples_per_second'][schedule]:.0f}" for schedule in SCHEDULES),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float], format_: str) -> str:
    return f"{mean(values):{format_}} ({min(values):{format_}} to {max(values):{format_}})"


def write_between_markers(document: Path, table: str) -> None:
    """Replace the text between START and END in `document`; ValueError if they are not there."""
    before, start, rest = document.read_text().partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"{document} has no place for the table: a line {START} and, after it, {END}")
    document.write_text(f"{before}{START}\n\n{table}\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output-dir", type=Path, default=launch.ROOT / "runs" / "benchmark")
    parser.add_argument(
        "--docs", type=Path, help="a file with markers, such as docs/recipes.md, to put the table into"
    )
    parser.add_argument("extra", nargs="*", help="after --: more arguments for every run")
    args = parser.parse_args()
    planned = [
        Run(name, stages, seed, schedule, tuple(args.extra))
        for name, stages, seed, schedule in product(args.recipe, args.stages, args.seeds, SCHEDULES)
    ]
    output = args.output_dir.resolve()
    runs = {}
    with tqdm(planned, unit=" runs") as bar:
        for run in bar:
            bar.set_description(f"{run.recipe}, {run.stages} stages, {run.schedule}, seed {run.seed}")
            runs[run] = run.metrics(output)
    rows = [row(name, stages, runs) for name, stages in product(args.recipe, args.stages)]
    table, line = markdown(rows), json.dumps({"benchmark": "recipes", "extra": args.extra, "rows": rows})
    (output / "table.md").write_text(f"{table}\n")
    (output / "table.json").write_text(f"{line}\n")
    if args.docs is not None:
        write_between_markers(args.docs, table)
    print(table)
    print(line)


if __name__ == "__main__":
    main()
