"""Runs of the language model recipes on ranks; stand-ins for the engine and the calls of a recipe."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes.progress import Progress

WORDS = ["red", "green", "blue", "dog", "cat", "bird", "runs", "sits", "sings"]


def sentence(n: int) -> str:
    """Return a document that is easy to learn."""
    return " ".join(WORDS[3 * place + (n // 3**place) % 3] for place in range(3)) + f" {n}"


def recipe(rank: int, world_size: int, name: str, arguments: str, work: Path, expect: bool = False) -> Any:
    """Run a recipe, such as "bert/pretrain", as a launcher would; if it is expected to exit, return why."""
    main = importlib.import_module(f"recipes.{name.replace('/', '.')}").main
    sys.argv = [name, "--deepspeed_config", f"{work}/ds.json", *arguments.format(work=work).split()]
    if not expect:
        return main()
    with pytest.raises(SystemExit) as error:
        main()
    return str(error.value)


def metrics(directory: Path) -> dict[str, Any]:
    """Return the last line of a run that has ended."""
    read: dict[str, Any] = json.loads((directory / "metrics.json").read_text())
    return read


class FakeMonitor:
    enabled = True

    def __init__(self) -> None:
        self.events: list[tuple[str, float, int]] = []

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        self.events += events


class FakeEngine:
    """As much of an engine as `Progress` and `Checkpoints` use."""

    num_stages = 4
    unreadable = ""

    def __init__(self) -> None:
        self.ddg = SimpleNamespace(enabled=True)
        self.monitor = FakeMonitor()
        self.global_samples = 0
        self.saved: list[Any] = []

    def gradient_accumulation_steps(self) -> int:
        return 2

    def train_batch_size(self) -> int:
        return 8

    def save_checkpoint(self, directory: str, client_state: dict[str, Any]) -> None:
        calls = client_state["progress"]["calls"]
        (Path(directory) / f"global_step{calls}").mkdir(exist_ok=True)
        (Path(directory) / "latest").write_text(f"global_step{calls}")
        self.saved.append(client_state)

    def load_checkpoint(self, directory: str, tag: str) -> tuple[str, Any]:
        if self.unreadable == tag:
            raise ValueError(f"cannot load {directory}/{tag}; nothing was changed")
        return directory, next(s for s in self.saved if tag == f"global_step{s['progress']['calls']}")


def make_calls(progress: Progress, calls: int, delay: int = 2) -> None:
    """Make calls as an engine would: the loss of call n is 10 - n and comes `delay` calls late."""
    for _ in range(calls):
        with progress:
            of = max(0, progress.calls - delay)
            progress.update(torch.tensor(10.0 - of), of)
