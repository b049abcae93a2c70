"""Models for Muon, and the oracle's optimizer: DeepSpeed's own, as it is written, on matrices."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from helpers import toy
from helpers.versus import Setup

MUON = {"muon_lr": 0.02, "adam_lr": 0.003, "momentum": 0.9, "weight_decay": 0.01, "torch_adam": True}
CONFIG = {"optimizer": {"type": "Muon", "params": MUON}}


def layers() -> list[nn.Module]:
    """Make eight layers; the second of four stages has no matrix, and the third nothing but matrices."""
    torch.manual_seed(7)
    bare = [nn.Linear(12, 12, bias=False) for _ in range(2)]
    head = [nn.Flatten(1), nn.LayerNorm(6 * 16)]
    return [
        toy.ConvBlock(3, 6),
        toy.ConvBlock(6, 6),
        *head,
        nn.Sequential(nn.Linear(6 * 16, 12, bias=False), nn.Tanh()),
        nn.Sequential(*bare),
        toy.Residual(12),
        nn.Sequential(nn.Tanh(), nn.Linear(12, 5)),
    ]


def pictures() -> Iterator[tuple[Tensor, Tensor]]:
    return toy.batches(60)


def takes(net: nn.Module) -> list[nn.Parameter]:
    """Return what Muon is to take of some layers of these tests, by another rule: by their shapes."""
    return [p for p in net.parameters() if p.dim() >= 2 and p.shape[0] not in (5, 17)]


class Oracle:
    """DeepSpeed's Muon for the matrices among `parameters`, kernels flattened, and its AdamW for the rest."""

    def __init__(self, parameters: Any, params: dict[str, Any] = MUON) -> None:
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

        parameters = [p for p in parameters if p.numel()]
        self.weights = [p for p in parameters if p.dim() >= 2 and p.shape[0] not in (5, 17)]
        rest = [p for p in parameters if not any(p is weight for weight in self.weights)]
        self.matrices = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in self.weights]
        common = {"weight_decay": params["weight_decay"]}
        muon = {"lr": params["muon_lr"], "momentum": params["momentum"]}
        nothing = nn.Parameter(torch.empty(0))
        self.inner = MuonWithAuxAdam(
            [
                {"params": self.matrices or [nothing], "use_muon": True, **muon, **common},
                {"params": rest or [nothing], "use_muon": False, "lr": params["adam_lr"], **common},
            ],
            adam_optimizer=torch.optim.AdamW,
        )
        self.parameters = parameters
        self.param_groups = self.inner.param_groups

    def step(self) -> None:
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1).clone()
        with torch.compiler.set_stance("force_eager"):
            self.inner.step()
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            weight.data.copy_(matrix.detach().view_as(weight))

    def zero_grad(self) -> None:
        for weight in self.parameters:
            weight.grad = None


def from_json(net: nn.Module, setup: Setup) -> dict[str, Any]:
    return {"model_parameters": setup.parameters(net)}


def setup_of(**more: Any) -> Setup:
    """Return a run with Muon from the config."""
    common = {"layers": layers, "batches": pictures, "loss_fn": toy.loss_fn, "config": CONFIG}
    return Setup(**{**common, "optimizer": partial(Oracle), "arguments": from_json, **more})


class Attention(nn.Module):
    """Attention with a table of positions that is a parameter of its own, and a kernel over time."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(5, 12))
        self.attend = nn.MultiheadAttention(12, 2)
        self.mix = nn.Conv1d(12, 12, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 1, groups=4)


class Words(nn.Module):
    """Words to vectors in a layer that holds an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 12)
        self.types = nn.EmbeddingBag(17, 12)

    @property
    def weight(self) -> Tensor:
        return self.table.weight


KINDS = {
    "positions": False,
    "attend.in_proj_weight": True,
    "attend.in_proj_bias": False,
    "attend.out_proj.weight": True,
    "attend.out_proj.bias": False,
    "mix.weight": False,
    "mix.bias": False,
    "depthwise.weight": False,
    "depthwise.bias": False,
}
"""The parameters of `Attention`, and whether Muon takes them."""


def many_kinds(tied: bool) -> list[Any]:
    """Return layers of a model whose output layer is followed by one without weights; `tied`: to its embedding."""
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    first = TiedLayerSpec("words", Words) if tied else LayerSpec(Words)
    last = TiedLayerSpec("words", Words, forward_fn=decode) if tied else LayerSpec(Ending)
    linear = partial(LayerSpec, nn.Linear, 12, 12)
    return [first, LayerSpec(Attention), linear(), LayerSpec(toy.Residual, 12), last, LayerSpec(nn.LogSoftmax, -1)]


class Ending(nn.Module):
    """A pooler, and the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Linear(12, 12)
        self.classes = nn.Linear(12, 5)


def decode(words: Words, x: Tensor) -> Tensor:
    return x @ words.weight.T


def flags(rank: int, world_size: int, tied: bool, asked: dict[str, bool]) -> dict[str, bool] | str:
    """Return the choice by name; `asked` has what a script sets before."""
    from deepspeed.pipe import PipelineModule

    import ds_ddg

    net = PipelineModule(many_kinds(tied), num_stages=world_size, loss_fn=toy.loss_fn, partition_method="uniform")
    for name, parameter in net.named_parameters():
        if name in asked:
            parameter.use_muon = asked[name]  # type: ignore[attr-defined]
    try:
        ds_ddg.initialize(model=net, model_parameters=net.parameters(), config=toy.config(1, {}, **CONFIG))
    except ValueError as error:
        return str(error)
    return {name: parameter.use_muon for name, parameter in net.named_parameters()}  # type: ignore[attr-defined]
