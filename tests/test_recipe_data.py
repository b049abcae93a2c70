"""The ResNet recipe's data: what is held out stays out, and both ends of a pipeline see the same batches."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import struct
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets import CIFAR10

from recipes.resnet import data
from recipes.resnet.data import Images, TrainBatches

TRAIN_FILES = [f"data_batch_{i}" for i in range(1, 6)]
FILES = [*TRAIN_FILES, "test_batch"]
PER_FILE = 20


@pytest.fixture(scope="module")
def digits() -> tuple[Images, Images]:
    return data.load("digits")


def images_of(count: int, flip: bool = False) -> Images:
    """Images of noise that can be told apart, labelled 0 .. count-1, and not changed by `normalise`."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(count), torch.zeros(3), torch.ones(3), flip)


# --- digits ----------------------------------------------------------------------------------------------------------


def test_digits_split_is_fixed_disjoint_and_complete(digits: tuple[Images, Images]) -> None:
    train, test = digits
    assert (len(train), len(test)) == (1437, 360)
    again = data.load("digits")
    for split, same in zip(digits, again, strict=True):
        assert torch.equal(split.images, same.images)
        assert torch.equal(split.labels, same.labels)

    def originals(split: Images) -> list[tuple[int, bytes]]:
        return [(int(label), image.numpy().tobytes()) for image, label in zip(split.images, split.labels, strict=True)]

    seen = originals(train) + originals(test)
    # All 1797 images of the dataset are different, so this also shows that the splits do not overlap.
    assert len(set(seen)) == len(np.unique(load_digits().images, axis=0)) == 1797


def test_digits_split_is_stratified(digits: tuple[Images, Images]) -> None:
    total = torch.bincount(torch.from_numpy(load_digits().target), minlength=10)
    for split, share in zip(digits, (0.8, 0.2), strict=True):
        assert torch.all((torch.bincount(split.labels, minlength=10) - share * total).abs() < 1)


def test_digits_are_32x32x3_and_keep_their_look(digits: tuple[Images, Images]) -> None:
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


def test_statistics_come_from_the_training_split(digits: tuple[Images, Images]) -> None:
    train, test = digits
    pixels = train.normalise(train.images)
    torch.testing.assert_close(pixels.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(pixels.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    assert torch.equal(train.mean, test.mean)
    assert torch.equal(train.std, test.std)
    assert test.normalise(test.images).mean().abs() > 1e-3


def test_dataset_must_be_known() -> None:
    with pytest.raises(ValueError, match="'digits' or 'cifar10', got 'mnist'"):
        data.load("mnist")


# --- augmentation and batches ----------------------------------------------------------------------------------------


def crop_of(image: Tensor, crop: Tensor, mirrored: bool) -> bool:
    """Whether `crop` is one of the 81 windows of `image` with 4 pixels of zeros around it; both (C, H, W)."""
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    windows = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    return any(torch.equal(window.flip(2) if mirrored else window, crop) for window in windows)


def test_augmentation_crops_and_never_mirrors_unless_told_to() -> None:
    split = images_of(64)
    plain = data.augment(split.images, flip=False, generator=torch.Generator().manual_seed(1))
    assert plain.shape == split.images.shape
    assert plain.dtype == torch.uint8
    assert all(crop_of(image, crop, mirrored=False) for image, crop in zip(split.images, plain, strict=True))

    flipped = data.augment(split.images, flip=True, generator=torch.Generator().manual_seed(1))
    pairs = list(zip(split.images, flipped, strict=True))
    mirrored = [crop_of(image, crop, mirrored=True) for image, crop in pairs]
    assert [crop_of(image, crop, mirrored=False) for image, crop in pairs] == [not it for it in mirrored]
    assert 16 < sum(mirrored) < 48


def test_both_ends_of_a_pipeline_see_the_same_batches() -> None:
    """First and last stage are two processes with global random states of their own."""
    split = images_of(100, flip=True)
    torch.manual_seed(1)
    first = list(TrainBatches(split, micro_batch_size=8, micro_batches=3, seed=5).epoch(2))
    torch.manual_seed(2)
    torch.rand(7)
    last = list(TrainBatches(split, micro_batch_size=8, micro_batches=3, seed=5).epoch(2))
    for (images, labels), (same_images, same_labels) in zip(first, last, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)


@pytest.mark.parametrize("other", [{"seed": 6, "epoch": 2}, {"seed": 5, "epoch": 3}])
def test_order_and_crops_change_with_seed_and_epoch(other: dict[str, int]) -> None:
    split = images_of(48)

    def epoch(seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        batches = list(TrainBatches(split, 8, 1, seed=seed).epoch(epoch))
        return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])

    (images, labels), (other_images, other_labels) = epoch(5, 2), epoch(**other)
    assert not torch.equal(labels, other_labels)
    assert torch.equal(labels.sort().values, other_labels.sort().values)
    assert not torch.equal(images[labels.argsort()], other_images[other_labels.argsort()])


def test_an_epoch_is_a_whole_number_of_calls_without_repeats() -> None:
    batches = TrainBatches(images_of(100), micro_batch_size=8, micro_batches=3, seed=0)
    assert len(batches) == 4
    micro_batches = list(batches.epoch(0))
    assert len(micro_batches) == 4 * 3
    assert all(images.shape == (8, 3, 32, 32) and images.dtype == torch.float32 for images, _ in micro_batches)
    labels = torch.cat([labels for _, labels in micro_batches])
    assert len(labels.unique()) == len(labels) == 96


def test_data_parallel_ranks_share_an_epoch() -> None:
    split = images_of(96)
    ranks = [TrainBatches(split, 8, 2, seed=0, data_parallel_rank=rank, data_parallel_size=2) for rank in (0, 1)]
    labels = [torch.cat([labels for _, labels in batches.epoch(0)]) for batches in ranks]
    assert len(labels[0]) == len(labels[1]) == 48
    assert torch.equal(torch.cat(labels).sort().values, torch.arange(96))


def test_too_few_images_for_one_call_are_refused() -> None:
    with pytest.raises(ValueError, match=r"20 training images are too few .* 1 \(data parallel\) x 4 .* x 8"):
        TrainBatches(images_of(20), micro_batch_size=8, micro_batches=4, seed=0)


@pytest.mark.parametrize("data_parallel_size", [1, 2, 3])
def test_every_held_out_image_is_evaluated_once(data_parallel_size: int) -> None:
    split = images_of(50)
    shards = [data.held_out_batches(split, 8, rank, data_parallel_size) for rank in range(data_parallel_size)]
    assert len({len(shard) for shard in shards}) == 1
    assert all(images.shape == (8, 3, 32, 32) and labels.shape == (8,) for shard in shards for images, labels in shard)
    images = torch.cat([images for shard in shards for images, _ in shard])
    labels = torch.cat([labels for shard in shards for _, labels in shard])
    counted = labels != data.NO_LABEL
    assert torch.equal(labels[counted].sort().values, split.labels)
    assert torch.equal(images[counted], split.normalise(split.images)[labels[counted]])


# --- CIFAR-10 in its true format -------------------------------------------------------------------------------------


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


def test_other_content_than_the_published_is_read_with_a_warning(cifar_dir: Path) -> None:
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


def test_missing_files_are_named_with_what_was_expected(cifar_dir: Path) -> None:
    folder = cifar_dir / "cifar-10-batches-py"
    (folder / "data_batch_3").unlink()
    (folder / "test_batch").unlink()
    with pytest.raises(FileNotFoundError) as error:
        data.load("cifar10", cifar_dir)
    assert f"data_batch_3, test_batch missing in {folder}" in str(error.value)
    assert "data_batch_1 to data_batch_5 and test_batch" in str(error.value)


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
