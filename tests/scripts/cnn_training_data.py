"""A CNN; DeepSpeed makes the loader from ``training_data``."""

from __future__ import annotations

import common
import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def images(count: int) -> TensorDataset:
    """Noise with a bright quarter; the label says which."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(4, (count,), generator=generator)
    pictures = 0.5 * torch.randn(count, 1, 8, 8, generator=generator)
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        picture[0, label // 2 * 4 :, label % 2 * 4 :][:4, :4] += 2.0
    return TensorDataset(pictures, labels)


def block(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU())


def main() -> None:
    args = common.arguments()
    stages = common.start()
    layers: list[nn.Module] = [block(1, 8), block(8, 8), nn.MaxPool2d(2), nn.Flatten(1), nn.Linear(128, 4)]
    net = PipelineModule(layers, num_stages=stages, loss_fn=nn.functional.cross_entropy, partition_method="uniform")
    engine, _, loader, _ = deepspeed.initialize(
        args=args,
        model=net,
        model_parameters=[p for p in net.parameters() if p.requires_grad],
        training_data=images(64),
    )
    losses: list[Tensor] = [engine.train_batch() for _ in range(args.steps)]
    common.report(engine, [loss.item() for loss in losses], loader=type(loader).__name__)


if __name__ == "__main__":
    main()
