"""A ``DataLoader`` of the script's own, without an end, for ``train_batch``."""

from __future__ import annotations

import common
import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.utils import RepeatingLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    args = common.arguments()
    stages = common.start()
    layers = [
        LayerSpec(nn.Linear, 6, 32),
        LayerSpec(nn.Tanh),
        LayerSpec(nn.Linear, 32, 32),
        LayerSpec(nn.Tanh),
        LayerSpec(nn.Linear, 32, 1),
    ]
    net = PipelineModule(layers, num_stages=stages, loss_fn=nn.functional.mse_loss)
    engine, *_ = deepspeed.initialize(args=args, model=net, model_parameters=list(net.parameters()))

    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    dataset = TensorDataset(x, x.sum(1, keepdim=True))
    data = iter(RepeatingLoader(DataLoader(dataset, batch_size=engine.train_micro_batch_size_per_gpu())))
    losses = [engine.train_batch(data_iter=data).item() for _ in range(args.steps)]
    common.report(engine, losses)


if __name__ == "__main__":
    main()
