"""What a study trains: a model as a list of layers, with its loss, data and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Problem"]


@dataclass(frozen=True)
class Problem:
    """One training, whose delay the study varies; made anew for each run, from its seed.

    Every run of a seed should start from the same weights and see the same data in the same order.
    """

    layers: Sequence[nn.Module]
    """The layers of the model, in order; a pipeline could cut between any two."""
    loss_fn: Callable[[Any, Any], Tensor]
    """``loss_fn(outputs, labels)`` to a scalar, a mean over the micro-batch."""
    batches: Callable[[int], Iterator[tuple[Any, Any]]]
    """``batches(M)`` yields micro-batches ``(inputs, labels)``; M of them make a call. For runs of different M to be
    comparable, they should be parts of the same batches."""
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    """``optimizer(model)`` makes the optimizer of the model that the layers make up."""
    calls: int
    """The number of updates to train for."""
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    """``scheduler(optimizer)`` makes a scheduler, which is stepped once per call; None: a constant learning rate."""
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None
    """``evaluate(model)`` measures the trained model, which is in evaluation mode; None: the training loss alone."""
    clip: float = 0.0
    """The largest norm of a stage's gradients, as ``gradient_clipping`` in a DeepSpeed config; 0 for any."""
