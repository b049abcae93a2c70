"""CIFAR-10 and CIFAR-100 as published (the "python version" of https://www.cs.toronto.edu/~kriz/cifar.html)."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from recipes.resnet.images import Images, both_splits


@dataclass(frozen=True)
class _Format:
    """The differences between the two data sets."""

    name: str
    published: Any
    """The class of torchvision, which knows files, checksums and where to get them."""
    labels: str
    num_classes: int


FORMATS = {
    "cifar10": _Format("CIFAR-10", CIFAR10, "labels", 10),
    "cifar100": _Format("CIFAR-100", CIFAR100, "fine_labels", 100),
}


def load_cifar(dataset: str, data_dir: Path) -> tuple[Images, Images]:
    """Read training and test split of "cifar10" or "cifar100", whose folder (as unpacked) is in `data_dir`.

    A file in the published format with other content (a subset, say) is read with a warning.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not in the published format.
    """
    format_ = FORMATS[dataset]
    published = format_.published
    folder = data_dir / published.base_folder
    files = published.train_list + published.test_list
    missing = [name for name, _ in files if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{format_.name} is not complete: {', '.join(missing)} missing in {folder}. Expected there: "
            f"{', '.join(name for name, _ in files)}, as unpacked from {published.url}"
        )
    altered = [name for name, md5 in files if not check_integrity(str(folder / name), md5)]
    if altered:
        warnings.warn(f"not the published {format_.name} (checksum): {', '.join(altered)} in {folder}", stacklevel=2)
    train, test = (
        [_read_file(folder / name, format_) for name, _ in split]
        for split in (published.train_list, published.test_list)
    )
    return both_splits(_joined(train), _joined(test), flip=True, num_classes=format_.num_classes)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def _read_file(path: Path, format_: _Format) -> tuple[Tensor, Tensor]:
    """Read uint8 images (N, 3, 32, 32) and labels of one file; ValueError if it is not in the format."""
    try:
        # Pickled by Python 2, whose strings hold both text and the bytes of arrays: latin1 keeps either intact.
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's about the age of the arrays in it
            content = pickle.load(stream, encoding="latin1")
        # Files made by Python 3 may have bytes as keys.
        content = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        images = torch.from_numpy(content["data"]).reshape(-1, 3, 32, 32)
        labels = torch.tensor(content[format_.labels], dtype=torch.int64)
        in_range = 0 <= labels.min() <= labels.max() < format_.num_classes
        if images.dtype != torch.uint8 or len(images) != len(labels) or not in_range:
            raise ValueError(f"data {tuple(images.shape)} of {images.dtype}, {len(labels)} labels")
    # Unpickling damaged bytes can raise nearly anything.
    except Exception as error:
        raise ValueError(
            f"{path} is not a file of {format_.name}'s python version: expected a pickled dict with 'data', uint8 "
            f"(N, 3072), and '{format_.labels}', N integers 0 to {format_.num_classes - 1}. Reading it gave "
            f"{type(error).__name__}: {error}"
        ) from error
    return images, labels
