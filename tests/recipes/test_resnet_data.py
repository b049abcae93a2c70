"""The ResNet recipe's data: what is held out stays out, and both ends of a pipeline see the same batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from recipes.common import IGNORED
from recipes.resnet import data
from recipes.resnet.data import HeldOutBatches, Share, TrainBatches
from recipes.resnet.images import Images, augment


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
