"""Arguments, config, processes and evaluation, shared by all recipes."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import hjson  # type: ignore[import-untyped]
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys
from torch import Tensor
from tqdm import tqdm

import ds_ddg
from ds_ddg.comm.start import prepared_start
from ds_ddg.config import DDGConfig
from ds_ddg.models.ranks import gather
from ds_ddg.telemetry.false_alarms import drop_false_alarms

EVALUATED_TOGETHER = 32
"""Micro-batches of one ``eval_batch()``, which fetches all its data before it starts."""


IGNORED = -100
"""Label that losses and metrics leave out; `torch.nn.functional.cross_entropy` ignores it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every recipe, DeepSpeed's own (--deepspeed_config, --local_rank) among them."""
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--schedule", choices=["ddg", "1f1b"], help="1f1b is DeepSpeed's own (default: as configured)")
    parser.add_argument("--stages", type=at_least(1), help="pipeline stages (default: one per process)")
    parser.add_argument(
        "--as-if-stages",
        type=at_least(1),
        metavar="K",
        help="train in one process with the delay of K stages, to see what it does; needs no K processes",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of weights, data order and augmentation")
    parser.add_argument("--output-dir", type=Path, help="for metrics, losses and curves.png (default: below runs/)")
    parser.add_argument("--checkpoint-dir", type=Path, help="save checkpoints here, on a disk that all machines share")
    parser.add_argument(
        "--checkpoint-every", type=at_least(1), metavar="CALLS", help="train_batch() calls between two of them"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest in --checkpoint-dir, if any")
    deepspeed.add_config_arguments(parser)


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Run ``parser.parse_args(arguments)`` with the checks that concern several arguments."""
    args = parser.parse_args(arguments)
    if args.checkpoint_dir is None and (args.resume or args.checkpoint_every is not None):
        parser.error("--resume and --checkpoint-every need --checkpoint-dir")
    if args.as_if_stages is not None and args.checkpoint_dir is not None:
        parser.error("--as-if-stages has gradients in flight that no checkpoint holds; leave out --checkpoint-dir")
    if args.as_if_stages is not None and args.schedule == "1f1b":
        parser.error("--as-if-stages is about delay, which --schedule 1f1b does not have; leave one of them out")
    return args


def at_least(low: int) -> Callable[[str], int]:
    """Return a type for ``add_argument``: a whole number, `low` or more."""

    def number(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        return value

    number.__name__ = "int"  # what argparse says that it expected
    return number


def below_one(text: str) -> float:
    """Read a share, from 0 to less than 1; a type for ``add_argument``."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be 0 or more and less than 1, got {text}")
    return value


below_one.__name__ = "float"  # as above


def local_processes() -> int:
    """Return the number of processes that the launcher has started on this machine."""
    # LOCAL_SIZE is the deepspeed launcher's name for torchrun's LOCAL_WORLD_SIZE.
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def set_threads() -> None:
    """Share this machine's cores among its processes, unless OMP_NUM_THREADS says otherwise.

    PyTorch gives every process all cores, so several of them on one machine would slow each other down.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_processes()))


def init_distributed() -> None:
    """Run ``deepspeed.init_distributed()`` without its compilation, and with an error where gloo cannot connect."""
    drop_false_alarms()
    backend = share_gpus()
    with prepared_start():
        if backend is not None:
            # DeepSpeed would bind the process group to a GPU, and with a bound one torch takes every group for NCCL's.
            torch.distributed.init_process_group(backend, timeout=default_pg_timeout)
        deepspeed.init_distributed(backend)
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))


def share_gpus() -> str | None:
    """Give each process a GPU to share, by LOCAL_RANK, if there are fewer GPUs than processes here.

    Returns:
        The back end to initialize: gloo, as NCCL refuses two processes on one GPU. None if nothing is shared.
    """
    processes, local = local_processes(), int(os.environ.get("LOCAL_RANK", 0))
    gpus = get_accelerator().device_count() if get_accelerator().device_name() == "cuda" else processes
    if gpus >= processes:
        return None
    os.environ["LOCAL_RANK"] = str(local * gpus // processes)
    if local == 0:
        tqdm.write(f"{processes} processes share {gpus} GPU{'s' * (gpus > 1)}, over gloo")
    return "gloo"


@contextmanager
def on_every_rank() -> Iterator[None]:
    """Inside this block an OSError or ValueError on one rank ends all ranks, each with the reason.

    It is for work that depends on a machine, such as its files: the other ranks would wait for this one until they
    time out.

    Raises:
        SystemExit: the block failed on a rank.
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
    """Read the DeepSpeed JSON at `path`, with the schedule asked for on the command line, if any."""
    if path is None:
        raise SystemExit("--deepspeed_config is required; the recipe's own are in configs/")
    try:
        # As DeepSpeed reads it: with comments, and nothing said twice.
        config = hjson.loads(Path(path).read_text(), object_pairs_hook=dict_raise_error_on_duplicate_keys)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--deepspeed_config: cannot read {path!r} as JSON: {error}") from None
    if not isinstance(config, dict):
        raise SystemExit(f"--deepspeed_config: {path!r} must hold a JSON object, got {type(config).__name__}")
    if config.get("ddg") is None:  # a null, too
        config["ddg"] = {}
    # Anything but a dict is an error that ds_ddg explains.
    if schedule is not None and isinstance(config["ddg"], dict):
        config["ddg"]["enabled"] = schedule == "ddg"
    try:
        DDGConfig.parse(config["ddg"])
    except ValueError as error:
        raise SystemExit(f"--deepspeed_config {path}: {error}") from None
    return config


def schedule_of(config: dict[str, Any]) -> str:
    """Return the schedule, "ddg" or "1f1b", that `config` from `read_config` sets."""
    return "ddg" if DDGConfig.parse(config["ddg"]).enabled else "1f1b"


def dtype_of(config: DeepSpeedConfig) -> torch.dtype:
    """Return the type of the weights, and so of inputs that are numbers: DeepSpeed casts the weights alone."""
    if config.bfloat16_config.enabled:
        return torch.bfloat16
    return torch.float16 if config.float16_config.enabled else torch.float32


def fill_scheduler(config: dict[str, Any], calls: int) -> bool:
    """Replace "auto" among the scheduler's parameters by the number of ``train_batch()`` calls in the whole run.

    Returns:
        Whether there was one, so that the learning rate depends on the length of the run.
    """
    params = config.get("scheduler", {}).get("params", {})
    filled = {key: calls for key, value in params.items() if value == "auto"}
    params.update(filled)
    return bool(filled)


def too_few(rows: str, replicas: int, micro_batches: int, size: int) -> ValueError:
    """Return the error of training data whose `rows`, a number and what they are, do not fill a call."""
    return ValueError(
        f"{rows} are too few for one train_batch() call of {replicas} (data parallel) x {micro_batches} "
        f"(micro-batches) x {size} (micro-batch size)"
    )


def seed_from(*numbers: int) -> int:
    """Return a seed for what is random in one place: other `numbers` (run, epoch, rank, ...) give an unrelated one."""
    (entropy,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return int(entropy)


def evaluate(
    engine: ds_ddg.DDGEngine, batches: Iterable[Any], count: int, measure: Callable[[Any, Any], Tensor]
) -> list[float]:
    """Return sums over held-out data, the same on every rank; ``eval_batch`` itself only returns averages.

    Args:
        engine: the engine; its weights of the current call are evaluated.
        batches: micro-batches ``(inputs, labels)`` of this rank's data-parallel share.
        count: number of micro-batches, the same on every rank.
        measure: ``measure(outputs, labels)`` -> (n,) values to sum over micro-batches and replicas.
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
            size = min(EVALUATED_TOGETHER, count - start)
            chunk = itertools.islice(iterator, size)
            engine.eval_batch(chunk, reduce_output=None, bcast_loss=False, num_micro_batches=size)
    finally:
        engine.module.loss_fn = train_loss_fn
    parts = gather(sums[0].tolist() if sums else None)  # only last stages have measured
    return [sum(values) for values in zip(*(part for part in parts if part is not None), strict=True)]
