"""The record of a run: its progress bar, its losses and held-out metrics so far, and the last line of JSON."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor
from tqdm import tqdm

import ds_ddg
from ds_ddg.checkpoint.folder import write_whole
from recipes.console import progress_bar
from recipes.plots import draw_curves, words

READ_EVERY = 10
"""Calls between two looks at the losses: reading one waits for the device."""


class Progress:
    """Progress bar on rank 0, and on every rank the record that curves and metrics are made from.

    Under DDG a returned loss is a few calls old, so losses are stored by the call that they belong to. What a
    checkpoint needs to go on with the same record is in `state_dict`.

    Args:
        engine: made by ``ds_ddg.initialize``.
        calls: ``train_batch()`` calls in the whole run.
        calls_per_epoch: calls in an epoch; None for a recipe that counts calls.
        **settings: settings of the recipe that decide about the training: data set, model, seed, ... They are among
            the metrics, and a checkpoint of a run with other settings is refused.
    """

    def __init__(
        self, engine: ds_ddg.DDGEngine, calls: int, calls_per_epoch: int | None = None, **settings: Any
    ) -> None:
        self.total_calls = calls
        self.calls_per_epoch = calls_per_epoch
        self.settings = {
            "schedule": "ddg" if engine.ddg.enabled else "1f1b",
            "stages": engine.num_stages,
            "micro_batches": engine.gradient_accumulation_steps(),
            "batch_size": engine.train_batch_size(),
            **settings,
        }
        self.calls = 0
        """The calls made so far, including the calls before a resumption."""
        self.held_out: dict[str, dict[int, float]] = {}
        """Metric -> number of calls made before the evaluation -> value."""
        self._engine = engine
        self._spent = 0.0
        self._start: float | None = None
        self._losses: dict[int, float] = {}
        self._known: dict[int, float] = {}
        self._unread: list[tuple[int, Tensor]] = []

    @cached_property
    def _bar(self) -> tqdm[Any]:
        """The progress bar, not shown before it is needed: a message that ends the run early would stand behind it."""
        return progress_bar(self.total_calls * self._engine.train_batch_size(), shown=dist.get_rank() == 0)

    def __enter__(self) -> Progress:
        """Measure the training inside a ``with`` block."""
        _ = self._bar  # before the first call, which may take long
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self._spent, self._start = self.seconds, None

    @property
    def seconds(self) -> float:
        """The seconds spent in training so far, without evaluation and checkpoints."""
        return self._spent + (0.0 if self._start is None else time.perf_counter() - self._start)

    def update(self, loss: Tensor, loss_call: int) -> None:
        """Record the loss that a ``train_batch()`` returned, and the call (0, 1, ...) that it is the loss of."""
        self._unread.append((loss_call, loss.detach()))
        self._known.setdefault(loss_call, self.seconds)  # DDG returns the loss of call 0 until the next one is there
        self.calls += 1
        self._bar.update(self._engine.train_batch_size())
        if self.calls % READ_EVERY == 0 or self.calls == 1:
            newest = self.losses[loss_call]
            self._bar.set_description(self._now(self.total_calls), refresh=False)
            self._bar.set_postfix_str(f"loss {newest:.4f} (of call {loss_call}, counted from 0)", refresh=False)

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Record the results of an evaluation, such as ``{"test_accuracy": 0.98}``, and pass them to the monitors."""
        for name, value in metrics.items():
            self.held_out.setdefault(name, {})[self.calls] = value
        if self._engine.monitor.enabled:
            samples = self._engine.global_samples
            self._engine.monitor.write_events([(f"Eval/Samples/{n}", v, samples) for n, v in metrics.items()])
        if dist.get_rank() == 0:
            tqdm.write(f"after {self._now()}: " + ", ".join(f"{words(n)} {v:.4f}" for n, v in metrics.items()))

    @property
    def losses(self) -> dict[int, float]:
        """The training loss by call, as far as known: under DDG the last few before a drain never are."""
        if self._unread:
            values = torch.stack([loss.float() for _, loss in self._unread]).tolist()
            self._losses.update(zip([call for call, _ in self._unread], values, strict=True))
            self._unread = []
        return self._losses

    @property
    def train_loss(self) -> float | None:
        """The mean loss of the last epoch (without epochs: of the last tenth); None before the first call."""
        last = [loss for call, loss in self.losses.items() if call >= self.calls - self._window]
        last = last or list(self.losses.values())[-1:]
        return sum(last) / len(last) if last else None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has to keep."""
        return {
            "calls": self.calls,
            "seconds": self.seconds,
            "held_out": self.held_out,
            "loss_calls": torch.tensor(list(self.losses), dtype=torch.int64),
            "losses": torch.tensor(list(self.losses.values()), dtype=torch.float64),
            "loss_seconds": torch.tensor([self._known[call] for call in self.losses], dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.calls, self._spent, self.held_out = state["calls"], state["seconds"], state["held_out"]
        calls = state["loss_calls"].tolist()
        self._losses = dict(zip(calls, state["losses"].tolist(), strict=True))
        self._known = dict(zip(calls, state["loss_seconds"].tolist(), strict=True))
        self._unread = []
        self._bar.update(self.calls * self._engine.train_batch_size() - self._bar.n)
        self._bar.unpause()  # what was done before does not count for the speed

    def finish(self, output_dir: Path, title: str, draw: Sequence[str], **metrics: Any) -> None:
        """Write metrics.json, losses.csv and curves.png on rank 0, and print the metrics as the last line.

        Args:
            output_dir: the folder to write into, made if it is not there.
            title: title of the picture.
            draw: names of the held-out metrics that the picture shows.
            **metrics: metrics of the recipe besides its settings, last held-out metrics, training loss and speed.
        """
        self._bar.close()
        if dist.get_rank() != 0:
            return
        loss = self.train_loss
        samples = self.calls * self._engine.train_batch_size()
        line = {
            **self.settings,
            **metrics,
            **{name: values[max(values)] for name, values in self.held_out.items()},
            "train_loss": None if loss is None else round(loss, 5),
            "samples_per_second": round(samples / self.seconds, 1) if self.seconds else None,
            "seconds": round(self.seconds, 1),
        }
        output_dir.mkdir(parents=True, exist_ok=True)
        write_whole(output_dir / "metrics.json", json.dumps(line, indent=2) + "\n")
        self._write_losses(output_dir / "losses.csv")
        shown = {name: self.held_out.get(name, {}) for name in draw}
        stages = self.settings["stages"]
        full_title = f"{title}, {stages} {'stage' if stages == 1 else 'stages'}, {self.settings['schedule']}"
        path = output_dir / "curves.png"
        draw_curves(path, full_title, self.losses, shown, self._window, self.calls_per_epoch)
        print(json.dumps(line), flush=True)

    def _write_losses(self, path: Path) -> None:
        """Write the loss of each call, and the seconds of training after which the script had it."""
        with path.open("w", newline="", encoding="ascii") as file:
            rows = csv.writer(file)
            rows.writerow(("call", "loss", "seconds"))
            rows.writerows((call, loss, f"{self._known[call]:.6f}") for call, loss in sorted(self.losses.items()))

    @property
    def _window(self) -> int:
        return self.calls_per_epoch or max(1, self.total_calls // 10)

    def _now(self, of: int | None = None) -> str:
        """Put into words how far the run is; `of` is the number of calls in all."""
        if self.calls_per_epoch is None:
            return f"{self.calls} calls" if of is None else f"{self.calls} of {of} calls"
        epoch = f"epoch {-(-self.calls // self.calls_per_epoch)}"
        return epoch if of is None else f"{epoch} of {of // self.calls_per_epoch}"


def fit(
    engine: Any,
    micro_batches: Iterator[Any],
    progress: Progress,
    evaluate: Callable[[], Mapping[str, float]],
    save_if_due: Callable[[], None],
) -> None:
    """Make the calls that are left; evaluate after every epoch, then save if it is time."""
    while progress.calls < progress.total_calls:
        with progress:
            loss = engine.train_batch(micro_batches)
            progress.update(loss, engine.loss_step)
            if progress.calls == progress.total_calls:
                engine.drain()  # the network is trained once its last gradients have arrived
        if progress.calls_per_epoch and progress.calls % progress.calls_per_epoch == 0:
            progress.evaluated(evaluate())
        save_if_due()
