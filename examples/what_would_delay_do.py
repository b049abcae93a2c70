"""What would delayed gradients do to my model? Train it with several delays, in one process.

    python what_would_delay_do.py

No launcher, no pipeline, no GPU: `ds_ddg.reference` computes, from the equation of the paper, the updates that K
stages with M micro-batches per call would make; the engine equals it to the last bit (fp32 on CPU). Put your own
layers, data and optimizer in place of those below. `what_would_delay_do.ipynb` has the same cells.
"""

# %%
import math

import torch
from torch import nn

from ds_ddg.reference import Reference
from ds_ddg.schedules.ddg import DDGPlan

SEED = 0
STAGES = (1, 2, 4, 8)  # K; with one stage there is no delay
MICRO_BATCHES = (1, 2, 4)  # M
LEARNING_RATES = (0.02, 0.05)
CALLS = 200  # updates; the table has the mean loss of the last tenth
SETTINGS = {"slack": 0, "weights": "stash", "activations": "keep"}  # as in the "ddg" block of a config


# %% [markdown]
# Your model, as a list of layers that a pipeline could cut between any two, with its data, loss and optimizer.


# %%
class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + torch.relu(self.linear(self.norm(x)))


def layers():
    return [nn.Linear(64, 96), *(Block(96) for _ in range(6)), nn.Linear(96, 10)]


def batches():
    """Yield micro-batches (inputs, labels): points around ten centres, and which centre each belongs to."""
    generator = torch.Generator().manual_seed(SEED)
    centres = torch.randn(10, 64, generator=generator)
    while True:
        labels = torch.randint(10, (32,), generator=generator)
        yield 0.4 * centres[labels] + torch.randn(32, 64, generator=generator), labels


loss_fn = nn.functional.cross_entropy


def optimizer(parameters, learning_rate):
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9)


# %% [markdown]
# The loop: what `engine.train_batch` does on K stages, one call after the other. All runs start from the same weights
# and see the same data.


# %%
def train(num_stages, micro_batches, learning_rate):
    """Return the losses of all calls with the delay of `num_stages` stages."""
    torch.manual_seed(SEED)
    model = layers()
    cuts = [round(k * len(model) / num_stages) for k in range(num_stages + 1)]
    stages = [nn.Sequential(*model[cuts[k] : cuts[k + 1]]) for k in range(num_stages)]
    optimizers = [optimizer(stage.parameters(), learning_rate) for stage in stages]
    reference = Reference(stages, loss_fn, optimizers, micro_batches=micro_batches, **SETTINGS)
    data = batches()
    return [float(reference.train_batch(data)) for _ in range(CALLS)]


def final(losses):
    """Return the mean loss of the last tenth as text, or that there is none."""
    loss = sum(losses[-len(losses) // 10 :]) / (len(losses) // 10)
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


# %% [markdown]
# Compare along a line, where only the delay differs; "old" is by how many updates the first stage's gradients are old.
# If the loss goes up to the right: raise M, then lower the learning rate.

# %%
for learning_rate in LEARNING_RATES:
    print(f"\nlearning rate {learning_rate}" + "".join(f"{f'K = {k}':>20}" for k in STAGES))
    for micro_batches in MICRO_BATCHES:
        line = f"M = {micro_batches}".ljust(len(f"learning rate {learning_rate}"))
        for num_stages in STAGES:
            old = DDGPlan(num_stages, micro_batches, SETTINGS["slack"]).staleness(0)
            line += f"{final(train(num_stages, micro_batches, learning_rate))} ({old} old)".rjust(20)
        print(line, flush=True)
