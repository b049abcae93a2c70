"""Images in folders, one for each class, as ImageNet (ILSVRC2012) is usually unpacked.

    train/n01440764/n01440764_10026.JPEG
    val/n01440764/ILSVRC2012_val_00000293.JPEG

Images are read when they are needed, so a data set may be larger than memory.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's training images, by channel."""

RESIZE = 256 / 224
"""The test images' shorter side, before the crop, in units of the crop."""

LAYOUT = "train/CLASS/*.jpg (or another image format) and val/CLASS/*.jpg, the same classes in both"


class ImageFiles:
    """A split on disk, with ImageNet's usual augmentation: a random part of random shape, mirrored half the time.

    Args:
        folder: a folder with a folder for each class.
        size: height and width of the network's input.

    Raises:
        FileNotFoundError: there is no such folder, or a class without images.
        ValueError: the first image of a class cannot be read.
    """

    on_disk = True

    def __init__(self, folder: Path, size: int) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there. Expected below {folder.parent}: {LAYOUT}")
        try:
            self._files = ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder} does not have images of each class in a folder of their own ({error}). Expected below "
                f"{folder.parent}: {LAYOUT}"
            ) from error
        self.classes: list[str] = self._files.classes
        self.num_classes = len(self.classes)
        self.labels = torch.tensor(self._files.targets, dtype=torch.int64)
        to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        self._random = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *to_tensor])
        self._fixed = v2.Compose([v2.Resize(round(RESIZE * size)), v2.CenterCrop(size), *to_tensor])
        for label in range(self.num_classes):
            self._read(int((self.labels == label).nonzero()[0]))

    def read(self, indices: Tensor, seed: int | None) -> Tensor:
        """See `images.Split`. ValueError for a file that is not an image."""
        images = [self._read(index) for index in indices.tolist()]
        if seed is None:
            return torch.stack([self._fixed(image) for image in images])
        # torchvision's transforms take their random numbers from PyTorch's global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return torch.stack([self._random(image) for image in images])

    def _read(self, index: int) -> object:
        path, _ = self._files.samples[index]
        try:
            return self._files.loader(path)
        except (OSError, SyntaxError, ValueError) as error:  # whatever PIL makes of damaged bytes
            size = Path(path).stat().st_size if Path(path).is_file() else 0
            raise ValueError(
                f"{path} ({size} bytes) is not an image that can be read: {error}. Fetch it again or remove it"
            ) from error


def load_folder(data_dir: Path, size: int) -> tuple[ImageFiles, ImageFiles]:
    """Find training and test images in `data_dir`/train and /val; ValueError unless both have the same classes."""
    train, test = ImageFiles(data_dir / "train", size), ImageFiles(data_dir / "val", size)
    if train.classes != test.classes:
        different = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"train and val in {data_dir} must have the same classes; in one of them only: {', '.join(different[:5])}"
            f"{', ...' if len(different) > 5 else ''}. Expected: {LAYOUT}"
        )
    return train, test
