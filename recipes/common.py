"""What the recipes share: arguments, config, progress, curves and the last line of metrics."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import deepspeed
import matplotlib
import torch
from deepspeed import comm as dist
from torch import Tensor
from tqdm import tqdm

matplotlib.use("Agg")  # no screen needed
from matplotlib import pyplot as plt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every recipe, DeepSpeed's own (--deepspeed_config, --local_rank) among them."""
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--schedule", choices=["ddg", "1f1b"], help="1f1b is DeepSpeed's own (default: as configured)")
    parser.add_argument("--stages", type=int, help="pipeline stages (default: one per process)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and augmentation")
    parser.add_argument("--output-dir", type=Path, help="for metrics.json and curves.png (default: below runs/)")
    deepspeed.add_config_arguments(parser)


def set_threads() -> None:
    """Share this machine's cores among its processes, unless OMP_NUM_THREADS says otherwise.

    PyTorch gives every process all cores, so several of them on one machine would slow each other down.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        # LOCAL_SIZE is the deepspeed launcher's name for torchrun's LOCAL_WORLD_SIZE.
        processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))


def init_distributed() -> None:
    """``deepspeed.init_distributed()`` without the minute of C++ compiling that it starts on CPU.

    What it would compile, shared-memory collectives for inference, no training run uses.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()


def read_config(path: str | None, schedule: str | None) -> dict[str, Any]:
    """The DeepSpeed JSON at `path` as a dict, with the schedule asked for on the command line, if any."""
    if path is None:
        raise SystemExit("--deepspeed_config is required; the recipe's own are in configs/")
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"--deepspeed_config: cannot read {path!r} as JSON: {error}") from None
    if not isinstance(config, dict):
        raise SystemExit(f"--deepspeed_config: {path!r} must hold a JSON object, got {type(config).__name__}")
    if schedule is not None and isinstance(
        config.setdefault("ddg", {}), dict
    ):  # anything else is an error that ds_ddg explains
        config["ddg"]["enabled"] = schedule == "ddg"
    return config


def fill_scheduler(config: dict[str, Any], calls: int) -> None:
    """Replace "auto" among the scheduler's parameters by the number of ``train_batch()`` calls in the whole run."""
    params = config.get("scheduler", {}).get("params", {})
    params.update({key: calls for key, value in params.items() if value == "auto"})


class Progress:
    """Progress bar on rank 0, and the record that the curves and the metrics are made from.

    Under DDG a returned loss is a few calls old, so losses are stored by the call that they belong to.
    """

    def __init__(self, epochs: int, calls_per_epoch: int, samples_per_call: int) -> None:
        self.epochs = epochs
        self.calls_per_epoch = calls_per_epoch
        self.samples_per_call = samples_per_call
        self.losses: dict[int, Tensor] = {}
        self.accuracies: dict[int, float] = {}
        """By the number of calls made before the evaluation."""
        self.calls = 0
        self.seconds = 0.0
        """Spent in training, without evaluation."""
        self._bar = tqdm(
            total=epochs * calls_per_epoch * samples_per_call,
            unit=" samples",
            unit_scale=True,
            mininterval=1.0,
            disable=dist.get_rank() != 0,
        )

    def __enter__(self) -> Progress:
        """Measure the training inside a ``with`` block."""
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self._start

    def update(self, loss: Tensor, loss_call: int) -> None:
        """After a ``train_batch()``: the loss that it returned, and the call (0, 1, ...) that this is the loss of."""
        self.losses[loss_call] = loss
        self.calls += 1
        self._bar.update(self.samples_per_call)
        # Reading a loss waits for the device, so it must not happen in every call.
        if self.calls % 10 == 0 or self.calls == 1:
            self._bar.set_description(f"epoch {(self.calls - 1) // self.calls_per_epoch + 1}/{self.epochs}")
            self._bar.set_postfix_str(f"loss {float(loss):.4f} (call {loss_call})")

    def evaluated(self, loss: float, accuracy: float) -> None:
        """After an evaluation: mean loss and accuracy (0 to 1) on the test split."""
        self.accuracies[self.calls] = accuracy
        if dist.get_rank() == 0:
            epoch = self.calls // self.calls_per_epoch
            tqdm.write(f"epoch {epoch}: test loss {loss:.4f}, test accuracy {accuracy:.4f}")

    @property
    def train_loss(self) -> float:
        """Mean over the last epoch's calls, as far as their losses are known: DDG's last few never are."""
        last = [loss for call, loss in self.losses.items() if call >= self.calls - self.calls_per_epoch]
        last = last or [self.losses[max(self.losses)]]
        return float(torch.stack([loss.float().cpu() for loss in last]).mean())

    def finish(self, output_dir: Path, title: str, **metrics: Any) -> None:
        """On rank 0: write metrics.json and curves.png, and print the metrics as the last line."""
        self._bar.close()
        if dist.get_rank() != 0:
            return
        metrics |= {
            "train_loss": round(self.train_loss, 5),
            "samples_per_second": round(self.calls * self.samples_per_call / self.seconds, 1),
            "seconds": round(self.seconds, 1),
        }
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        self._plot(output_dir / "curves.png", title)
        print(json.dumps(metrics), flush=True)

    def _plot(self, path: Path, title: str) -> None:
        calls = sorted(self.losses)
        losses = torch.stack([self.losses[call].float().cpu() for call in calls])
        figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 7), layout="constrained")
        epochs = [(call + 1) / self.calls_per_epoch for call in calls]
        above.plot(epochs, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="one call")
        means = [chunk.mean() for chunk in losses.split(self.calls_per_epoch)]
        middles = [chunk.mean() for chunk in torch.tensor(epochs).split(self.calls_per_epoch)]
        above.plot(middles, means, color="tab:blue", marker="o", markersize=4, label="mean of an epoch")
        above.set(title=title, ylabel="training loss", yscale="log")
        above.legend()
        below.plot(
            [call / self.calls_per_epoch for call in self.accuracies],
            [100 * accuracy for accuracy in self.accuracies.values()],
            color="tab:orange",
            marker="o",
            markersize=4,
        )
        below.set(xlabel="epoch", ylabel="test accuracy (%)")
        for axes in (above, below):
            axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)
        plt.close(figure)
