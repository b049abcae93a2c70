"""Micro-batches of images for the ResNet recipe, the same for both ends of a pipeline and for a resumed run.

The first stage takes the images, the last one the labels, each from its own iterator. So everything random here
depends on (seed, epoch, data-parallel rank, micro-batch) only, and never on the stage or on what was read before.
A stage other than the first reads no images at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from recipes.common import IGNORED, seed_from, too_few
from recipes.resnet.cifar import FORMATS, load_cifar
from recipes.resnet.folder import load_folder
from recipes.resnet.images import Noise, Split, load_digits_32x32

DATASETS = ("digits", *FORMATS, "imagefolder", "random")

Batch = tuple[Tensor | None, Tensor]
"""Normalised images (B, 3, H, W), or None where nobody needs them, and labels (B,) int64."""


def load(dataset: str, data_dir: Path | None = None, image_size: int | None = None) -> tuple[Split, Split]:
    """Load training and test split of one of `DATASETS`.

    Args:
        dataset: its name; "digits" and "random" need no files.
        data_dir: the folder with the files of the other data sets.
        image_size: height and width for "imagefolder" and "random", 224 if None; the others are 32x32.

    Raises:
        ValueError: the arguments do not fit, or a file is not in its format.
        FileNotFoundError: a file is missing; the message says what was expected where.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}")
    if dataset in ("digits", *FORMATS) and image_size is not None:
        raise ValueError(f"--image-size is for imagefolder and random; {dataset} has images of 32x32")
    if dataset == "digits":
        return load_digits_32x32()
    size = image_size or 224
    if dataset == "random":
        return Noise(1024, size, seed=0), Noise(256, size, seed=1)
    if data_dir is None:
        what = "train/ and val/" if dataset == "imagefolder" else f"{FORMATS[dataset].published.base_folder}/"
        raise ValueError(f"--dataset {dataset} needs --data-dir, the folder that holds {what}")
    return load_folder(data_dir, size) if dataset == "imagefolder" else load_cifar(dataset, data_dir)


class _Wanted(NamedTuple):
    """A micro-batch that is not read yet."""

    indices: Tensor
    labels: Tensor
    seed: int | None


@dataclass(frozen=True)
class Share:
    """The part of the data that one rank reads.

    Args:
        micro_batch_size: images of a micro-batch.
        rank: rank in the data-parallel group.
        size: size of the data-parallel group.
        images: False on stages that need labels only.
        workers: processes that read images from disk.
        dtype: the type that the network takes.
    """

    micro_batch_size: int
    rank: int = 0
    size: int = 1
    images: bool = True
    workers: int = 0
    dtype: torch.dtype = torch.float32

    def read(self, split: Split, wanted: list[_Wanted]) -> Iterator[Batch]:
        """Yield the micro-batches, in order; no worker starts before the first one is asked for."""
        if not self.images:
            yield from ((None, micro_batch.labels) for micro_batch in wanted)
            return
        loader: DataLoader[Any] = DataLoader(
            _MicroBatches(split),
            sampler=wanted,
            batch_size=None,
            num_workers=self.workers if split.on_disk else 0,
            generator=torch.Generator(),  # it would take a number from the global one
        )
        for images, micro_batch in zip(loader, wanted, strict=True):
            yield images.to(self.dtype), micro_batch.labels


class _MicroBatches(Dataset[Tensor]):
    """A split whose items are whole micro-batches."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def __getitem__(self, wanted: _Wanted) -> Tensor:  # what the sampler yields
        return self._split.read(wanted.indices, wanted.seed)


class TrainBatches:
    """Shuffled, augmented micro-batches for one data-parallel rank: `len()` ``train_batch()`` calls of them an epoch.

    Images that do not fill a call are left out of the epoch, other images in every epoch.

    Args:
        split: the training images.
        share: the part of this rank.
        micro_batches: micro-batches of one call.
        seed: seed of order and augmentation.
    """

    def __init__(self, split: Split, share: Share, micro_batches: int, seed: int) -> None:
        self._split, self._share = split, share
        self._micro_batches = micro_batches
        self._seed = seed
        self._sampler: DistributedSampler[Any] = DistributedSampler(
            split.labels,  # type: ignore[arg-type]  # it only asks for the length
            num_replicas=share.size,
            rank=share.rank,
            shuffle=True,
            seed=seed,
            drop_last=True,
        )
        if not len(self):
            images = f"{len(split.labels)} training images"
            raise too_few(images, share.size, micro_batches, share.micro_batch_size)

    def __len__(self) -> int:
        return len(self._sampler) // (self._share.micro_batch_size * self._micro_batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Return the micro-batches of an epoch from its call number `start` on."""
        self._sampler.set_epoch(epoch)
        order = torch.tensor(list(self._sampler)).split(self._share.micro_batch_size)
        numbers = range(start * self._micro_batches, len(self) * self._micro_batches)
        wanted = [
            _Wanted(order[n], self._split.labels[order[n]], seed_from(self._seed, epoch, self._share.rank, n))
            for n in numbers
        ]
        return self._share.read(self._split, wanted)

    def from_call(self, call: int) -> Generator[Batch, None, None]:
        """Yield micro-batches from ``train_batch()`` call number `call` on, one epoch after the other, without end."""
        first, done = divmod(call, len(self))
        yield from self.epoch(first, done)
        for epoch in itertools.count(first + 1):
            yield from self.epoch(epoch)


class HeldOutBatches:
    """The part of the test split that one data-parallel rank evaluates, every image on exactly one rank.

    A pipeline needs equal shapes and every rank the same number of micro-batches, so the last ones are filled up with
    images labelled IGNORED.
    """

    def __init__(self, split: Split, share: Share) -> None:
        self._split, self._share = split, share
        count = len(split.labels)
        fill = -count % (share.micro_batch_size * share.size)
        indices = F.pad(torch.arange(count), (0, fill)).split(share.micro_batch_size)
        labels = F.pad(split.labels, (0, fill), value=IGNORED).split(share.micro_batch_size)
        self._wanted = [_Wanted(*both, None) for both in zip(indices, labels, strict=True)][share.rank :: share.size]

    def __len__(self) -> int:
        return len(self._wanted)

    def __iter__(self) -> Iterator[Batch]:
        return self._share.read(self._split, self._wanted)
