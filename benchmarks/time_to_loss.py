"""The training that a recipe needs down to a target loss: DDG against DeepSpeed's 1F1B, in seconds and in calls.

    python benchmarks/time_to_loss.py                                  # about 20 minutes on two idle cores
    python benchmarks/time_to_loss.py --recipe resnet --micro-batches 1 --seeds 0
    python benchmarks/time_to_loss.py --stages 4
    python benchmarks/time_to_loss.py --from docs/benchmarks/time_to_loss.json     # only write the page again

The recipes run as a user would start them, at their own M and at M = 1, where 1F1B loses most and a delayed gradient
is oldest; the batch stays the same. The schedules take turns. What is made of it, and by which rule targets are
chosen, says the page: `reached.py`.

A run in `--output-dir` that was made by the same command is not repeated. Writes ``OUT/time_to_loss.json`` and a
picture there, and the page ``time_to_loss.md`` beside OUT; prints the page.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder

from benchmarks import launch, reached
from benchmarks.report import machine
from ds_ddg.schedules.ddg import DDGPlan


@dataclass(frozen=True)
class Recipe:
    """A recipe to run, how long and how often."""

    script: str
    config: str
    epochs: int
    seeds: tuple[int, ...]
    held_out: str
    """The metric on held-out data that is shown."""


# As short as the loss allows, at which both schedules are still on their way down.
RECIPES = {
    "resnet": Recipe(
        "recipes/resnet/train.py", "configs/resnet20_digits.json", epochs=5, seeds=(0, 1, 2), held_out="test_accuracy"
    ),
    "bert": Recipe(
        "recipes/bert/pretrain.py", "configs/bert_pretrain.json", epochs=1, seeds=(0, 1), held_out="perplexity"
    ),
}


@dataclass(frozen=True)
class Training:
    """One run of a recipe; `micro_batches` and `epochs` of 0 are the recipe's own."""

    recipe: str
    stages: int
    micro_batches: int
    seed: int
    schedule: str
    epochs: int = 0

    def record(self, directory: Path) -> reached.Run:
        """Return the record of this run, made now or before; SystemExit with the log's end if it fails."""
        recipe = RECIPES[self.recipe]
        config = with_micro_batches(json.loads((launch.ROOT / recipe.config).read_text()), self.micro_batches)
        m = config["gradient_accumulation_steps"]
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{Path(recipe.config).stem}_{m}.json"
        path.write_text(json.dumps(config, indent=2) + "\n")
        output = directory / f"{self.recipe}_{self.stages}_stages_{m}_{self.schedule}_seed_{self.seed}"
        command = [recipe.script, "--deepspeed_config", str(path), "--schedule", self.schedule]
        command += ["--seed", str(self.seed), "--epochs", str(self.epochs or recipe.epochs)]
        metrics = launch.metrics(command, self.stages, output)
        with (output / "losses.csv").open(newline="", encoding="ascii") as file:
            losses = list(csv.DictReader(file))
        return {
            "recipe": self.recipe,
            "stages": self.stages,
            "micro_batches": m,
            "seed": self.seed,
            "schedule": self.schedule,
            # Of the last few before the drain nobody learns the loss.
            "total_calls": len(losses) + (DDGPlan(self.stages, m).staleness(0) if self.schedule == "ddg" else 0),
            "total_seconds": metrics["seconds"],
            "held_out": [recipe.held_out, metrics[recipe.held_out]],
            "losses": [round(float(row["loss"]), 5) for row in losses],
            "seconds": [round(float(row["seconds"]), 3) for row in losses],
        }


def with_micro_batches(config: dict[str, Any], micro_batches: int) -> dict[str, Any]:
    """Return the config at another M and the same batch (0: as it is); SystemExit if the batch has no such split."""
    if not micro_batches:
        return config
    batch = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    if batch % micro_batches:
        raise SystemExit(f"--micro-batches {micro_batches}: a batch of {batch} samples cannot be split into so many")
    return {
        **config,
        "train_micro_batch_size_per_gpu": batch // micro_batches,
        "gradient_accumulation_steps": micro_batches,
    }


def trainings(options: argparse.Namespace) -> Iterator[Training]:
    """Yield the trainings in order: the two that are compared one behind the other, each as often first."""
    for name, stages, m in product(options.recipe, options.stages, options.micro_batches):
        for turn, seed in enumerate(RECIPES[name].seeds if options.seeds is None else options.seeds):
            for schedule in reached.SCHEDULES if turn % 2 == 0 else reversed(reached.SCHEDULES):
                yield Training(name, stages, m, seed, schedule, options.epochs)


def run(planned: Iterable[Training], directory: Path) -> dict[str, Any]:
    """Make the runs that are missing, and return the results."""
    records = []
    with tqdm(list(planned), unit=" runs") as bar:
        for training in bar:
            bar.set_description(f"{training.recipe}, {training.schedule}, seed {training.seed}")
            records.append(training.record(directory))
    command = shlex.join(["python", "benchmarks/time_to_loss.py", *sys.argv[1:]])
    return {"benchmark": "time_to_loss", "about": {"command": command, **machine()}, "runs": records}


def write(results: dict[str, Any], folder: Path) -> str:
    """Write the results, the picture and the page; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "time_to_loss.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    picture = folder / "time_to_loss.png"
    reached.save_picture(results["runs"], picture)
    page = folder.with_name("time_to_loss.md")
    text = reached.page(results, str(picture.relative_to(page.parent)))
    page.write_text(text, encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--stages", nargs="+", type=int, default=[2])
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[0, 1], help="0: the recipe's own")
    parser.add_argument("--seeds", nargs="+", type=int, help="(default: 0 1 2 for resnet, 0 1 for bert)")
    parser.add_argument("--epochs", type=int, default=0, help="(default: 5 for resnet, 1 for bert)")
    parser.add_argument("--output-dir", type=Path, default=launch.ROOT / "runs" / "time_to_loss")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder; the page lies beside it")
    parser.add_argument("--from", dest="source", type=Path, help="results to write the page from, without any run")
    options = parser.parse_args()
    if options.source:
        results = json.loads(options.source.read_text(encoding="utf-8"))
    else:
        results = run(trainings(options), options.output_dir.resolve())
    print(write(results, options.out))


if __name__ == "__main__":
    main()
