"""Setups for what a model and its config may ask for."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from helpers import toy
from helpers.modes import MODE_BLOCKS
from helpers.versus import Setup

STASH = [mode for mode in MODE_BLOCKS if mode["weights"] == "stash"]
REPLAY = {"weights": "current", "activations": "recompute"}


def checkpointing(kind: str, interval: int) -> dict[str, Any]:
    """Return the arguments of a `Setup`, each kind asked for in another place."""
    if kind == "reentrant":
        return {"module": {"activation_checkpoint_interval": interval}}
    if kind == "torch":
        function = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        return {"module": {"activation_checkpoint_interval": interval, "activation_checkpoint_func": function}}
    return {"config": {"pipeline": {"activation_checkpoint_interval": interval, "use_reentrant": False}}}


def pictures(tuples: bool) -> list[Any]:
    return toy.layers(tuples)


def from_json(net: nn.Module, setup: Setup) -> dict[str, Any]:
    return {"model_parameters": setup.parameters(net)}


JSON = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1, "torch_adam": True}}}
