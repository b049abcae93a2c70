"""Models for Muon, and the oracle's optimizer: DeepSpeed's own, as it is written, on matrices."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from helpers import formats, resuming, toy
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
        self.inner = MuonWithAuxAdam(
            [
                {"params": self.matrices or [nn.Parameter(torch.empty(0))], "use_muon": True, **muon, **common},
                {
                    "params": rest or [nn.Parameter(torch.empty(0))],
                    "use_muon": False,
                    "lr": params["adam_lr"],
                    **common,
                },
            ],
            adam_optimizer=torch.optim.AdamW,
        )
        self.parameters = parameters
        self.param_groups = self.inner.param_groups

    def step(self) -> None:
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1).clone()
            matrix.data.copy_(weight.detach().flatten(1))  # a step around this one may have moved it
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


class InBf16(Oracle):
    """The same for bf16 weights, by way of fp32 masters."""

    def __init__(self, parameters: Any) -> None:
        self.low = [p for p in parameters if p.numel()]
        self.masters = [nn.Parameter(p.detach().float()) for p in self.low]
        super().__init__(self.masters)

    def step(self) -> None:
        self.take_gradients()
        super().step()
        self.give_weights()

    def take_gradients(self) -> None:
        """Give the gradients of the weights to the masters."""
        for weight, master in zip(self.low, self.masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()

    def give_weights(self) -> None:
        """Round the masters to the weights."""
        for weight, master in zip(self.low, self.masters, strict=True):
            weight.data.copy_(master.detach())

    def zero_grad(self) -> None:
        for weight in self.low:
            weight.grad = None


BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}}


def bf16_layers() -> list[nn.Module]:
    return [layer.bfloat16() for layer in formats.layers()]


def bf16_batches() -> Iterator[tuple[Tensor, Tensor]]:
    return formats.batches(60, torch.bfloat16)


COSINE = {
    "type": "WarmupCosineLR",
    "params": {"total_num_steps": 20, "warmup_num_steps": 3, "warmup_type": "linear", "warmup_min_ratio": 0.1},
}


def go_on(rank: int, world_size: int, directory: str, bf16: bool) -> list[Any]:
    """Compare 5 calls, save, 4 more, with another engine that starts elsewhere, loads, and does the same 4."""
    more = {"layers": bf16_layers, "batches": bf16_batches, "loss_fn": formats.loss_fn} if bf16 else {}
    config = {**CONFIG, "scheduler": COSINE, **(BF16 if bf16 else {})}
    setup = setup_of(stages=world_size, config=config, clip=0.5, **more)
    a, data = setup.engine(), setup.batches()
    resuming.train(a, data, 5)
    a.save_checkpoint(directory, client_state={"rng": torch.get_rng_state()})
    ours = resuming.train(a, data, 4)
    b = setup.engine()
    resuming.start_elsewhere(b)
    resuming.train(b, setup.batches(), 3)
    _, state = b.load_checkpoint(directory)
    torch.set_rng_state(state["rng"].cpu())
    theirs = resuming.train(b, resuming.skip(setup.batches(), 10), 4)
    a.drain()
    b.drain()
    return [(directory, ours, theirs, *({"weights": toy.state(e.module)} for e in (a, b)))]


def plain_layers() -> list[nn.Module]:
    """Make layers without random numbers of their own."""
    net = layers()
    for layer in net:
        for part in layer.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    return net


def beside(rank: int, world_size: int, ddg: dict[str, Any]) -> tuple[list[float], list[Any], list[Tensor]]:
    """Return losses, learning rates and parameters after some calls, the last with another number of micro-batches."""
    config = {**CONFIG, "scheduler": COSINE}
    engine = setup_of(layers=plain_layers, stages=world_size, ddg=ddg, config=config).engine()
    data = pictures()
    losses = [float(engine.train_batch(data)) for _ in range(4)]
    engine.set_train_batch_size(16)
    losses += [float(engine.train_batch(data)) for _ in range(3)]
    engine.drain()
    return losses, engine.get_lr(), [p.detach().clone() for p in engine.module.parameters()]


def refusals(params: dict[str, Any], more: dict[str, Any]) -> list[str]:
    """Return what is refused of a config, as an engine with two stages is."""
    from types import SimpleNamespace

    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    from ds_ddg.config import DDGConfig
    from ds_ddg.weights.muon_limits import muon_refusals

    values = {**toy.config(1, {}), "optimizer": {"type": "Muon", "params": params}, **more}
    module = SimpleNamespace(topology=lambda: PipeDataParallelTopology(num_pp=2, num_dp=1))
    found = muon_refusals(DeepSpeedConfig(values), module, DDGConfig.parse(values["ddg"]).enabled)
    return [f"{what}: {remedy}" for wrong, what, remedy in found if wrong]


def engine_muon(weight: nn.Parameter) -> Any:
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    return MuonWithAuxAdam([{"params": [weight], "use_muon": True, "lr": 0.1}])


def last_state(rank: int, world_size: int, bf16: bool) -> list[list[Any]]:
    """Return the parameters of two stages after some calls, as plain numbers.

    Replicas average in bf16, which holds the gradients of one micro-batch, but not their sum.
    """
    more: dict[str, Any] = {"clip": 0.5}
    if bf16:
        more = {"layers": bf16_layers, "batches": bf16_batches, "loss_fn": formats.loss_fn, "micro_batches": 1}
    setup = setup_of(stages=2, config={**CONFIG, **(BF16 if bf16 else {})}, **more)
    engine, data = setup.engine(), setup.batches()
    for _ in range(5):
        engine.train_batch(data)
    engine.drain()
    return [parameter.detach().flatten().tolist() for parameter in engine.module.parameters()]
