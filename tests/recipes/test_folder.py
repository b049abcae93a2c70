"""Images in folders: read alike by everybody, and what is wrong with a folder is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.resnet import data
from recipes.resnet.data import HeldOutBatches, Share, TrainBatches
from recipes.resnet.folder import MEAN, STD, ImageFiles

CLASSES = ("n01440764", "n01443537", "n01484850")


@pytest.fixture
def image_dir(tmp_path: Path) -> Path:
    """ImageNet's layout: JPEG files of different sizes, one of them grey, whose red tells the class."""
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                width, height = 60 + 10 * i, 80 - 10 * i
                pixels = np.full((height, width, 3), 80 * label, dtype=np.uint8)
                pixels[:, : width // 2, 2] = 255  # another left half, so that mirror images can be told
                image = Image.fromarray(pixels)
                (image.convert("L") if i == 3 else image).save(folder / f"{name}_{i}.JPEG", quality=95)
    return tmp_path


def test_folders_of_images(image_dir: Path) -> None:
    train, test = data.load("imagefolder", image_dir, image_size=32)
    assert (train.num_classes, test.num_classes) == (3, 3)
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    images = test.read(torch.arange(6), None)
    assert images.shape == (6, 3, 32, 32)
    assert images.dtype == torch.float32
    red = images[:, 0].mean(dim=(1, 2)) * STD[0] + MEAN[0]
    torch.testing.assert_close(red, test.labels * 80 / 255, atol=0.02, rtol=0)
    assert torch.equal(images, test.read(torch.arange(6), None))


def test_augmentation_of_files_depends_on_the_seed_alone(image_dir: Path) -> None:
    train, _ = data.load("imagefolder", image_dir, image_size=32)
    indices = torch.tensor([5, 0, 9])
    state = torch.get_rng_state()
    images = train.read(indices, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(images, train.read(indices, seed=1))
    assert not torch.equal(images, train.read(indices, seed=2))
    left_is_blue = [train.read(torch.tensor([0]), seed)[0, 2] for seed in range(40)]
    mirrored = sum(bool(blue[:, 0].mean() < blue[:, -1].mean()) for blue in left_is_blue)
    assert 8 < mirrored < 32


def test_workers_read_the_same_images(image_dir: Path) -> None:
    train, test = data.load("imagefolder", image_dir, image_size=32)
    for split in (train, test):
        assert split.on_disk
    for workers in (0, 2):
        batches = TrainBatches(train, Share(2, workers=workers), micro_batches=3, seed=1)
        seen = [images for images, _ in batches.epoch(1, start=1)]
        held_out = [images for images, _ in HeldOutBatches(test, Share(4, workers=workers))]
        if workers == 0:
            expected, expected_held_out = seen, held_out
    assert all(map(torch.equal, seen, expected))
    assert all(map(torch.equal, held_out, expected_held_out))
    assert (len(seen), len(held_out)) == (3, 2)


def spoil(image_dir: Path, how: str) -> str:
    """What is said about it."""
    first = image_dir / "val" / CLASSES[1] / f"{CLASSES[1]}_0.JPEG"
    if how == "no val":
        (image_dir / "val").rename(image_dir / "validation")
        return rf"{image_dir / 'val'} is not there. Expected below {image_dir}: train/CLASS/\*.jpg"
    if how == "no class folders":
        for file in (image_dir / "val").glob("*/*"):
            file.rename(image_dir / "val" / file.name)
        for folder in CLASSES:
            (image_dir / "val" / folder).rmdir()
        return rf"{image_dir / 'val'} does not have images of each class in a folder of their own .* Expected below"
    if how == "an empty class":
        for file in first.parent.iterdir():
            file.unlink()
        return rf"does not have images of each class .*{CLASSES[1]}"
    if how == "other classes":
        first.parent.rename(image_dir / "val" / "n99999999")
        return f"must have the same classes; in one of them only: {CLASSES[1]}, n99999999. Expected: train/CLASS"
    content = {"truncated": first.read_bytes()[:-200], "not an image": b"<html>404</html>", "empty": b""}[how]
    first.write_bytes(content)
    return rf"{first} \({len(content)} bytes\) is not an image that can be read: .*Fetch it again or remove it"


@pytest.mark.parametrize(
    "how", ["no val", "no class folders", "an empty class", "other classes", "truncated", "not an image", "empty"]
)
def test_what_is_wrong_with_a_folder_is_said(image_dir: Path, how: str) -> None:
    message = spoil(image_dir, how)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.load("imagefolder", image_dir, image_size=32)


def test_a_damaged_file_is_named_when_it_is_read(image_dir: Path) -> None:
    """A worker finds it, and the training process hears of it."""
    (image_dir / "train" / CLASSES[0] / f"{CLASSES[0]}_2.JPEG").write_bytes(b"no image")
    batches = TrainBatches(ImageFiles(image_dir / "train", 32), Share(4, workers=1), micro_batches=1, seed=0)
    with pytest.raises(ValueError, match=rf"{CLASSES[0]}_2.JPEG \(8 bytes\) is not an image that can be read"):
        list(batches.epoch(0))


def test_random_data_is_for_benchmarks() -> None:
    train, test = data.load("random", image_size=40)
    assert train.read(torch.tensor([3, 64 + 3, 4]), 0).shape == (3, 3, 40, 40)
    assert torch.equal(train.read(torch.tensor([3]), 0), train.read(torch.tensor([64 + 3]), 1))
    assert train.labels.max() < train.num_classes
    assert not torch.equal(train.read(torch.arange(4), 0), test.read(torch.arange(4), 0))
