"""CIFAR in its true format: read as published, and what is wrong with a file is named."""

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
from torchvision.datasets import CIFAR10

from recipes.resnet import data

TRAIN_FILES = [f"data_batch_{i}" for i in range(1, 6)]
FILES = [*TRAIN_FILES, "test_batch"]
PER_FILE = 20


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
