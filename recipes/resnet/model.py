"""The recipe's networks by name, and their weights as files.

    resnet18, resnet50, wide_resnet50_2, ...    torchvision's, for images of any size; files are torchvision's
    cifar_resnet20, cifar_resnet110, ...        6n + 2 layers, for 32x32 (He et al., section 4.2); files as below

A file of a CIFAR ResNet is read by ``torch.nn.Sequential(*[spec.build() for spec in cifar_resnet(20)])`` with
``load_state_dict(ds_ddg.models.read_state_dict(path))``.
"""

from __future__ import annotations

import re
from pathlib import Path

from deepspeed import comm as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn

from ds_ddg.models import (
    WeightsError,
    cifar_resnet,
    load_pretrained,
    read_state_dict,
    save_pretrained,
    torchvision_resnet,
)
from ds_ddg.models.ranks import gather
from ds_ddg.models.weight_writer import replace_weights

PARTITION = "type:Stem|Block"
"""Each stage gets the same number of residual blocks, which cost about the same; the stem counts as one."""

_CIFAR = re.compile(r"cifar_resnet(\d+)")


def layer_specs(name: str, num_classes: int) -> list[LayerSpec]:
    """Return the layers of the network called `name`; ValueError lists the names if there is none."""
    if match := _CIFAR.fullmatch(name):
        return cifar_resnet(int(match[1]), num_classes)
    try:
        return torchvision_resnet(name, num_classes=num_classes)
    except ValueError as error:
        raise ValueError(f"{error}; for images of 32x32 there is cifar_resnet20 (or another 6n + 2)") from None


def save_weights(net: PipelineModule, name: str, directory: Path) -> None:
    """Write the weights of all stages into `directory`; call it on every rank, with nothing in flight.

    Raises:
        WeightsError: a rank cannot write; every rank raises it, and what was there before is there still.
    """
    if not _CIFAR.fullmatch(name):
        save_pretrained(net, directory)
        return
    state = {key: tensor for part in gather(net.state_dict()) for key, tensor in part.items()}
    replace_weights(directory, dist.get_rank(), state if dist.get_rank() == 0 else {}, lambda _: None)


def load_weights(net: nn.Module, name: str, path: Path) -> None:
    """Fill this rank's stage from a file or a directory; `WeightsError` if they are damaged or another model's."""
    if not _CIFAR.fullmatch(name):
        load_pretrained(net, path)
        return
    found, wanted = read_state_dict(path), net.state_dict()
    wrong = [key for key in wanted if key not in found or found[key].shape != wanted[key].shape]
    if wrong:
        raise WeightsError(f"{path} has no weights of {name}: {', '.join(wrong[:4])} missing or of another shape")
    net.load_state_dict({key: found[key] for key in wanted})
