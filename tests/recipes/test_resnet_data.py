"""The ResNet recipe's data: what is held out stays out, and both ends of a pipeline see the same batches."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import struct
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets import CIFAR10

from recipes.common import IGNORED
from recipes.resnet import data
from recipes.resnet.data import HeldOutBatches, Share, TrainBatches
from recipes.resnet.folder import MEAN, STD, ImageFiles
from recipes.resnet.images import Images, augment

TRAIN_FILES = [f"data_batch_{i}" for i in range(1, 6)]
FILES = [*TRAIN_FILES, "test_batch"]
PER_FILE = 20


@pytest.fixture(scope="module")
def digits() -> tuple[Any, Any]:
    return data.load("digits")


def images_of(count: int, flip: bool = False) -> Images:
    """Images of noise that can be told apart, labelled 0 .. count-1, and not changed by `normalise`."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(count), torch.zeros(3), torch.ones(3), flip)


# --- digits ----------------------------------------------------------------------------------------------------------


def test_digits_split_is_fixed_disjoint_and_complete(digits: tuple[Any, Any]) -> None:
    train, test = digits
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    again = data.load("digits")
    for split, same in zip(digits, again, strict=True):
        assert torch.equal(split.images, same.images)
        assert torch.equal(split.labels, same.labels)

    def originals(split: Any) -> list[tuple[int, bytes]]:
        return [(int(label), image.numpy().tobytes()) for image, label in zip(split.images, split.labels, strict=True)]

    seen = originals(train) + originals(test)
    # All 1797 images of the dataset are different, so this also shows that the splits do not overlap.
    assert len(set(seen)) == len(np.unique(load_digits().images, axis=0)) == 1797


def test_digits_split_is_stratified(digits: tuple[Any, Any]) -> None:
    total = torch.bincount(torch.from_numpy(load_digits().target), minlength=10)
    for split, share in zip(digits, (0.8, 0.2), strict=True):
        assert torch.all((torch.bincount(split.labels, minlength=10) - share * total).abs() < 1)


def test_digits_are_32x32x3_and_keep_their_look(digits: tuple[Any, Any]) -> None:
    train, _ = digits
    assert train.images.shape == (1437, 3, 32, 32)
    assert train.images.dtype == torch.uint8
    assert torch.equal(train.images[:, 0], train.images[:, 1])
    assert torch.equal(train.images[:, 0], train.images[:, 2])
    assert train.images.min() == 0
    assert train.images.max() == 255
    assert not train.flip
    # Shrunk by means over 4x4 pixels, an enlarged digit is still closest to its own original.
    small = train.images[:50, 0].float().reshape(50, 8, 4, 8, 4).mean(dim=(2, 4)).flatten(1) * 16 / 255
    originals = torch.from_numpy(load_digits().images).float().flatten(1)
    nearest = torch.cdist(small, originals).argmin(dim=1)
    assert torch.equal(torch.from_numpy(load_digits().target)[nearest], train.labels[:50])


def test_statistics_come_from_the_training_split(digits: tuple[Any, Any]) -> None:
    train, test = digits
    pixels = train.normalise(train.images)
    torch.testing.assert_close(pixels.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(pixels.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    assert torch.equal(train.mean, test.mean)
    assert torch.equal(train.std, test.std)
    assert test.normalise(test.images).mean().abs() > 1e-3


def test_dataset_must_be_known() -> None:
    with pytest.raises(ValueError, match="one of digits, cifar10, cifar100, imagefolder, random, got 'mnist'"):
        data.load("mnist")


# --- augmentation and batches ----------------------------------------------------------------------------------------


def crop_of(image: Tensor, crop: Tensor, mirrored: bool) -> bool:
    """Whether `crop` is one of the 81 windows of `image` with 4 pixels of zeros around it; both (C, H, W)."""
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    windows = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    return any(torch.equal(window.flip(2) if mirrored else window, crop) for window in windows)


def test_augmentation_crops_and_mirrors_only_when_told_to() -> None:
    split = images_of(64)
    plain = augment(split.images, flip=False, generator=torch.Generator().manual_seed(1))
    assert plain.shape == split.images.shape
    assert plain.dtype == torch.uint8
    assert all(crop_of(image, crop, mirrored=False) for image, crop in zip(split.images, plain, strict=True))

    flipped = augment(split.images, flip=True, generator=torch.Generator().manual_seed(1))
    pairs = list(zip(split.images, flipped, strict=True))
    mirrored = [crop_of(image, crop, mirrored=True) for image, crop in pairs]
    assert [crop_of(image, crop, mirrored=False) for image, crop in pairs] == [not it for it in mirrored]
    assert 16 < sum(mirrored) < 48


def test_both_ends_of_a_pipeline_see_the_same_batches() -> None:
    """First and last stage are two processes with global random states of their own."""
    split = images_of(100, flip=True)
    torch.manual_seed(1)
    first = list(TrainBatches(split, Share(8), micro_batches=3, seed=5).epoch(2))
    torch.manual_seed(2)
    torch.rand(7)
    last = list(TrainBatches(split, Share(8), micro_batches=3, seed=5).epoch(2))
    for (images, labels), (same_images, same_labels) in zip(first, last, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)


@pytest.mark.parametrize("other", [{"seed": 6, "epoch": 2}, {"seed": 5, "epoch": 3}])
def test_order_and_crops_change_with_seed_and_epoch(other: dict[str, int]) -> None:
    split = images_of(48)

    def epoch(seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        batches = list(TrainBatches(split, Share(8), 1, seed=seed).epoch(epoch))
        return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])

    (images, labels), (other_images, other_labels) = epoch(5, 2), epoch(**other)
    assert not torch.equal(labels, other_labels)
    assert torch.equal(labels.sort().values, other_labels.sort().values)
    assert not torch.equal(images[labels.argsort()], other_images[other_labels.argsort()])


def test_an_epoch_is_a_whole_number_of_calls_no_repeats() -> None:
    batches = TrainBatches(images_of(100), Share(8), micro_batches=3, seed=0)
    assert len(batches) == 4
    micro_batches = list(batches.epoch(0))
    assert len(micro_batches) == 4 * 3
    assert all(images.shape == (8, 3, 32, 32) and images.dtype == torch.float32 for images, _ in micro_batches)
    labels = torch.cat([labels for _, labels in micro_batches])
    assert len(labels.unique()) == len(labels) == 96


def test_data_parallel_ranks_share_an_epoch() -> None:
    split = images_of(96)
    ranks = [TrainBatches(split, Share(8, rank, 2), micro_batches=2, seed=0) for rank in (0, 1)]
    labels = [torch.cat([labels for _, labels in batches.epoch(0)]) for batches in ranks]
    assert len(labels[0]) == len(labels[1]) == 48
    assert torch.equal(torch.cat(labels).sort().values, torch.arange(96))


def test_a_run_goes_on_in_the_middle_of_an_epoch() -> None:
    batches = TrainBatches(images_of(100, flip=True), Share(8), micro_batches=3, seed=5)
    whole = [batch for epoch in range(3) for batch in batches.epoch(epoch)]
    global_state = torch.get_rng_state()
    resumed = batches.from_call(6)
    for images, labels in whole[6 * 3 :]:
        same_images, same_labels = next(resumed)
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    assert torch.equal(torch.get_rng_state(), global_state), "dropout would change with the data"


def test_stages_that_need_no_images_read_none() -> None:
    split = images_of(48)
    with_images = TrainBatches(split, Share(8), 1, seed=3)
    without = TrainBatches(split, Share(8, images=False), 1, seed=3)
    for (_, labels), (nothing, same_labels) in zip(with_images.epoch(1), without.epoch(1), strict=True):
        assert nothing is None
        assert torch.equal(labels, same_labels)


def test_too_few_images_for_one_call_are_refused() -> None:
    with pytest.raises(ValueError, match=r"20 training images are too few .* 1 \(data parallel\) x 4 .* x 8"):
        TrainBatches(images_of(20), Share(8), micro_batches=4, seed=0)


@pytest.mark.parametrize("data_parallel_size", [1, 2, 3])
def test_every_held_out_image_is_evaluated_once(data_parallel_size: int) -> None:
    split = images_of(50)
    shards = [HeldOutBatches(split, Share(8, rank, data_parallel_size)) for rank in range(data_parallel_size)]
    assert len({len(shard) for shard in shards}) == 1
    assert all(images.shape == (8, 3, 32, 32) and labels.shape == (8,) for shard in shards for images, labels in shard)
    images = torch.cat([images for shard in shards for images, _ in shard if images is not None])
    labels = torch.cat([labels for shard in shards for _, labels in shard])
    counted = labels != IGNORED
    assert torch.equal(labels[counted].sort().values, split.labels)
    assert torch.equal(images[counted], split.normalise(split.images)[labels[counted]])


# --- CIFAR in its true format -------------------------------------------------------------------------------------


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes what Python 2 and the NumPy of 2009 wrote, as in the published files: bytes are plain strings."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    def save_flag(self, value: bool) -> None:
        self.write(pickle.BININT1 + bytes([value]))

    dispatch[bytes] = save_string
    dispatch[bool] = save_flag


def python2_pickle(content: object) -> bytes:
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(content)
    return stream.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


@pytest.fixture
def cifar_dir(tmp_path: Path) -> Path:
    """A small CIFAR-10 in the format of the published python version."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number, name in enumerate(FILES):
        pixels = generator.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8)
        # Told apart by the first red and the last blue pixel.
        pixels[:, 0], pixels[:, -1] = number, np.arange(PER_FILE)
        batch = {
            b"batch_label": name.encode(),
            b"labels": [i % 10 for i in range(PER_FILE)],
            b"data": pixels,
            b"filenames": [b"x.png"] * PER_FILE,
        }
        (folder / name).write_bytes(python2_pickle(batch))
    return tmp_path


@pytest.mark.filterwarnings("ignore:not the published CIFAR-10")
def test_cifar10_is_read_in_its_own_order(cifar_dir: Path) -> None:
    train, test = data.load("cifar10", cifar_dir)
    assert train.images.shape == (5 * PER_FILE, 3, 32, 32)
    assert test.images.shape == (PER_FILE, 3, 32, 32)
    assert train.images[:, 0, 0, 0].tolist() == [i // PER_FILE for i in range(5 * PER_FILE)]
    assert test.images[:, 2, 31, 31].tolist() == list(range(PER_FILE))
    assert train.labels.tolist() == [i % 10 for i in range(5 * PER_FILE)]
    assert train.flip
    torch.testing.assert_close(train.mean, train.images.float().mean(dim=(0, 2, 3)) / 255)
    assert torch.equal(train.mean, test.mean)


def test_content_other_than_published_gives_a_warning(cifar_dir: Path) -> None:
    with pytest.warns(UserWarning, match="not the published CIFAR-10 .*data_batch_1.*test_batch"):
        data.load("cifar10", cifar_dir)


@pytest.mark.filterwarnings("ignore:not the published CIFAR-10")
@pytest.mark.parametrize("keys", [("data", "labels"), (b"data", b"labels")], ids=["str", "bytes"])
def test_files_written_by_python_3_are_read_as_well(cifar_dir: Path, keys: tuple[str | bytes, str | bytes]) -> None:
    pixels = np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8)
    file = cifar_dir / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(pickle.dumps(dict(zip(keys, (pixels, [3, 4]), strict=True))))
    _, test = data.load("cifar10", cifar_dir)
    assert torch.equal(test.images.flatten(1), torch.from_numpy(pixels))
    assert test.labels.tolist() == [3, 4]


def test_published_checksums_give_no_warning(cifar_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_checksums(files: list[list[str]]) -> list[list[str]]:
        folder = cifar_dir / CIFAR10.base_folder
        return [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()] for name, _ in files]

    monkeypatch.setattr(CIFAR10, "train_list", with_checksums(CIFAR10.train_list))
    monkeypatch.setattr(CIFAR10, "test_list", with_checksums(CIFAR10.test_list))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.load("cifar10", cifar_dir)


def test_cifar10_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="--data-dir, the folder that holds cifar-10-batches-py"):
        data.load("cifar10")


def test_an_image_size_is_for_data_that_can_have_one() -> None:
    with pytest.raises(ValueError, match="--image-size is for imagefolder and random; digits has images of 32x32"):
        data.load("digits", image_size=64)


def test_missing_files_are_named_with_what_was_expected(cifar_dir: Path) -> None:
    folder = cifar_dir / "cifar-10-batches-py"
    (folder / "data_batch_3").unlink()
    (folder / "test_batch").unlink()
    with pytest.raises(FileNotFoundError) as error:
        data.load("cifar10", cifar_dir)
    assert f"data_batch_3, test_batch missing in {folder}" in str(error.value)
    assert "data_batch_1, data_batch_2, data_batch_3, data_batch_4, data_batch_5, test_batch" in str(error.value)


def a_file(rows: int = 4, row: int = 3072, dtype: type = np.uint8, labels: list[int] | None = None) -> bytes:
    """A file of `rows` rows, right unless told otherwise."""
    return python2_pickle({b"labels": [0] * 4 if labels is None else labels, b"data": np.zeros((rows, row), dtype)})


@pytest.mark.filterwarnings("ignore:not the published CIFAR-10")
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"<html>404</html>", id="another format"),
        pytest.param(a_file()[:-2000], id="truncated"),
        pytest.param(python2_pickle([1, 2, 3]), id="not a dict"),
        pytest.param(python2_pickle({b"data": np.zeros((4, 3072), np.uint8)}), id="no labels"),
        pytest.param(python2_pickle({b"labels": [0] * 4}), id="no data"),
        pytest.param(a_file(row=3000), id="short rows"),
        pytest.param(a_file(dtype=np.float32), id="not uint8"),
        pytest.param(a_file(labels=[0, 1, 2]), id="a label missing"),
        pytest.param(a_file(labels=[0, 1, 2, 10]), id="label out of range"),
        pytest.param(a_file(rows=0, labels=[]), id="no rows"),
    ],
)
def test_a_corrupt_file_is_named_with_what_was_expected(cifar_dir: Path, content: bytes) -> None:
    file = cifar_dir / "cifar-10-batches-py" / "data_batch_2"
    file.write_bytes(content)
    expected = f"{file} is not a file of CIFAR-10's python version: expected a pickled dict with 'data'"
    with pytest.raises(ValueError, match=re.escape(expected)):
        data.load("cifar10", cifar_dir)


def cifar100_file(count: int = PER_FILE, first: int = 0, labels: str = "fine_labels") -> bytes:
    """A file of CIFAR-100, which has the labels of 20 groups beside those of its 100 classes."""
    pixels = np.zeros((count, 3072), dtype=np.uint8)
    pixels[:, 0] = np.arange(count)
    return python2_pickle(
        {
            b"filenames": [b"x.png"] * count,
            b"batch_label": b"training batch 1 of 1",
            labels.encode(): [(first + i) % 100 for i in range(count)],
            b"coarse_labels": [i % 20 for i in range(count)],
            b"data": pixels,
        }
    )


@pytest.mark.filterwarnings("ignore:not the published CIFAR-100")
def test_cifar100_is_read_with_its_fine_labels(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "train").write_bytes(cifar100_file(first=90))
    with pytest.raises(FileNotFoundError, match=f"CIFAR-100 is not complete: test missing in {folder}.* train, test,"):
        data.load("cifar100", tmp_path)
    (folder / "test").write_bytes(cifar100_file())
    train, test = data.load("cifar100", tmp_path)
    assert (train.num_classes, test.num_classes) == (100, 100)
    assert train.labels.tolist() == [(90 + i) % 100 for i in range(PER_FILE)]
    pixels = train.read(torch.arange(PER_FILE), None)[:, 0, 0, 0] * train.std[0] + train.mean[0]  # type: ignore[attr-defined]
    torch.testing.assert_close(pixels * 255, torch.arange(PER_FILE).float())
    (folder / "test").write_bytes(cifar100_file(labels="labels"))
    with pytest.raises(ValueError, match=r"CIFAR-100's python version: expected .*'fine_labels', N integers 0 to 99"):
        data.load("cifar100", tmp_path)


# --- images in folders -----------------------------------------------------------------------------------------------

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
