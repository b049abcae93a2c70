"""A model of your own on the delayed schedule, in one file: layers, loss, data, config, loop.

    deepspeed --num_gpus 2 minimal.py

Two processes, one pipeline stage each; without a GPU put DS_ACCELERATOR=cpu before it (`--num_gpus` is DeepSpeed's
word for processes there too). Every 50 calls the engine prints a line, and at the end the script prints one with the
same loss and the same number:

    steps: 100 loss: 0.3215 (of call 98, counted from 0) iter time (s): 0.005 samples/sec: 13811.037
    loss of call 98, counted from 0: 0.3215

How the layers would split over more stages, without training: `ds-ddg partition minimal.py:layers --stages 4`
"""

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn

import ds_ddg

SEED = 0
CLASSES, WIDTH = 10, 64


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + torch.relu(self.linear(self.norm(x)))


def batches(size, seed):
    """Yield points around ten centres, and which centre each belongs to.

    The first and the last stage each draw their own copy, so all that is random comes from the seed, not the rank.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    while True:
        labels = torch.randint(CLASSES, (size,), generator=generator)
        yield 0.4 * centres[labels] + torch.randn(size, WIDTH, generator=generator), labels


def layers():
    """Return layers, a micro-batch (inputs, labels) and the loss: what there is to measure."""
    blocks = [LayerSpec(Block, 96) for _ in range(6)]
    specs = [LayerSpec(nn.Linear, WIDTH, 96), *blocks, LayerSpec(nn.Linear, 96, CLASSES)]
    return specs, next(batches(32, SEED)), nn.functional.cross_entropy


config = {
    "train_micro_batch_size_per_gpu": 32,
    "gradient_accumulation_steps": 2,  # M, micro-batches per call
    "optimizer": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}},
    "steps_per_print": 50,
}


def main():
    with ds_ddg.swap():  # inside, DeepSpeed does not compile for a minute on CPU what only inference uses
        deepspeed.init_distributed()
    torch.manual_seed(SEED)
    specs, _, loss_fn = layers()
    # The same number of blocks on each stage. ds_ddg.partition.PipelineModule(..., sample=(inputs, labels)) splits by
    # measured time; where layers cost about the same that may be another split, and so another training, each time.
    net = PipelineModule(specs, deepspeed.comm.get_world_size(), loss_fn=loss_fn, partition_method="type:Block")
    engine, _, _, _ = ds_ddg.initialize(model=net, model_parameters=net.parameters(), config=config)
    data = batches(32, SEED)
    for _ in range(100):
        loss = engine.train_batch(data)  # the newest loss known without a wait, that of call `engine.loss_step`
    if engine.global_rank == 0:
        print(f"loss of call {engine.loss_step}, counted from 0: {float(loss):.4f}")
    engine.drain()  # finish the gradients in flight


if __name__ == "__main__":
    main()
