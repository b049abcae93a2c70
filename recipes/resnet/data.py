"""Images for the ResNet recipe: scikit-learn's digits (no download) and CIFAR-10.

Both ends of a pipeline pull the same batch on their own: the first stage takes the images, the last one the
labels. So everything random here depends on (seed, epoch, data-parallel rank) only, and never on the stage.
"""

from __future__ import annotations

import itertools
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DistributedSampler
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

Batch = tuple[Tensor, Tensor]
"""Normalised images (B, 3, 32, 32) float32 and labels (B,) int64."""

NO_LABEL = -100
"""Label of an image that only fills up a batch; `torch.nn.functional.cross_entropy` ignores it."""

CROP_PADDING = 4


@dataclass(frozen=True)
class Images:
    """A split of a dataset. `mean` and `std` are those of the training split, also in the test split."""

    images: Tensor
    """(N, 3, 32, 32) uint8."""
    labels: Tensor
    """(N,) int64."""
    mean: Tensor
    """(3,) float32, of pixels scaled to 0..1."""
    std: Tensor
    """(3,) float32."""
    flip: bool
    """Whether a mirror image still shows the same class."""

    def __len__(self) -> int:
        return len(self.labels)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 of the same shape, about zero mean and unit variance per channel."""
        return (images.float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]


def load(dataset: str, data_dir: Path | None = None) -> tuple[Images, Images]:
    """Training and test split of "digits" or "cifar10"; only the latter needs `data_dir`."""
    if dataset == "digits":
        return load_digits_32x32()
    if dataset == "cifar10":
        if data_dir is None:
            raise ValueError("--dataset cifar10 needs --data-dir, the folder that holds cifar-10-batches-py/")
        return load_cifar10(data_dir)
    raise ValueError(f"dataset must be 'digits' or 'cifar10', got {dataset!r}")


def load_digits_32x32() -> tuple[Images, Images]:
    """scikit-learn's 1797 handwritten digits, 8x8 grey, enlarged to 32x32x3: 1437 to train on, 360 to test.

    The split is fixed and has every digit in equal shares. No flips: a mirrored digit is another sign.
    """
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False).round().to(torch.uint8)
    images = images.expand(-1, 3, -1, -1)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return _splits(images[train], labels[train], images[test], labels[test], flip=False)


def load_cifar10(data_dir: Path) -> tuple[Images, Images]:
    """The published python version of CIFAR-10, from `data_dir`/cifar-10-batches-py/.

    FileNotFoundError if one of its six files is missing, ValueError if one is not in the published format; a file in
    that format with other content (a subset, say) is read with a warning.
    """
    folder = data_dir / CIFAR10.base_folder
    files = CIFAR10.train_list + CIFAR10.test_list
    missing = [name for name, _ in files if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"CIFAR-10 is not complete: {', '.join(missing)} missing in {folder}. Expected there: data_batch_1 to "
            f"data_batch_5 and test_batch, as unpacked from {CIFAR10.url}"
        )
    altered = [name for name, md5 in files if not check_integrity(str(folder / name), md5)]
    if altered:
        warnings.warn(f"not the published CIFAR-10 (checksum): {', '.join(altered)} in {folder}", stacklevel=2)
    train = [_read_cifar_file(folder / name) for name, _ in CIFAR10.train_list]
    test = [_read_cifar_file(folder / name) for name, _ in CIFAR10.test_list]
    train_images, train_labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    test_images, test_labels = (torch.cat(parts) for parts in zip(*test, strict=True))
    return _splits(train_images, train_labels, test_images, test_labels, flip=True)


def _read_cifar_file(path: Path) -> Batch:
    """uint8 images (N, 3, 32, 32) and labels of one file; ValueError if it is not in CIFAR-10's format."""
    try:
        # Pickled by Python 2, whose strings hold both text and the bytes of arrays: latin1 keeps either intact.
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's about the age of the arrays in it
            content = pickle.load(stream, encoding="latin1")
        # Files made by Python 3 may have bytes as keys.
        content = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        images = torch.from_numpy(content["data"]).reshape(-1, 3, 32, 32)
        labels = torch.tensor(content["labels"], dtype=torch.int64)
        if images.dtype != torch.uint8 or len(images) != len(labels) or not 0 <= labels.min() <= labels.max() <= 9:
            raise ValueError(f"data {tuple(images.shape)} of {images.dtype}, {len(labels)} labels")
    # Unpickling damaged bytes can raise nearly anything.
    except Exception as error:
        raise ValueError(
            f"{path} is not a file of CIFAR-10's python version: expected a pickled dict with 'data', uint8 "
            f"(N, 3072), and 'labels', N integers 0 to 9. Reading it gave {type(error).__name__}: {error}"
        ) from error
    return images, labels


def _splits(train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor,
            flip: bool) -> tuple[Images, Images]:  # fmt: skip
    """Both splits with the statistics of the first: what is held out must not leak into training."""
    # Channel by channel, as float copies of 50,000 images are large.
    channels = [train_images[:, channel].float() / 255 for channel in range(train_images.shape[1])]
    mean = torch.stack([channel.mean() for channel in channels])
    std = torch.stack([channel.std() for channel in channels])
    return (Images(train_images, train_labels, mean, std, flip), Images(test_images, test_labels, mean, std, flip))


def augment(images: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    """Random crop after zero padding and, if `flip`, a mirror image half the time; (B, C, H, W), any dtype."""
    count, channels, height, width = images.shape
    top, left = torch.randint(0, 2 * CROP_PADDING + 1, (2, count), generator=generator)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    if flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(images, (CROP_PADDING,) * 4)
    # One gather crops and mirrors the whole batch: image b, channel c, row y, column x.
    return padded[
        torch.arange(count)[:, None, None, None],
        torch.arange(channels)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


class TrainBatches:
    """Shuffled, augmented micro-batches for one data-parallel rank: `len()` ``train_batch()`` calls of them an epoch.

    What does not fill a call is left out of the epoch, another part every epoch.
    """

    def __init__(
        self,
        split: Images,
        micro_batch_size: int,
        micro_batches: int,
        seed: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
    ) -> None:
        self.split = split
        self.micro_batch_size = micro_batch_size
        self.micro_batches = micro_batches
        self.seed = seed
        self.rank = data_parallel_rank
        self.sampler: DistributedSampler[Batch] = DistributedSampler(
            split,  # type: ignore[arg-type]  # it only asks for the length
            num_replicas=data_parallel_size,
            rank=data_parallel_rank,
            shuffle=True,
            seed=seed,
            drop_last=True,
        )
        if not len(self):
            raise ValueError(
                f"{len(split)} training images are too few for one train_batch() call of {data_parallel_size} (data "
                f"parallel) x {micro_batches} (micro-batches) x {micro_batch_size} (micro-batch size)"
            )

    def __len__(self) -> int:
        return len(self.sampler) // (self.micro_batch_size * self.micro_batches)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The len(self) * micro_batches micro-batches of an epoch, the same for equal (seed, epoch, rank)."""
        self.sampler.set_epoch(epoch)
        order = torch.tensor(list(self.sampler))
        (entropy,) = np.random.SeedSequence((self.seed, epoch, self.rank)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(entropy))
        for chosen in order.split(self.micro_batch_size)[: len(self) * self.micro_batches]:
            images = augment(self.split.images[chosen], self.split.flip, generator)
            yield self.split.normalise(images), self.split.labels[chosen]

    def from_call(self, call: int) -> Iterator[Batch]:
        """One epoch after the other without end, from the micro-batches of ``train_batch()`` call number `call` on."""
        first, done = divmod(call, len(self))
        for epoch in itertools.count(first):
            start = done if epoch == first else 0
            yield from itertools.islice(self.epoch(epoch), start * self.micro_batches, None)


def held_out_batches(
    split: Images, micro_batch_size: int, data_parallel_rank: int = 0, data_parallel_size: int = 1
) -> list[Batch]:
    """The part of the test split that one data-parallel rank evaluates, every image on exactly one rank.

    A pipeline needs equal shapes and every rank the same number of micro-batches, so the last ones are filled up with
    images labelled NO_LABEL.
    """
    fill = -len(split) % (micro_batch_size * data_parallel_size)
    images = split.normalise(torch.cat([split.images, split.images[:1].expand(fill, -1, -1, -1)]))
    labels = F.pad(split.labels, (0, fill), value=NO_LABEL)
    batches = list(zip(images.split(micro_batch_size), labels.split(micro_batch_size), strict=True))
    return batches[data_parallel_rank::data_parallel_size]
