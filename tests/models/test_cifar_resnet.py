"""The CIFAR ResNets are those of the paper, and one spec is one block."""

from __future__ import annotations

import pytest
import torch
from deepspeed.pipe import LayerSpec
from torch import nn

from ds_ddg.models import cifar_resnet
from ds_ddg.models.cifar_resnet import BasicBlock, Head, Stem


def build(specs: list[LayerSpec]) -> list[nn.Module]:
    return [spec.build() for spec in specs]


def num_parameters(layers: list[nn.Module]) -> int:
    return sum(p.numel() for layer in layers for p in layer.parameters())


# He et al., table 6: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M; to the last one, as counted for shortcuts without parameters.
@pytest.mark.parametrize(
    ("depth", "expected"),
    [(8, 75_290), (20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)],
)
def test_number_of_parameters_is_the_papers(depth: int, expected: int) -> None:
    assert num_parameters(build(cifar_resnet(depth))) == expected


@pytest.mark.parametrize("depth", [8, 20, 56])
def test_one_spec_is_one_block(depth: int) -> None:
    specs = cifar_resnet(depth)
    assert all(isinstance(spec, LayerSpec) for spec in specs)
    blocks = (depth - 2) // 2
    assert [spec.typename for spec in specs] == [Stem, *[BasicBlock] * blocks, Head]
    layers = build(specs)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for layer in layers for m in layer.modules()) == depth


def test_activations_are_one_tensor_of_the_documented_shape() -> None:
    x = torch.randn(2, 3, 32, 32)
    shapes = []
    for layer in build(cifar_resnet(20)):
        x = layer(x)
        shapes.append(tuple(x.shape))
    sixteen, thirty_two, sixty_four = (2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)
    assert shapes == [sixteen] * 4 + [thirty_two] * 3 + [sixty_four] * 3 + [(2, 10)]


def test_channels_and_classes_can_be_chosen() -> None:
    net = nn.Sequential(*build(cifar_resnet(8, num_classes=100, in_channels=1)))
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 100)


def test_sequence_equals_a_composition_by_hand() -> None:
    """He et al. section 4.2 written out with the same weights, without the classes under test."""
    layers = build(cifar_resnet(8))
    net = nn.Sequential(*layers).eval()
    stem, *blocks, head = layers
    x = torch.randn(2, 3, 32, 32)

    y = torch.relu(stem.bn(stem.conv(x)))
    for block, (channels, size) in zip(blocks, [(16, 32), (32, 16), (64, 8)], strict=True):
        shortcut = torch.zeros(2, channels, size, size)
        step = y.shape[-1] // size
        shortcut[:, : y.shape[1]] = y[:, :, ::step, ::step]
        residual = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(y)))))
        y = torch.relu(residual + shortcut)
    expected = y.mean(dim=(2, 3)) @ head.fc.weight.T + head.fc.bias

    torch.testing.assert_close(net(x), expected)


def test_building_twice_from_a_seed_gives_the_same_weights() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return [p for layer in build(cifar_resnet(8)) for p in layer.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(0), weights(0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(0), weights(1), strict=True))


@pytest.mark.parametrize("depth", [2, 0, -4, 18, 21, 52])
def test_other_depths_are_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"6n \+ 2 .* got depth={depth}"):
        cifar_resnet(depth)
