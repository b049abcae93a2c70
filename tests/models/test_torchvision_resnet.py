"""torchvision's ResNets as layer specs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_ddg import models
from ds_ddg.models.torchvision_resnet import ImageHead, ImageStem, ResidualBlock

torchvision = pytest.importorskip("torchvision")


def filled(name: str, **options: object) -> tuple[nn.Sequential, nn.Module]:
    """The pipeline's layers and the library's model with the same weights and statistics, in evaluation mode."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, **options)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "running" in key or "bn" in key:
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    net = nn.Sequential(*(spec.build() for spec in models.torchvision_resnet(name, **options)))
    with torch.no_grad():
        for layer in net:
            for key, tensor in layer.original_state().items():
                tensor.copy_(model.state_dict()[key])
    return net.eval(), model.eval()


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("resnet18", 8), ("resnet34", 16), ("resnet50", 16), ("resnet101", 33), ("wide_resnet50_2", 16)],
)
def test_logits_are_torchvisions_to_the_last_bit(name: str, blocks: int) -> None:
    net, model = filled(name, num_classes=7)
    assert [type(layer) for layer in net] == [ImageStem, *[ResidualBlock] * blocks, ImageHead]
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(net(images), model(images))


@pytest.mark.parametrize("name", ["resnet152", "wide_resnet101_2", "resnext50_32x4d"])
def test_every_weight_is_in_one_layer(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
        layers = [spec.build() for spec in models.torchvision_resnet(name)]
    state = {key: t.shape for layer in layers for key, t in layer.original_state().items()}
    assert state == {key: t.shape for key, t in model.state_dict().items()}


def test_training_step_is_torchvisions() -> None:
    """Batch statistics, their running means, and gradients."""
    net, model = filled("resnet18", num_classes=3)
    net.train(), model.train()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    for module in (net, model):
        nn.functional.cross_entropy(module(images), labels).backward()
    state, gradients = model.state_dict(), {key: p.grad for key, p in model.named_parameters()}
    for layer in net:
        for key, tensor in layer.original_state().items():
            assert torch.equal(tensor, state[key]), key
            if key in gradients:
                assert torch.equal(tensor.grad, gradients[key]), key


def test_initial_weights_are_distributed_as_torchvisions() -> None:
    model = torchvision.models.resnet18(zero_init_residual=True)
    state = model.state_dict()
    for spec in models.torchvision_resnet("resnet18", zero_init_residual=True):
        for key, tensor in spec.build().original_state().items():
            value = tensor.detach().float()
            assert float(value.std(correction=0)) == pytest.approx(
                float(state[key].float().std(correction=0)), rel=0.15, abs=1e-6
            ), key
            assert float(value.mean()) == pytest.approx(float(state[key].float().mean()), abs=0.02), key


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no ResNet 'resnet51', it has resnet101, .*wide_resnet50_2"):
        models.torchvision_resnet("resnet51")
