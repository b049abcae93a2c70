"""Stand-ins for the engine and the calls of a recipe."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from recipes.progress import Progress


class FakeMonitor:
    enabled = True

    def __init__(self) -> None:
        self.events: list[tuple[str, float, int]] = []

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        self.events += events


class FakeEngine:
    """As much of an engine as `Progress` and `Checkpoints` use."""

    num_stages = 4
    _layer = torch.nn.Linear(2, 2)

    def __init__(self, zero: bool = False) -> None:
        self.zero_optimization = lambda: zero
        # A layer without weights has no file.
        self.module = SimpleNamespace(
            forward_funcs=[self._layer, torch.relu, self._layer],
            ckpt_layer_path=lambda directory, index: f"{directory}/layer_{index + 5:02d}-model_states.pt",
        )
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
        tag = f"global_step{calls}"
        for path in map(Path, [self._get_ckpt_name(directory, tag), *self._layer_files(directory, tag)]):
            path.parent.mkdir(exist_ok=True)
            torch.save(client_state, path)
        (Path(directory) / "latest").write_text(f"global_step{calls}")
        self.saved.append(client_state)

    def load_checkpoint(self, directory: str, tag: str) -> tuple[str, Any]:
        return directory, next(s for s in self.saved if tag == f"global_step{s['progress']['calls']}")

    def _get_ckpt_name(self, directory: str, tag: str) -> str:
        return f"{directory}/{tag}/mp_rank_01_model_states.pt"

    def _get_zero_ckpt_name(self, directory: str, tag: str) -> str:
        return f"{directory}/{tag}/zero_pp_rank_0_mp_rank_01_optim_states.pt"

    def _layer_files(self, directory: str, tag: str) -> list[str]:
        return [self.module.ckpt_layer_path(f"{directory}/{tag}", index) for index in (0, 2)]


def make_calls(progress: Progress, calls: int, delay: int = 2) -> None:
    """As an engine would: the loss of call n is 10 - n and comes `delay` calls late."""
    for _ in range(calls):
        with progress:
            of = max(0, progress.calls - delay)
            progress.update(torch.tensor(10.0 - of), of)
