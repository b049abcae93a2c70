"""Logs the loss on every rank at every step, evaluates now and then, saves checkpoints by ``global_steps``."""

from __future__ import annotations

import common
import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

EVALUATE_EVERY, SAVE_EVERY = 4, 5


def dataset(count: int, seed: int) -> TensorDataset:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x.sum(1) > 0).long())


def main() -> None:
    args = common.arguments()
    stages = common.start()
    layers = [
        LayerSpec(nn.Linear, 6, 32),
        LayerSpec(nn.ReLU),
        LayerSpec(nn.Linear, 32, 32),
        LayerSpec(nn.Linear, 32, 2),
    ]
    net = PipelineModule(layers, num_stages=stages, loss_fn=nn.functional.cross_entropy)
    engine, *_ = deepspeed.initialize(args=args, model=net, model_parameters=list(net.parameters()))

    train = iter(DataLoader(dataset(12 * 16, seed=2), batch_size=8, drop_last=True))
    held_out = DataLoader(dataset(16, seed=3), batch_size=8)
    losses, evaluations = [], []
    for _ in range(args.steps):
        loss = engine.train_batch(data_iter=train)
        losses.append(loss.item())
        print(f"step {engine.global_steps} rank {engine.global_rank} loss {loss.item():.4f} lr {engine.get_lr()}")
        if engine.global_steps % EVALUATE_EVERY == 0:
            evaluations.append(engine.eval_batch(iter(held_out)).item())
        if engine.global_steps % SAVE_EVERY == 0 and args.output:
            engine.save_checkpoint(args.output)
    common.report(engine, losses, evaluations=evaluations)


if __name__ == "__main__":
    main()
