"""Labelled images: the interface of a data set, images that fit in memory, and two data sets without a download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

CROP_PADDING = 4


class Split(Protocol):
    """The training or the test images of a data set."""

    @property
    def on_disk(self) -> bool:
        """Whether reading takes so long that other processes should do it."""

    @property
    def num_classes(self) -> int:
        """The number of classes; labels are 0 .. num_classes - 1."""

    @property
    def labels(self) -> Tensor:
        """The labels of all images, (N,) int64."""

    def read(self, indices: Tensor, seed: int | None) -> Tensor:
        """Return normalised images (B, 3, H, W) float32, augmented at random if there is a `seed` for that.

        Args:
            indices: (B,) numbers of the images.
            seed: seed of the augmentation; None for none.
        """


@dataclass(frozen=True)
class Images:
    """A split in memory, whose `mean` and `std` are of the training images, also in the test split."""

    images: Tensor
    """Pixels, (N, 3, 32, 32) uint8."""
    labels: Tensor
    """Labels, (N,) int64."""
    mean: Tensor
    """Mean by channel, (3,) float32, of pixels scaled to 0..1."""
    std: Tensor
    """Standard deviation by channel, (3,) float32."""
    flip: bool
    """Whether a mirror image still shows the same class."""
    num_classes: int = 10
    on_disk: ClassVar[bool] = False

    def read(self, indices: Tensor, seed: int | None) -> Tensor:
        """See `Split`."""
        images = self.images[indices]
        if seed is not None:
            images = augment(images, self.flip, torch.Generator().manual_seed(seed))
        return self.normalise(images)

    def normalise(self, images: Tensor) -> Tensor:
        """Scale uint8 (B, 3, H, W) to float32 of about zero mean and unit variance per channel."""
        return (images.float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]


def both_splits(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], flip: bool, num_classes: int = 10
) -> tuple[Images, Images]:
    """Make both splits with the statistics of the training split: held-out images must not leak into it."""
    # Channel by channel, as float copies of 50,000 images are large.
    channels = [train[0][:, channel].float() / 255 for channel in range(3)]
    mean = torch.stack([channel.mean() for channel in channels])
    std = torch.stack([channel.std() for channel in channels])
    return Images(*train, mean, std, flip, num_classes), Images(*test, mean, std, flip, num_classes)


def augment(images: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    """Crop images (B, C, H, W) at random after zero padding and, if `flip`, mirror half of them; any dtype."""
    count, channels, height, width = images.shape
    top, left = torch.randint(0, 2 * CROP_PADDING + 1, (2, count), generator=generator)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    if flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(images, (CROP_PADDING,) * 4)
    return padded[
        torch.arange(count)[:, None, None, None],
        torch.arange(channels)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def load_digits_32x32() -> tuple[Images, Images]:
    """Load scikit-learn's 1797 handwritten digits, 8x8 grey, enlarged to 32x32x3: 1437 to train on, 360 to test.

    The split is fixed and has every digit in equal shares. No flips: a mirrored digit is another sign.
    """
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False).round().to(torch.uint8)
    images = images.expand(-1, 3, -1, -1)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return both_splits((images[train], labels[train]), (images[test], labels[test]), flip=False)


class Noise:
    """Random pixels under random labels, for benchmarks, in which only the network takes time.

    Args:
        count: number of images; a few are shown again and again.
        size: height and width.
        seed: seed of pixels and labels.
    """

    DIFFERENT = 64
    on_disk = False
    num_classes = 1000

    def __init__(self, count: int, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(self.DIFFERENT, 3, size, size, generator=generator)
        self.labels = torch.randint(self.num_classes, (count,), generator=generator)

    def read(self, indices: Tensor, seed: int | None) -> Tensor:
        """See `Split`; noise needs no augmentation."""
        return self._pool[indices % self.DIFFERENT]
