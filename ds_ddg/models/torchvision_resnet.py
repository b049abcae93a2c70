"""The ResNets of torchvision as layer specs, from its own modules: one spec is one residual block.

    ImageStem        convolution, normalisation, pooling    (B, 3, H, W) -> (B, 64, H / 4, W / 4)
    ResidualBlock    x 8 (resnet18) to 50 (resnet152)       strides as in torchvision
    ImageHead        global average, linear                 -> logits (B, classes)

In evaluation mode the logits equal torchvision's to the last bit. ``partition_method="type:ResidualBlock"`` gives each
stage the same number of blocks, which cost about the same.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_ddg.extras import extra
from ds_ddg.models.library_layer import Piece

__all__ = ["ImageHead", "ImageStem", "ResidualBlock", "torchvision_resnet"]


class ResNet:
    """A torchvision model without weights, see `library_layer.Origin`.

    Args:
        name: name of the model, such as "resnet50" or "wide_resnet50_2".
        options: arguments of torchvision's function of that name.
    """

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        with extra("vision", "a ResNet of torchvision"):
            from torchvision import models

        if name not in [known for known in models.list_models(models) if "resne" in known]:
            known = ", ".join(known for known in models.list_models(models) if "resne" in known)
            raise ValueError(f"torchvision has no ResNet {name!r}, it has {known}")
        self.name, self.options = name, options
        with torch.device("meta"):
            self.model = models.get_model(name, weights=None, **options)
        self.blocks = [
            f"{group}.{index}"
            for group in ("layer1", "layer2", "layer3", "layer4")
            for index in range(len(self.model.get_submodule(group)))
        ]

    def __repr__(self) -> str:
        return f"ResNet({self.name!r})"

    def part(self, path: str) -> nn.Module:
        """Return the module at `path` with torchvision's initial weights."""
        module = copy.deepcopy(self.model.get_submodule(path)).to_empty(device=torch.get_default_device())
        for child in module.modules():
            if isinstance(child, nn.Conv2d):
                nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
            elif hasattr(child, "reset_parameters"):
                child.reset_parameters()
        if self.options.get("zero_init_residual") and path in self.blocks:
            last: Any = getattr(module, "bn3", None) or module.bn2
            nn.init.zeros_(last.weight)
        return module

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every key of the state dict with its shape."""
        return {key: tuple(tensor.shape) for key, tensor in self.model.state_dict().items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return every key of the state dict with its type."""
        return {key: tensor.dtype for key, tensor in self.model.state_dict().items()}

    def aliases(self) -> dict[str, str]:
        """Return an empty dict, as a ResNet ties no weights."""
        return {}

    def rename(self, keys: list[str]) -> dict[str, str]:
        """Map every key to itself, as torchvision has not renamed its keys."""
        return {key: key for key in keys}

    def ignored(self, key: str) -> bool:
        """Return False: torchvision's files have no known leftovers."""
        return False

    def check(self, directory: Path) -> None:
        """Raise ValueError if `save_config` wrote another model's config.json into `directory`."""
        config = directory / "config.json"
        found = json.loads(config.read_text()).get("architecture", self.name) if config.is_file() else self.name
        if found != self.name:
            raise ValueError(f"{directory} has the weights of {found}, the layers are those of {self.name}")

    def save_config(self, directory: Path, dtype: torch.dtype) -> None:
        """Write which model it is; torchvision itself has no such file."""
        options = {key: value for key, value in self.options.items() if isinstance(value, bool | int | str)}
        content = json.dumps({"library": "torchvision", "architecture": self.name, **options}, indent=2)
        (directory / "config.json").write_text(content + "\n")


class ImageStem(Piece):
    """The layers before the first block: (B, 3, H, W) -> (B, 64, H / 4, W / 4)."""

    def __init__(self, origin: ResNet) -> None:
        super().__init__(origin, {path: origin.part(path) for path in ("conv1", "bn1", "relu", "maxpool")})

    def forward(self, x: Tensor) -> Tensor:
        for path in ("conv1", "bn1", "relu", "maxpool"):
            x = self.part(path)(x)
        return x


class ResidualBlock(Piece):
    """A ``BasicBlock`` or ``Bottleneck``: (B, channels, H, W) -> (B, others, H / stride, W / stride)."""

    def __init__(self, origin: ResNet, index: int) -> None:
        self._path = origin.blocks[index]
        super().__init__(origin, {self._path: origin.part(self._path)})

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self._path)(x)


class ImageHead(Piece):
    """The classifier: (B, channels, H, W) -> logits (B, classes)."""

    def __init__(self, origin: ResNet) -> None:
        super().__init__(origin, {path: origin.part(path) for path in ("avgpool", "fc")})

    def forward(self, x: Tensor) -> Tensor:
        return self.part("fc")(torch.flatten(self.part("avgpool")(x), 1))


def torchvision_resnet(name: str, **options: Any) -> list[LayerSpec]:
    """Build the layer specs of a torchvision ResNet with new weights; `load_pretrained` reads torchvision's files.

    Args:
        name: "resnet18", 34, 50, 101, 152, "wide_resnet50_2", "wide_resnet101_2" or a ResNeXt.
        options: arguments of torchvision's function: ``num_classes``, ``zero_init_residual``, ``norm_layer``, ...

    Raises:
        ValueError: torchvision has no such ResNet; the message lists the names.
        MissingExtraError: torchvision is not installed.
    """
    origin = ResNet(name, options)
    blocks = [LayerSpec(ResidualBlock, origin, index) for index in range(len(origin.blocks))]
    return [LayerSpec(ImageStem, origin), *blocks, LayerSpec(ImageHead, origin)]
