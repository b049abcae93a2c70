"""What the recipes share: arguments, config, processes, evaluation, checkpoints; `progress.py` has the rest."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from torch import Tensor
from tqdm import tqdm

import ds_ddg
from recipes.progress import Progress

T = TypeVar("T")

EVALUATED_TOGETHER = 32
"""Micro-batches of one ``eval_batch()``, which fetches all its data before it starts."""

KEPT_CHECKPOINTS = 2
"""The newest, and the one before in case a crash or a full disk has spoilt the newest."""

SETTINGS = "settings.json"

TAG = "global_step"
"""What DeepSpeed calls a checkpoint, followed by the number of calls."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every recipe, DeepSpeed's own (--deepspeed_config, --local_rank) among them."""
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--schedule", choices=["ddg", "1f1b"], help="1f1b is DeepSpeed's own (default: as configured)")
    parser.add_argument("--stages", type=int, help="pipeline stages (default: one per process)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and augmentation")
    parser.add_argument("--output-dir", type=Path, help="for metrics, losses and curves.png (default: below runs/)")
    parser.add_argument("--checkpoint-dir", type=Path, help="save checkpoints here, on a disk that all machines share")
    parser.add_argument(
        "--checkpoint-every", type=int, metavar="CALLS", help="train_batch() calls between two of them"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest in --checkpoint-dir, if any")
    deepspeed.add_config_arguments(parser)


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """``parser.parse_args()`` with the checks that concern several arguments."""
    args = parser.parse_args()
    if args.checkpoint_dir is None and (args.resume or args.checkpoint_every is not None):
        parser.error("--resume and --checkpoint-every need --checkpoint-dir")
    for name in ("stages", "checkpoint_every"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    return args


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
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))


def gather(value: T) -> list[T]:
    """What every rank has got, by rank; pickled."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def on_every_rank() -> Iterator[None]:
    """What the ``with`` block finds wrong on one rank ends all of them, each with the reason.

    For what depends on a machine, such as its files: the other ranks would wait for this one until they time out.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    reasons = gather(None if failure is None else str(failure) or type(failure).__name__)
    if failure is not None and not isinstance(failure, OSError | ValueError):
        raise failure  # not the user's doing: with its traceback
    failed = [rank for rank, reason in enumerate(reasons) if reason is not None]
    if failed:
        raise SystemExit(f"rank {', '.join(map(str, failed))}: {reasons[failed[0]]}")


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
    # Anything but a dict is an error that ds_ddg explains.
    if schedule is not None and isinstance(config.setdefault("ddg", {}), dict):
        config["ddg"]["enabled"] = schedule == "ddg"
    return config


def dtype_of(config: DeepSpeedConfig) -> torch.dtype:
    """That of the weights, and so of inputs that are numbers: DeepSpeed casts the one and not the other."""
    if config.bfloat16_config.enabled:
        return torch.bfloat16
    return torch.float16 if config.float16_config.enabled else torch.float32


def fill_scheduler(config: dict[str, Any], calls: int) -> None:
    """Replace "auto" among the scheduler's parameters by the number of ``train_batch()`` calls in the whole run."""
    params = config.get("scheduler", {}).get("params", {})
    params.update({key: calls for key, value in params.items() if value == "auto"})


def seed_from(*numbers: int) -> int:
    """A seed for what is random in one place: other `numbers` (run, epoch, rank, ...) give an unrelated one."""
    (entropy,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(entropy)


def evaluate(
    engine: ds_ddg.DDGEngine, batches: Iterable[Any], count: int, measure: Callable[[Any, Any], Tensor]
) -> list[float]:
    """Sums over held-out data, the same on every rank; ``eval_batch`` itself only returns averages.

    Args:
        engine: whose weights of the current call are evaluated.
        batches: micro-batches ``(inputs, labels)`` of this rank's data-parallel share.
        count: how many there are, the same on every rank.
        measure: ``measure(outputs, labels)`` -> (n,) what to sum over micro-batches and replicas.
    """
    sums: list[Tensor] = []

    def add(outputs: Any, labels: Any) -> Tensor:
        measured = measure(outputs, labels).double()
        sums[:] = [sums[0] + measured] if sums else [measured]
        return measured[0]

    train_loss_fn, engine.module.loss_fn = engine.module.loss_fn, add
    try:
        iterator = iter(batches)
        for start in range(0, count, EVALUATED_TOGETHER):
            together = min(EVALUATED_TOGETHER, count - start)
            chunk = itertools.islice(iterator, together)
            engine.eval_batch(chunk, reduce_output=None, bcast_loss=False, num_micro_batches=together)
    finally:
        engine.module.loss_fn = train_loss_fn
    parts = gather(sums[0].tolist() if sums else None)  # only last stages have measured
    return [sum(values) for values in zip(*(part for part in parts if part is not None), strict=True)]


class Checkpoints:
    """Saves in DeepSpeed's layout, and goes on from the newest as if the run had never stopped, to the last bit.

    A resumed run equals one that was not interrupted and saved at the same calls: a save drains the pipeline. From
    each save on, PyTorch's random numbers (dropout) start from a seed of their own, so there is no state of generators
    to keep. Data must depend on the seed and the number of the call only.

    Args:
        args: parsed from `add_arguments`.
        engine: made by ``ds_ddg.initialize``.
        progress: saved and restored with the engine.
        every: calls between two saves, unless --checkpoint-every says otherwise.
    """

    def __init__(self, args: argparse.Namespace, engine: ds_ddg.DDGEngine, progress: Progress, every: int) -> None:
        self._directory: Path | None = args.checkpoint_dir
        self._every = args.checkpoint_every or every
        self._resume = args.resume
        self._seed = args.seed
        self._engine, self._progress = engine, progress

    def restore(self) -> None:
        """Once, before the first call: load the newest checkpoint with --resume, if there is one.

        SystemExit on every rank if there are checkpoints that --resume did not ask for, or of another run.
        """
        if self._directory is not None:
            with on_every_rank():
                tag = self._newest(self._directory)
            tags = gather(tag)
            if len(set(tags)) > 1:
                raise SystemExit(f"{self._directory} is not the same folder on all machines: by rank it has {tags}")
            if tag is not None:
                self._load(self._directory, tag)
            elif dist.get_rank() == 0:
                self._directory.mkdir(parents=True, exist_ok=True)
                (self._directory / SETTINGS).write_text(json.dumps(self._progress.settings, indent=2) + "\n")
        self._reseed()

    def save_if_due(self) -> None:
        """After a call and what belongs to it (an evaluation): save when it is time, and at the end of the run."""
        calls = self._progress.calls
        if self._directory is None or (calls % self._every and calls < self._progress.total_calls):
            return
        self._engine.save_checkpoint(str(self._directory), client_state={"progress": self._progress.state_dict()})
        if dist.get_rank() == 0:
            calls_of = {path: path.name.removeprefix(TAG) for path in self._directory.glob(f"{TAG}*")}
            saved = sorted((int(calls), path) for path, calls in calls_of.items() if calls.isdecimal())
            for _, old in saved[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old)
        self._reseed()

    def _newest(self, directory: Path) -> str | None:
        """The tag of the checkpoint to load. ValueError or OSError if that cannot be what the user wants."""
        latest = directory / "latest"
        if not latest.is_file():
            return None
        tag = latest.read_text().strip()
        if not self._resume:
            raise ValueError(
                f"{directory} holds checkpoints of an earlier run ({tag}): add --resume to go on from there, or name "
                "another --checkpoint-dir"
            )
        if not (directory / tag).is_dir():
            raise FileNotFoundError(f"{latest} names {tag}, but {directory / tag} is not there; name another in it")
        then = json.loads((directory / SETTINGS).read_text())
        now = json.loads(json.dumps(self._progress.settings))
        keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        other = [f"{key} {then.get(key)!r}, now {now.get(key)!r}" for key in keys]
        if keys:
            raise ValueError(
                f"the checkpoints in {directory} are of a run with {'; '.join(other)}: use the same, or start anew in "
                "another --checkpoint-dir"
            )
        return tag

    def _load(self, directory: Path, tag: str) -> None:
        _, client_state = self._engine.load_checkpoint(str(directory), tag)
        self._progress.load_state_dict(client_state["progress"])
        if dist.get_rank() == 0:
            tqdm.write(f"going on from {directory / tag}, after {self._progress.calls} calls")

    def _reseed(self) -> None:
        torch.manual_seed(seed_from(self._seed, self._progress.calls, dist.get_rank()))
