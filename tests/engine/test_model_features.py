"""What models and scripts use of DeepSpeed besides layers and an optimizer: bit for bit as in one process.

checkpointing   activations that are computed again inside the backward pass
frozen          parameters, layers and whole stages that do not train
optimizers      groups, objects, late ones
scripts         the setters and loaders of the engine, losses from layers, compiled layers
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import toy
from helpers.distributed import GetRanks
from helpers.model_features import JSON, REPLAY, STASH, checkpointing, from_json, pictures
from helpers.modes import DEFAULT, MODE_BLOCKS
from helpers.versus import Made, Setup, adamw, gaps, run_engine, run_oracle, sgd, trainable, versus

WIDTH = 12


def images() -> Iterator[Any]:
    return toy.batches(1000)


def vectors() -> Iterator[Any]:
    generator = torch.Generator().manual_seed(3)
    for _ in count():
        yield torch.randn(4, WIDTH, generator=generator), torch.randn(4, 5, generator=generator)


# -- checkpointing ----------------------------------------------------------------------------------------------------

KINDS = ["reentrant", "not reentrant", "torch"]


CHECKPOINTED = [
    # stages, micro-batches, kind, interval, settings, tuples
    (2, 1, "reentrant", 1, STASH[0], False),
    (2, 2, "reentrant", 2, STASH[1], False),
    (2, 2, "not reentrant", 1, STASH[0], True),
    (2, 1, "not reentrant", 3, STASH[1], False),
    (2, 1, "reentrant", 1, REPLAY, False),
    (2, 2, "torch", 1, STASH[0], False),
    (3, 2, "reentrant", 1, STASH[0], False),
    (3, 1, "reentrant", 1, STASH[1], False),
    (3, 1, "not reentrant", 1, STASH[0], False),
    (3, 2, "not reentrant", 2, STASH[1], True),
    (3, 1, "not reentrant", 1, REPLAY, True),
    (3, 2, "reentrant", 2, REPLAY, False),
    (3, 1, "reentrant", 1, {**STASH[0], "slack": 1}, False),
    (3, 1, "torch", 2, STASH[1], True),
]


@pytest.mark.parametrize(("stages", "micro_batches", "kind", "interval", "ddg", "tuples"), CHECKPOINTED)
@pytest.mark.proves("activation checkpointing, reentrant and not", modes="ddg")
def test_checkpointing_changes_no_number(
    ranks: GetRanks, stages: int, micro_batches: int, kind: str, interval: int, ddg: dict[str, Any], tuples: bool
) -> None:
    """Weights and dropout are those of the forward, and BatchNorm counts a micro-batch once."""
    layers = partial(pictures, tuples)
    common = {"stages": stages, "micro_batches": micro_batches, "loss_fn": toy.loss_fn, "optimizer": adamw}
    versus(ranks, Setup(layers, images, ddg=ddg, **common, **checkpointing(kind, interval)))  # type: ignore[arg-type]


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, values: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, scale, mask = (values, torch.full((WIDTH,), 0.5), values > 0) if torch.is_tensor(values) else values
        return x * scale + torch.tanh(self.linear(x)).masked_fill(mask, 0.0), scale, mask


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 5)

    def forward(self, values: tuple[Tensor, ...]) -> Tensor:
        return self.linear(values[0])


def masked() -> list[nn.Module]:
    """A gradient of more than two terms would be added up in another order by reentrant checkpointing anywhere."""
    torch.manual_seed(7)
    return [Masked(), Masked(), Masked(), Masked(), First()]


@pytest.mark.parametrize("mode", [*STASH, REPLAY], ids=str)
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.proves("activation checkpointing, reentrant and not", modes="mode")
def test_reentrant_checkpointing_of_tuples(ranks: GetRanks, stages: int, mode: dict[str, Any]) -> None:
    versus(ranks, Setup(masked, vectors, stages=stages, ddg=mode, module={"activation_checkpoint_interval": 1}))


class Embed(nn.Module):
    def __init__(self, train: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(9, WIDTH).requires_grad_(train)

    def forward(self, words: Tensor) -> Tensor:
        return self.table(words).mean(1)


def language(train: bool) -> list[nn.Module]:
    torch.manual_seed(7)
    return [Embed(train), *(toy.Residual(WIDTH) for _ in range(3)), nn.Linear(WIDTH, 5), nn.Tanh()]


def words() -> Iterator[Any]:
    generator = torch.Generator().manual_seed(3)
    for _ in count():
        yield torch.randint(9, (4, 6), generator=generator), torch.randn(4, 5, generator=generator)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("mode", STASH, ids=str)
@pytest.mark.parametrize("stages", [2, 3])
def test_reentrant_checkpointing_cuts_nothing_off(
    ranks: GetRanks, stages: int, mode: dict[str, Any], train: bool
) -> None:
    """Plain DeepSpeed would silently not train an embedding, nor what follows a frozen one."""
    module = {"activation_checkpoint_interval": 1}
    setup = Setup(partial(language, train), words, stages=stages, micro_batches=1, ddg=mode, module=module)
    versus(ranks, setup)


def train_with_seeded_layers(rank: int, world_size: int, ddg: dict[str, Any]) -> Made:
    module = {"seed_layers": True, "activation_checkpoint_interval": 0}
    layers = partial(pictures, False)
    return run_engine(
        rank, world_size, Setup(layers, images, stages=world_size, loss_fn=toy.loss_fn, ddg=ddg, module=module)
    )


def test_recompute_draws_the_numbers_of_seeded_layers_again(ranks: GetRanks) -> None:
    kept, again = (ranks(3).run(train_with_seeded_layers, mode) for mode in STASH)
    for stage, (one, other) in enumerate(zip(kept, again, strict=True)):
        assert not gaps(one, other), f"stage {stage}"


def refusal(rank: int, world_size: int, setup: Setup) -> str:
    from deepspeed.runtime.activation_checkpointing import checkpointing as state

    before = state.PARTITION_ACTIVATIONS
    try:
        setup.engine()
    except ValueError as error:
        return str(error)
    finally:
        state.PARTITION_ACTIVATIONS = before
    return ""


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"ddg": {"weights": "current"}}, ['"current"', '"keep"', "recompute"]),
        ({"config": {"activation_checkpointing": {"contiguous_memory_optimization": True}}}, ["contiguous_memory"]),
        ({"config": {"activation_checkpointing": {"partition_activations": True}}}, ["partition_activations"]),
        ({"config": {"activation_checkpointing": {"cpu_checkpointing": True}}}, ["cpu_checkpointing", "false"]),
    ],
    ids=["current and keep", "contiguous", "partitioned", "on cpu"],
)
@pytest.mark.refuses("activation checkpointing with contiguous, partitioned or CPU buffers", "those settings at false")
def test_refuses_checkpointing_that_cannot_be_exact(ranks: GetRanks, more: dict[str, Any], parts: list[str]) -> None:
    module = {"activation_checkpoint_interval": 1}
    for heard in ranks(2).run(refusal, Setup(partial(pictures, False), images, module=module, **more)):
        assert "activation checkpointing with" in heard
        for part in parts:
            assert part in heard


# -- frozen -----------------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen linear layer with a small trainable one beside it, as LoRA has them."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + self.up(self.down(x)))


def frozen_in(stages: int, frozen: int) -> list[nn.Module]:
    """Two layers a stage; one stage has nothing to train."""
    torch.manual_seed(7)
    net: list[nn.Module] = [toy.Residual(WIDTH) for _ in range(2 * stages - 1)] + [nn.Linear(WIDTH, 5)]
    for layer in net[2 * frozen : 2 * frozen + 2]:
        layer.requires_grad_(False)
    return net


def adapted() -> list[nn.Module]:
    torch.manual_seed(7)
    ends = nn.Linear(WIDTH, WIDTH).requires_grad_(False), nn.Linear(WIDTH, 5).requires_grad_(False)
    return [ends[0], *(Adapted() for _ in range(4)), ends[1]]


FROZEN = [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]


@pytest.mark.parametrize(
    ("stages", "frozen", "mode"), [(k, f, MODE_BLOCKS[(k + f + i) % 4]) for k, f in FROZEN for i in (0, 1)]
)
@pytest.mark.proves("a frozen stage", modes="mode")
def test_stage_without_anything_to_train(ranks: GetRanks, stages: int, frozen: int, mode: dict[str, Any]) -> None:
    """First, in the middle or last; it clips and steps nothing, and passes gradients on."""
    layers = partial(frozen_in, stages, frozen)
    optimizer = (sgd, adamw)[frozen % 2]
    versus(ranks, Setup(layers, vectors, stages=stages, ddg=mode, optimizer=optimizer, clip=0.1))


@pytest.mark.parametrize("stages, mode", [(2 + i % 2, mode) for i, mode in enumerate([*MODE_BLOCKS, *STASH])])  # noqa: PT006
@pytest.mark.proves("LoRA-style adapters beside a frozen base", modes="mode")
def test_adapters_beside_a_frozen_base(ranks: GetRanks, stages: int, mode: dict[str, Any]) -> None:
    versus(ranks, Setup(adapted, vectors, stages=stages, micro_batches=1, ddg=mode, optimizer=adamw, clip=0.5))


def learning_rates(rank: int, world_size: int) -> list[Any]:
    """Of a frozen first stage: callers ask rank 0 for the learning rate."""
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 4}}
    json = {"optimizer": {"type": "SGD", "params": {"lr": 0.05}}, "scheduler": scheduler}
    setup = Setup(partial(frozen_in, world_size, 0), vectors, stages=world_size, config=json, arguments=from_json)
    engine, data = setup.engine(), vectors()
    return [(float(engine.train_batch(data)) > 0, tuple(engine.get_lr()))[1] for _ in range(4)]


def test_frozen_stage_has_a_learning_rate(ranks: GetRanks) -> None:
    first, second = ranks(2).run(learning_rates)
    assert first == second
    assert len(set(first)) == 4


# -- optimizers -------------------------------------------------------------------------------------------------------


def groups(module: nn.Module) -> list[dict[str, Any]]:
    """Weights decay, all else does not and learns faster; a stage may have no parameter of one kind."""
    matrices = [p for p in module.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in module.parameters() if p.requires_grad and p.dim() <= 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "lr": 0.03, "weight_decay": 0.0}]


def as_object(net: nn.Module, setup: Setup) -> dict[str, Any]:
    return {"optimizer": setup.optimizer(setup.parameters(net))}


def nothing_yet(net: nn.Module, setup: Setup) -> dict[str, Any]:
    return {"model_parameters": setup.parameters(net)}


def configure_late(engine: Any) -> None:
    """As some projects do that look at the engine first."""
    assert engine.optimizer is None
    engine._configure_optimizer(adamw, groups(engine.module))


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "callable": {},
    "object": {"arguments": as_object},
    "json": {"arguments": from_json, "config": JSON},
    "late": {"arguments": nothing_yet, "ready": configure_late},
}


@pytest.mark.parametrize("mode", [STASH[0], MODE_BLOCKS[2]], ids=str)
@pytest.mark.parametrize("given", OPTIMIZERS)
@pytest.mark.proves("parameter groups; client, callable, JSON and late optimizers", modes="mode")
def test_parameter_groups(ranks: GetRanks, given: str, mode: dict[str, Any]) -> None:
    setup = Setup(partial(pictures, False), images, loss_fn=toy.loss_fn, optimizer=adamw, parameters=groups, ddg=mode)
    versus(ranks, replace(setup, stages=2 + (given in ("object", "late")), **OPTIMIZERS[given]))


def another_optimizer(engine: Any, call: int) -> None:
    if call == 5:
        engine._configure_optimizer(sgd, trainable(engine.module))


def oracles_other_optimizer(oracle: Any, call: int) -> None:
    if call == 5:
        oracle.drain()
        oracle.optimizers = [sgd(trainable(stage)) for stage in oracle.stages]


def test_another_optimizer_in_the_middle(ranks: GetRanks) -> None:
    """What is in flight is finished by the optimizer before."""
    changes = {"before": another_optimizer, "oracle_before": oracles_other_optimizer}
    setup = Setup(partial(pictures, False), images, stages=3, loss_fn=toy.loss_fn, optimizer=adamw, **changes)  # type: ignore[arg-type]
    versus(ranks, setup)


# -- scripts ----------------------------------------------------------------------------------------------------------


class WithLabels(nn.Module):
    """A layer that carries the labels along."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.layer(values[0]), values[1]


class Loss(nn.Module):
    def forward(self, values: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(*values)


def own_loss() -> list[nn.Module]:
    return [*map(WithLabels, toy.layers()), Loss()]


def images_with_labels() -> Iterator[Any]:
    for x, y in images():
        yield ((x, y),)


@pytest.mark.parametrize("stages, mode", [(2 + i % 2, mode) for i, mode in enumerate(MODE_BLOCKS)])  # noqa: PT006
@pytest.mark.proves("loss_fn=None", modes="mode")
def test_last_layer_returns_the_loss(ranks: GetRanks, stages: int, mode: dict[str, Any]) -> None:
    versus(ranks, Setup(own_loss, images_with_labels, stages=stages, loss_fn=None, ddg=mode))


def in_a_dict() -> Iterator[Any]:
    for x, y in images():
        yield {"pixels": x * 2.0, "class": y}


def unpack(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return batch["pixels"] / 2.0, batch["class"]


class Pull:
    """An engine that is never given an iterator."""

    def __init__(self, engine: Any, set_data: str) -> None:
        engine.set_batch_fn(unpack)
        self.engine, self.set_data, self.drain = engine, set_data, engine.drain

    @property
    def loss_step(self) -> int:
        return int(self.engine.loss_step)

    def train_batch(self, data: Iterator[Any]) -> Tensor:
        if self.engine.data_iterator is None and (self.engine.is_first_stage() or self.engine.is_last_stage()):
            getattr(self.engine, self.set_data)(data)
        loss: Tensor = self.engine.train_batch()
        return loss


def train_without_an_argument(rank: int, world_size: int, setup: Setup, set_data: str) -> Made:
    from helpers.versus import run

    engine = setup.engine()
    return run(Pull(engine, set_data), setup, in_a_dict(), [engine.module], setup.before)[0]


@pytest.mark.parametrize("set_data", ["set_dataloader", "set_dataiterator"])
@pytest.mark.proves("set_dataloader, set_dataiterator, set_batch_fn", modes=DEFAULT)
def test_data_through_the_setters(ranks: GetRanks, set_data: str) -> None:
    setup = Setup(partial(pictures, False), images, stages=3, loss_fn=toy.loss_fn)
    by_rank = ranks(3).run(train_without_an_argument, setup, set_data)
    for stage, (ours, its) in enumerate(zip(by_rank, run_oracle(setup), strict=True)):
        assert not gaps(ours, its), f"stage {stage}"


def other_batch_size(engine: Any, call: int) -> None:
    if call in (3, 7):
        engine.set_train_batch_size({3: 12, 7: 4}[call])


def oracles_other_batch_size(oracle: Any, call: int) -> None:
    if call in (3, 7):
        oracle.drain()
        oracle.micro_batches = {3: 3, 7: 1}[call]


@pytest.mark.parametrize("stages, mode", [(3, STASH[0]), (3, MODE_BLOCKS[3]), (2, MODE_BLOCKS[2])])  # noqa: PT006
@pytest.mark.proves("set_train_batch_size", modes="mode")
def test_another_number_of_micro_batches(ranks: GetRanks, stages: int, mode: dict[str, Any]) -> None:
    changes = {"before": other_batch_size, "oracle_before": oracles_other_batch_size}
    setup = Setup(partial(pictures, False), images, stages=stages, loss_fn=toy.loss_fn, ddg=mode, **changes)  # type: ignore[arg-type]
    versus(ranks, setup)


def compile_engine(engine: Any, backend: str) -> None:
    engine.compile(backend=backend)
    assert engine.is_compiled


def compile_layers(engine: Any, backend: str) -> None:
    engine.module.compile(backend=backend)


def small() -> list[nn.Module]:
    torch.manual_seed(7)
    return [nn.Linear(WIDTH, WIDTH), toy.Residual(WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 5)]


@pytest.mark.parametrize("mode", MODE_BLOCKS, ids=str)
@pytest.mark.parametrize(("compiled", "backend"), [(compile_engine, "aot_eager"), (compile_layers, "eager")])
@pytest.mark.proves("engine.compile, module.compile", modes="mode")
def test_compiled_layers(ranks: GetRanks, compiled: Any, backend: str, mode: dict[str, Any]) -> None:
    """Whatever a compiled layer saves or remembers of its weights, it is differentiated at those it saw."""
    setup = Setup(small, vectors, stages=2, micro_batches=1, ddg=mode, ready=partial(compiled, backend=backend))
    versus(ranks, setup, timeout=240)
