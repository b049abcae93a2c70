"""Micro-batches of rows, in the order of (seed, epoch), for the two ends of a pipeline.

Both ends pull the same micro-batch on their own: the first stage takes the inputs, the last one the labels. So
everything random here depends on seed, epoch, data-parallel rank and place in the epoch only, and never on the stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor

from recipes import checks, common
from recipes.common import IGNORED, seed_from, too_few

Batch = tuple[Any, Tensor]
"""Inputs (a tensor or a tuple of tensors) and labels (B, ...) int64, `IGNORED` where there is nothing to learn."""

MakeBatch = Callable[[Tensor, torch.Generator], Batch]
"""Makes a micro-batch of the rows with these numbers, (B,) int64; all that is random comes from the generator."""

Split = tuple[int, MakeBatch]
"""The number of rows in a split, and what makes a micro-batch of some of them."""


class TrainBatches:
    """The micro-batches that one data-parallel rank trains on.

    Args:
        rows: number of rows in the training split.
        make: makes a micro-batch of some rows.
        micro_batch_size: rows in one.
        micro_batches: micro-batches per ``train_batch()`` call. An epoch is a whole number of calls, each of
            other rows; rows that do not fill a call are left out, other rows in each epoch.
        seed: seed of the order, and of what `make` draws.
        data_parallel_rank, data_parallel_size: every rank takes other rows.

    Raises:
        ValueError: the rows are too few for one call.
    """

    def __init__(
        self,
        rows: int,
        make: MakeBatch,
        micro_batch_size: int,
        micro_batches: int,
        seed: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
    ) -> None:
        self.rows = rows
        self.make = make
        self.micro_batch_size = micro_batch_size
        self.micro_batches = micro_batches
        self.seed = seed
        self.rank = data_parallel_rank
        self.size = data_parallel_size
        if not len(self):
            raise too_few(f"{rows} rows of training data", data_parallel_size, micro_batches, micro_batch_size)

    def __len__(self) -> int:
        """Return the number of ``train_batch()`` calls per epoch."""
        return self.rows // (self.micro_batch_size * self.micro_batches * self.size)

    def from_call(self, call: int) -> Iterator[Batch]:
        """Yield the micro-batches from call number `call` (0, 1, ... over all epochs) on, without end."""
        first_epoch, calls = divmod(call, len(self))
        skip = calls * self.micro_batches
        for epoch in itertools.count(first_epoch):
            order = torch.randperm(self.rows, generator=_generator(self.seed, epoch))[self.rank :: self.size]
            micro_batches = order.split(self.micro_batch_size)[: len(self) * self.micro_batches]
            for place in range(skip, len(micro_batches)):
                yield self.make(micro_batches[place], _generator(self.seed, epoch, self.rank, place))
            skip = 0


def held_out_batches(
    rows: int, make: MakeBatch, micro_batch_size: int, data_parallel_rank: int = 0, data_parallel_size: int = 1
) -> list[Batch]:
    """Return the part of the held-out split that one data-parallel rank evaluates, every row on exactly one rank.

    A pipeline needs equal shapes, and every rank the same number of micro-batches: the last ones are filled up with
    row 0, labelled `IGNORED` there. What `make` draws is the same in every run.
    """
    padded = rows + -rows % (micro_batch_size * data_parallel_size)
    numbers = torch.arange(padded)
    batches = []
    for place, chosen in enumerate(numbers.split(micro_batch_size)):
        if place % data_parallel_size == data_parallel_rank:
            inputs, labels = make(chosen.where(chosen < rows, 0), _generator(place))
            labels[chosen >= rows] = IGNORED
            batches.append((inputs, labels))
    return batches


def both_splits(
    config: dict[str, Any], net: PipelineModule, seed: int, train: Split, held_out: Split
) -> tuple[TrainBatches, list[Batch]]:
    """Return this rank's batches to train on and to measure, of the size that the DeepSpeed config says.

    Raises:
        SystemExit: the config is wrong, or the rows to train on are too few for one call; every rank raises it.
    """
    parsed = checks.deepspeed_config(config, net)
    size, micro_batches = parsed.train_micro_batch_size_per_gpu, parsed.gradient_accumulation_steps
    shard = (net.mpu().get_data_parallel_rank(), net.mpu().get_data_parallel_world_size())
    with common.on_every_rank():
        train_batches = TrainBatches(*train, size, micro_batches, seed, *shard)
    return train_batches, held_out_batches(*held_out, size, *shard)


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_from(*numbers))
