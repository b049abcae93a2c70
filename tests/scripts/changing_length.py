"""Sequences that get longer and shorter from batch to batch, as in curriculum learning."""

from __future__ import annotations

from collections.abc import Iterator

import common
import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn

WORDS, WIDTH = 16, 24
LENGTHS = (4, 4, 8, 12, 6, 6)


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def sequences(length: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        words = torch.randint(WORDS, (8, length), generator=generator)
        yield words, (words + 1) % WORDS


def main() -> None:
    args = common.arguments()
    stages = common.start()
    layers = [
        LayerSpec(nn.Embedding, WORDS, WIDTH),
        LayerSpec(Mix),
        LayerSpec(Mix),
        LayerSpec(nn.Linear, WIDTH, WORDS),
    ]
    net = PipelineModule(layers, num_stages=stages, loss_fn=loss_fn, dynamic_shape=True)
    engine, *_ = deepspeed.initialize(args=args, model=net, model_parameters=list(net.parameters()))

    generator = torch.Generator().manual_seed(2)
    losses, length = [], 0
    for step in range(args.steps):
        if LENGTHS[step % len(LENGTHS)] != length:
            length = LENGTHS[step % len(LENGTHS)]
            engine.reset_activation_shape()
        losses.append(engine.train_batch(data_iter=sequences(length, generator)).item())
    common.report(engine, losses)


if __name__ == "__main__":
    main()
