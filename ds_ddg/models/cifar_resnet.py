"""ResNets for 32x32 images (He et al., *Deep Residual Learning for Image Recognition*, section 4.2).

    stem        3x3 convolution to 16 channels      (B, C, 32, 32) -> (B, 16, 32, 32)
    n blocks    16 channels                         (B, 16, 32, 32)
    n blocks    32 channels, the first has stride 2 (B, 32, 16, 16)
    n blocks    64 channels, the first has stride 2 (B, 64, 8, 8)
    head        global average, linear              (B, 64, 8, 8) -> (B, num_classes)

A block has two 3x3 convolutions, so the depth is 6n + 2. One spec is one block: a skip connection never crosses
a stage boundary, and a single tensor travels between stages. Blocks cost about the same number of
multiplications, so ``partition_method="type:Stem|BasicBlock"`` balances the stages, where DeepSpeed's default (equal
parameters) would put about four fifths of the work on the first of two.
"""

from __future__ import annotations

from deepspeed.pipe import LayerSpec
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BasicBlock", "Head", "Stem", "cifar_resnet"]

WIDTHS = (16, 32, 64)


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Build a 3x3 convolution that keeps the image size (divided by `stride`), with He's initialisation."""
    # No bias: the batch normalisation that follows has one.
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class Stem(nn.Module):
    """The first layer: (B, in_channels, H, W) -> (B, channels, H, W)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = _conv3x3(in_channels, channels)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class BasicBlock(nn.Module):
    """A residual block: (B, in_channels, H, W) -> (B, channels, H / stride, W / stride), both whole numbers."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = channels - in_channels
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        """Return the identity, without parameters also in another shape: subsample, then zero channels (option A)."""
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            x = F.pad(x, (0, 0, 0, 0, 0, self.new_channels))
        return x


class Head(nn.Module):
    """The classifier: (B, channels, H, W) -> logits (B, num_classes)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(dim=(2, 3)))


def cifar_resnet(depth: int = 20, num_classes: int = 10, in_channels: int = 3) -> list[LayerSpec]:
    """Build the layer specs of ResNet-`depth`: stem, (depth - 2) / 2 blocks, head.

    The network takes (B, in_channels, 32, 32) and returns logits (B, num_classes).

    Raises:
        ValueError: `depth` is not 6n + 2.
    """
    blocks_per_width, rest = divmod(depth - 2, 6)
    if rest or blocks_per_width < 1:
        raise ValueError(f"a CIFAR ResNet has 6n + 2 layers (8, 20, 32, 44, 56, 110, ...), got depth={depth}")
    specs = [LayerSpec(Stem, in_channels, WIDTHS[0])]
    previous = WIDTHS[0]
    for width in WIDTHS:
        for _ in range(blocks_per_width):
            # Only the first block of a wider group changes the channels, and it halves the image.
            specs.append(LayerSpec(BasicBlock, previous, width, stride=1 if width == previous else 2))
            previous = width
    return [*specs, LayerSpec(Head, previous, num_classes)]
