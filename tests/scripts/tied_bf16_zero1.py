"""A language model whose first and last layer share the embedding; bf16 and ZeRO-1 come from the config."""

from __future__ import annotations

from collections.abc import Iterator

import common
import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn

WORDS, WIDTH = 16, 32


class Embedding(nn.Embedding):
    """Its weight must be an attribute of the tied layer itself."""

    def __init__(self) -> None:
        super().__init__(WORDS, WIDTH)
        nn.init.normal_(self.weight, std=0.2)


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


def logits(embedding: Embedding, x: Tensor) -> Tensor:
    return nn.functional.linear(x, embedding.weight)


def loss_fn(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1).float(), labels.flatten())


def sequences() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    while True:
        words = torch.randint(WORDS, (8, 8), generator=generator)
        yield words, (words + 1) % WORDS


def main() -> None:
    args = common.arguments()
    stages = common.start()
    layers = [
        TiedLayerSpec("embedding", Embedding),
        LayerSpec(Mix),
        LayerSpec(Mix),
        LayerSpec(nn.LayerNorm, WIDTH),
        TiedLayerSpec("embedding", Embedding, forward_fn=logits),
    ]
    net = PipelineModule(layers, num_stages=stages, loss_fn=loss_fn, partition_method="uniform")
    engine, *_ = deepspeed.initialize(
        args=args, model=net, model_parameters=[p for p in net.parameters() if p.requires_grad]
    )
    data = sequences()
    losses = [engine.train_batch(data_iter=data).item() for _ in range(args.steps)]
    dtypes = sorted({str(p.dtype) for p in engine.module.parameters()})
    common.report(engine, losses, dtypes=dtypes)


if __name__ == "__main__":
    main()
