"""What may travel between stages, and in which shapes: all of it bit for bit as in one process."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from functools import partial
from itertools import count, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import toy
from helpers.distributed import GetRanks
from helpers.modes import DEFAULT, MODE_BLOCKS
from helpers.versus import Setup, adamw, versus
from helpers.wire_layers import (
    WIDTH,
    any_length,
    every_kind,
    labelled_by_two,
    loss_of_two,
    say_so,
    sequences,
)

GRID = [
    {"stages": k, "micro_batches": 1 + (k + i) % 2, "ddg": mode}
    for k, (i, mode) in product((2, 3), enumerate(MODE_BLOCKS))
]


def grid(*more: dict[str, Any]) -> Any:
    """Every mode with two and three stages."""
    return pytest.mark.parametrize("case", [*GRID, *more], ids=lambda case: str(Setup(list, list, **case)))  # type: ignore[arg-type]


# -- kinds of tensors -------------------------------------------------------------------------------------------------


@grid({"stages": 3, "micro_batches": 2, "ddg": {**MODE_BLOCKS[0], "slack": 1}})
@pytest.mark.proves("bool, integer, complex, 0-dim and empty tensors in tuples; tuple labels", modes="case.ddg")
def test_every_kind_of_tensor(ranks: GetRanks, case: dict[str, Any]) -> None:
    """Bool, integer, complex, 0-dim, empty, and floats that need no gradient; labels in a tuple."""
    versus(ranks, Setup(every_kind, labelled_by_two, loss_fn=loss_of_two, optimizer=adamw, **case))


class Bucket(nn.Module):
    """Of floats integers: nothing that leaves here has a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.bucketize(x, torch.linspace(-1, 1, 7))


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, WIDTH)

    def forward(self, bins: Tensor) -> Tensor:
        return self.table(bins).mean(1)


def without_gradient() -> list[nn.Module]:
    torch.manual_seed(7)
    return [nn.Identity(), Bucket(), Embed(), toy.Residual(WIDTH), nn.Linear(WIDTH, 5), nn.Tanh()]


def vectors(labels: int = 5) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(3)
    for _ in count():
        yield torch.randn(4, WIDTH, generator=generator), torch.randn(4, labels, generator=generator)


@grid()
@pytest.mark.proves("activations without a gradient", modes="case.ddg")
def test_activations_without_a_gradient(ranks: GetRanks, case: dict[str, Any]) -> None:
    """With three stages the first has nothing to train and sends nothing to differentiate."""
    versus(ranks, Setup(without_gradient, vectors, **case))


class Aliases(nn.Module):
    """Passes on views of its results, one tensor twice, an input, a parameter, and a buffer that it changes.

    No gradient has three terms: in which order those are added is not settled, and rounding tells.
    """

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(40, WIDTH))
        self.register_buffer("total", torch.zeros(40, WIDTH))

    def forward(self, values: Any) -> tuple[Tensor, ...]:
        if torch.is_tensor(values):
            x, z, kept = values, values, values
        else:
            x, z, kept = values[0] + 0.1 * values[1].t(), values[2] + values[3], values[4]
            x = x + values[5].mean(0) + values[7].mean()
        self.total += 0.01
        y, z = torch.tanh(self.one(x)), torch.tanh(self.two(z))
        return y, y.t(), z, z, kept, self.scale, self.total, torch.full((1, 1), 0.1).expand(20, 20)


class Total(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 5)

    def forward(self, values: tuple[Tensor, ...]) -> Tensor:
        return self.linear(values[0] + values[2] + values[4]) + values[5].mean() + values[6].mean()


def aliases() -> list[nn.Module]:
    torch.manual_seed(7)
    return [Aliases(), Aliases(), Aliases(), Total()]


@grid({"stages": 3, "micro_batches": 1, "ddg": {**MODE_BLOCKS[2], "slack": 2}})
@pytest.mark.proves("outputs that are views, inputs or weights", modes="case.ddg")
def test_tensors_that_share_memory(ranks: GetRanks, case: dict[str, Any]) -> None:
    """What is sent may still be on its way when its weights are updated or its buffer counts on."""
    versus(ranks, Setup(aliases, vectors, **case))


class Masked(nn.Module):
    """As layers of GPT-2 are: (x, mask), the mask passed on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, mask = values
        assert mask.dtype == torch.bool
        return x + torch.tanh(self.linear(x)).masked_fill(mask, 0.0), mask


class First(nn.Module):
    def forward(self, values: tuple[Tensor, Tensor]) -> Tensor:
        return values[0]


def masked() -> list[nn.Module]:
    torch.manual_seed(7)
    return [Masked(), Masked(), Masked(), First()]


def masked_vectors() -> Iterator[Any]:
    for x, y in vectors(WIDTH):
        yield (x, x > 0), y


def claim_a_mask(engine: Any) -> None:
    engine.set_has_attention_mask(True)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.proves("DeepSpeed's attention-mask flag and class names", modes=DEFAULT)
def test_deepspeeds_attention_mask_flag_is_harmless(ranks: GetRanks, stages: int) -> None:
    versus(ranks, Setup(masked, masked_vectors, stages=stages, ready=claim_a_mask))


def train_a_class_name(rank: int, world_size: int) -> list[float]:
    from deepspeed.pipe import PipelineModule

    import ds_ddg

    losses = []
    for name in ("Other", "GPT2ModelPipe"):
        module_class = type(name, (PipelineModule,), {})
        net = module_class(masked(), num_stages=world_size, loss_fn=nn.functional.mse_loss, partition_method="uniform")
        config = toy.config(2, {}, optimizer={"type": "SGD", "params": {"lr": 0.1}})
        engine, *_ = ds_ddg.initialize(model=net, config=config, model_parameters=list(net.parameters()))
        assert engine.has_attention_mask == (name == "GPT2ModelPipe")
        data = masked_vectors()
        calls = [float(engine.train_batch(data)) for _ in range(4)]
        engine.schedule = "1f1b"  # where DeepSpeed's own trick is at work
        calls += [float(engine.train_batch(data)) for _ in range(2)]
        losses.append(calls)
        if name == "Other":
            continue
        assert losses[0][:4] == losses[1][:4]
    return losses[1]


@pytest.mark.proves("DeepSpeed's attention-mask flag and class names", modes=DEFAULT)
def test_deepspeeds_class_name_trick_still_works(ranks: GetRanks) -> None:
    """Its own schedule cannot send a bool without it."""
    first, second = ranks(2).run(train_a_class_name)
    assert first == second


# -- shapes -----------------------------------------------------------------------------------------------------------


@grid(
    {"stages": 3, "micro_batches": 1, "ddg": {**MODE_BLOCKS[0], "slack": 2}},
    {"stages": 3, "micro_batches": 4, "ddg": {**MODE_BLOCKS[2], "slack": 1}},
)
@pytest.mark.proves("dynamic_shape=True", modes="case.ddg")
def test_dynamic_shape(ranks: GetRanks, case: dict[str, Any]) -> None:
    """Another shape each micro-batch, some so small that they ride in the header; the first comes back."""
    data = partial(sequences, (33, 7, 50, 1, 33))
    versus(ranks, Setup(any_length, data, module={"dynamic_shape": True}, **case))


@grid({"stages": 3, "micro_batches": 1, "ddg": {**MODE_BLOCKS[1], "slack": 1}})
@pytest.mark.proves("reset_activation_shape() with micro-batches in flight", modes="case.ddg")
def test_shape_changes_after_a_reset(ranks: GetRanks, case: dict[str, Any]) -> None:
    """The pipeline stays full across it: micro-batches of both shapes are under way."""
    data = partial(sequences, (20, 33, 50), each=3 * case["micro_batches"])
    versus(ranks, Setup(any_length, data, before=say_so, **case))


def reset_each_time(engine: Any, call: int) -> None:
    engine.reset_activation_shape()
    if call == 4:
        loss = engine.eval_batch(sequences((17,)), num_micro_batches=3)
        assert math.isfinite(float(loss))


def test_reset_before_every_call_and_evaluate_another_shape(ranks: GetRanks) -> None:
    data = partial(sequences, (20, 33, 50))
    versus(ranks, Setup(any_length, data, stages=3, micro_batches=1, before=reset_each_time))


def unannounced(rank: int, world_size: int, dynamic: bool) -> list[str]:
    """What every rank hears, with the shape changing in call 2 and said so for call 4 only."""
    setup = Setup(any_length, list, stages=world_size, micro_batches=1, module={"dynamic_shape": dynamic})  # type: ignore[arg-type]
    engine, data, heard = setup.engine(), sequences((20, 33), each=2), []
    for call in range(6):
        if call == 2:
            engine.reset_activation_shape()
        try:
            engine.train_batch(data)
        except Exception as error:
            heard.append(f"{call} {type(error).__name__}: {error}")
            break
    return heard


def test_shape_changes_unannounced(ranks: GetRanks) -> None:
    assert ranks(3).run(unannounced, True) == [[]] * 3
    for rank, (heard,) in enumerate(ranks(3).run(unannounced, False)):
        assert heard.startswith("4 ValueError" if rank == 0 else "4 StageError"), heard
        assert "changed shape from [(3, 33, 12)] to [(5, 20, 12)]" in heard
        assert "reset_activation_shape()" in heard


def preposted_capacity(rank: int, world_size: int) -> list[int]:
    """Bytes of the receive that the last stage has posted, after each call; the longest sequences come in call 4."""
    setup = Setup(any_length, list, stages=world_size, micro_batches=1, module={"dynamic_shape": True})  # type: ignore[arg-type]
    engine, data, capacity = setup.engine(), sequences((21, 33, 9), each=4), []
    for _ in range(12):
        engine.train_batch(data)
        if engine.is_last_stage():
            capacity.append(engine._links._activations_in._capacity[0])
    engine.drain()
    return capacity


def test_preposted_receive_has_room_for_every_length(ranks: GetRanks) -> None:
    """Otherwise, where lengths change, no activation would travel while its receiver computes."""
    *_, capacity = ranks(2).run(preposted_capacity)
    assert capacity == [3 * 4 * WIDTH * length for length in [21] * 4 + [33] * 8]


def memory_of_changing_shapes(rank: int, world_size: int) -> list[tuple[int, int]]:
    """Live tensors and messages under way after 20 and after 100 calls, each of a shape of its own."""
    setup = Setup(any_length, list, stages=world_size, micro_batches=1, module={"dynamic_shape": True})  # type: ignore[arg-type]
    engine, data, seen = setup.engine(), sequences(tuple(range(20, 130))), []
    for call in range(1, 101):
        engine.train_batch(data)
        if call in (20, 100):
            gc.collect()
            seen.append((sum(torch.is_tensor(o) for o in gc.get_objects()), engine._links.pending))
    engine.drain()
    assert engine._links.pending == 0
    return seen


def test_changing_shapes_leave_nothing_behind(ranks: GetRanks) -> None:
    for stage, ((tensors, messages), (tensors_late, messages_late)) in enumerate(
        ranks(2).run(memory_of_changing_shapes)
    ):
        assert tensors_late <= tensors + 2, f"stage {stage}"
        assert abs(messages_late - messages) <= 2, f"stage {stage}"
