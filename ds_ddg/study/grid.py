"""A grid of runs: what delay does to a training, over K, M, rules, learning rates and seeds.

Each result is a line of JSON in a file, written when its run ends; runs that are there already are not made again, so
an interrupted study goes on where it was.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ds_ddg.study.problem import Problem
from ds_ddg.study.training import train

__all__ = ["Cell", "cells", "read", "run"]


class Cell(NamedTuple):
    """The settings of one run."""

    problem: str
    stages: int
    micro_batches: int
    rules: str
    """As ``"ddg": {"staleness": ...}``: "off", "auto" or a block as JSON."""
    learning_rate: float
    """A factor of the problem's own."""
    seed: int


def cells(
    problems: Sequence[str],
    stages: Sequence[int],
    micro_batches: Sequence[int],
    rules: Sequence[str],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
) -> list[Cell]:
    """Return every combination, seed by seed; without delay (K = 1) there is one run for all rules.

    Raises:
        ValueError: a number is out of range.
    """
    for name, values, least in (("stages", stages, 1), ("micro-batches", micro_batches, 1), ("seeds", seeds, 0)):
        if wrong := [value for value in values if value < least]:
            raise ValueError(f"{name} must be {least} or more, got {wrong[0]}")
    if wrong_rates := [value for value in learning_rates if not value > 0]:
        raise ValueError(f"a factor of the learning rate must be above 0, got {wrong_rates[0]:g}")
    every = product(seeds, problems, stages, micro_batches, rules, learning_rates)
    found = (Cell(problem, k, m, "off" if k == 1 else rule, rate, seed) for seed, problem, k, m, rule, rate in every)
    return list(dict.fromkeys(found))


def read(path: Path) -> dict[Cell, dict[str, Any]]:
    """Return the results in a file, none if it does not exist.

    Raises:
        ValueError: a line of the file is not such a result.
    """
    if not path.exists():
        return {}
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            found[Cell(**{name: record.pop(name) for name in Cell._fields})] = record
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}, is no result of a study ({error!r}); name another file"
            ) from error
    return found


def run(
    problem: Callable[[str, int], Problem], todo: Iterable[Cell], path: Path, jobs: int = 1
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Make the runs that `path` does not have, and yield each with its result once it is written there.

    Args:
        problem: makes the problem of a name from a seed; with several jobs it must be picklable.
        todo: the runs.
        path: the file of results, ``.jsonl``.
        jobs: the number of processes; each uses one thread.
    """
    done = read(path)
    left = [cell for cell in todo if cell not in done]
    with open(path, "a", encoding="utf-8") as file:
        for cell, result in _results(problem, left, jobs):
            file.write(json.dumps({**cell._asdict(), **result}) + "\n")
            file.flush()
            yield cell, result


def _results(
    problem: Callable[[str, int], Problem], todo: Sequence[Cell], jobs: int
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    if jobs == 1:
        yield from ((cell, _run(problem, cell)) for cell in todo)
        return
    # Not forked: torch's threads do not survive that.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(_run, problem, cell): cell for cell in todo}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _run(problem: Callable[[str, int], Problem], cell: Cell) -> dict[str, Any]:
    """Run one cell in this process, on one thread, so that results do not depend on the number of jobs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(cell.seed)
        rules = json.loads(cell.rules) if cell.rules.startswith("{") else cell.rules
        return train(problem(cell.problem, cell.seed), cell.stages, cell.micro_batches, rules, cell.learning_rate)
    finally:
        torch.set_num_threads(threads)
