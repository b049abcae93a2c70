"""Weights tied across stages, against the oracle in which they are one parameter."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_ddg.reference import Reference
from helpers import toy
from helpers.distributed import GetRanks
from helpers.formats import FORMATS, fp16_allowed, made_for, proving
from helpers.modes import DEFAULT, MODES
from helpers.tied_runs import (
    CALLS,
    REFILL,
    WIDTH,
    WORDS,
    Embed,
    Use,
    assert_exact,
    batches,
    blocks,
    decode,
    loss_fn,
    sorted_states,
    specs,
    train_engine,
    train_oracle,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.proves("weights tied across stages", modes=("weights", "activations"))
@pytest.mark.parametrize(("weights", "activations"), MODES)
@pytest.mark.parametrize(("stages", "micro_batches", "slack"), [(2, 1, 0), (3, 2, 0), (3, 1, 1), (4, 4, 0)])
def test_equals_the_oracle(
    ranks: GetRanks, stages: int, micro_batches: int, slack: int, weights: str, activations: str
) -> None:
    ddg = {"weights": weights, "activations": activations, "slack": slack}
    optimizer = "adamw" if stages == 3 else "sgd"
    setting = {"three": False, "micro_batches": micro_batches, "ddg": ddg, "optimizer": optimizer}
    got = ranks(stages).run(train_engine, setting, stages, {})
    assert_exact(got, setting, stages)
    assert [result.in_optimizer for result in got] == [1] + [0] * (stages - 1), "the owner's alone"


@pytest.mark.proves("weights tied across three stages", modes=DEFAULT)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_three_holders(ranks: GetRanks, micro_batches: int) -> None:
    setting = {"three": True, "micro_batches": micro_batches, "ddg": {}, "optimizer": "adamw"}
    got = ranks(3).run(train_engine, setting, 3, {})
    assert [bool(result.copies) for result in got] == [True, True, True]
    assert_exact(got, setting, 3)


@pytest.mark.proves("weights tied across stages, data x pipeline", modes=DEFAULT)
def test_replicas(ranks: GetRanks) -> None:
    """Both have the same data and random numbers, so their mean is exactly that of one."""
    setting = {"three": False, "micro_batches": 2, "ddg": {}, "optimizer": "adamw"}
    got = ranks(4).run(train_engine, setting, 2, {})
    for replica in (got[::2], got[1::2]):
        assert_exact(replica, setting, 2)


CLIPS = [
    pytest.param("stage", marks=pytest.mark.proves("weights tied across stages, clipped", modes=DEFAULT, exact=False)),
    pytest.param(
        "global", marks=pytest.mark.proves('weights tied across stages, "clip": "global"', modes=DEFAULT, exact=False)
    ),
]


@pytest.mark.parametrize("clip_by", CLIPS)
def test_clip_counts_the_whole_gradient_at_its_owner(ranks: GetRanks, clip_by: str) -> None:
    """Equal to rounding: the norm adds up the parameters in another order."""
    setting = {"three": False, "micro_batches": 2, "ddg": {"clip": clip_by}, "optimizer": "sgd", "clip": 0.05}
    got = ranks(3).run(train_engine, setting, 3, {"gradient_clipping": 0.05})
    losses, _, copies = train_oracle(setting, 3)
    other = {"stage": "global", "global": "stage"}[clip_by]
    for wrong in ({"clip": 0.0}, {"ddg": {"clip": other}}):
        assert not torch.allclose(copies[-1], train_oracle({**setting, **wrong}, 3)[2][-1], rtol=1e-3)
    torch.testing.assert_close(got[0].losses, losses)
    for result in (got[0], got[2]):
        torch.testing.assert_close(result.copies, copies, rtol=1e-6, atol=1e-7)


def test_evaluation_in_between_changes_nothing(ranks: GetRanks) -> None:
    setting = {"three": False, "micro_batches": 2, "ddg": {}, "optimizer": "sgd", "evaluate": True}
    got = ranks(3).run(train_engine, setting, 3, {})
    assert len({result.evaluated[0] for result in got}) == 1
    assert_exact(got, setting, 3)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.proves(f"weights tied, {n}", modes=DEFAULT)) for n in FORMATS]
)
def test_copies_are_equal_in_every_format(ranks: GetRanks, name: str) -> None:
    """Where the optimizer owns the weights too, the holder's copy is the owner's weight to the bit, at every call."""
    setting = {"three": True, "micro_batches": 2, "ddg": {}, "optimizer": "sgd"}
    got = ranks(3).run(train_engine, setting, 3, {}, name)
    owner, *holders = (result.copies for result in got)
    assert len(owner) == CALLS + REFILL
    assert sum(not torch.equal(a, b) for a, b in itertools.pairwise(owner)) >= CALLS - 3, "it hardly moved"
    for copies in holders:
        assert all(map(torch.equal, copies, owner))
    assert [result.across for result in got] == [0, 0, 0]


def resume(rank: int, world_size: int, directory: str) -> list[tuple[list[float], list[Tensor]]]:
    """What four calls after a checkpoint come to: going on, and with another engine that loads it."""
    from deepspeed.pipe import PipelineModule

    import ds_ddg

    def engine() -> Any:
        net = PipelineModule(specs(three=False), num_stages=world_size, loss_fn=loss_fn, partition_method="uniform")
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        config = {"model": net, "config": toy.config(2, {}), "optimizer": toy.OPTIMIZERS["adamw"]}
        return ds_ddg.initialize(**config, model_parameters=list(net.parameters()))[0]

    def four_calls(engine: Any) -> tuple[list[float], list[Tensor]]:
        data = batches(30)
        for _ in range(10):
            next(data)
        losses = [engine.train_batch(data).item() for _ in range(4)]
        engine.drain()
        return losses, toy.state(engine.module)

    one, other = engine(), engine()
    data = batches(10)
    for _ in range(5):
        one.train_batch(data)
    one.save_checkpoint(directory)
    other.train_batch(batches(9))
    other.load_checkpoint(directory)
    return [four_calls(one), four_calls(other)]


@pytest.mark.proves("weights tied, resumed from a checkpoint", modes=DEFAULT)
def test_training_resumes_from_a_checkpoint(ranks: GetRanks, tmp_path: Path) -> None:
    """With the bias of the decoder, which is the last stage's own and which DeepSpeed does not save."""
    for one, other in ranks(2).run(resume, str(tmp_path)):
        assert one[0] == other[0]
        assert all(map(torch.equal, one[1], other[1]))


def project(module: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.linear(x, module.weight)


def saved_by_one(rank: int, world_size: int, directory: str, given: tuple[bool, str]) -> tuple[list[Tensor], Any]:
    """One engine trains and saves, the other loads and goes on: its weights, and its state of the tied one."""
    import deepspeed
    from deepspeed.pipe import PipelineModule, TiedLayerSpec

    import ds_ddg

    ours_first, optimizer = given

    def engine(ours: bool) -> Any:
        # Without a bias of the decoder's own, which DeepSpeed does not save.
        ends = [TiedLayerSpec("embed", Plain, forward_fn=use) for use in (None, project)]
        net = PipelineModule(
            [ends[0], *blocks(), ends[1]], num_stages=world_size, loss_fn=loss_fn, partition_method="uniform"
        )
        initialize = ds_ddg.initialize if ours else deepspeed.initialize
        made, *_ = initialize(
            model=net,
            config=toy.config(1, {} if ours else None),
            optimizer=toy.OPTIMIZERS[optimizer],
            model_parameters=list(net.parameters()),
        )
        torch.manual_seed(11)
        return made

    first, second = engine(ours_first), engine(not ours_first)
    data = batches(9)
    torch.manual_seed(11)
    for _ in range(5):
        first.train_batch(data)
    first.save_checkpoint(directory)
    in_optimizer = [sum(len(group["params"]) for group in e.optimizer.param_groups) for e in (first, second)]
    second.train_batch(batches(1))
    second.load_checkpoint(directory)
    assert [sum(len(group["params"]) for group in e.optimizer.param_groups) for e in (first, second)] == in_optimizer
    torch.manual_seed(5)
    for _ in range(4):
        second.train_batch(data)
    if not ours_first:
        second.drain()
    tied = [m.weight for m in second.module.tied_modules.values()]
    return toy.state(second.module), [dict(second.optimizer.state[p]) for p in tied if p in second.optimizer.state]


class Plain(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(WORDS, WIDTH, _weight=Embed().weight.data)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.proves("weights tied, checkpoints to DeepSpeed's engine and back", modes=DEFAULT)
def test_checkpoints_go_to_deepspeed_and_back(
    ranks: GetRanks, tmp_path: Path, ours_first: bool, optimizer: str
) -> None:
    """As the oracle, whose delays come or go where the engines change."""
    first, last = Plain(), Plain()
    last.weight = first.weight
    net: list[nn.Module] = [first, *blocks(), Use(last, project)]
    modules = [nn.Sequential(*net[a:b]) for a, b in ((0, 3), (3, 6), (6, 8))]
    owned = [list(modules[0].parameters()), list(modules[1].parameters()), list(net[6].parameters())]
    torch.manual_seed(11)
    oracle = Reference(modules, loss_fn, [toy.OPTIMIZERS[optimizer](own) for own in owned])
    delays = {True: oracle.delays, False: [0, 0, 0]}
    data = batches(9)
    oracle.delays = delays[ours_first]
    for _ in range(5):
        oracle.train_batch(data)
    oracle.drain()
    oracle.delays = delays[not ours_first]
    torch.manual_seed(5)
    oracle.rng = [torch.get_rng_state() for _ in modules]
    for _ in range(4):
        oracle.train_batch(data)
    oracle.drain()
    got = ranks(3).run(saved_by_one, str(tmp_path), (ours_first, optimizer))
    for (states, _), module in zip(got, modules, strict=True):
        for a, b in zip(sorted_states(states), sorted_states(toy.state(module)), strict=True):
            assert torch.equal(a, b), float((a - b).abs().max())
    owners, _, holders = (state for _, state in got)
    assert len(owners) == 1
    if ours_first:
        for name, value in owners[0].items():
            assert torch.equal(torch.as_tensor(holders[0][name]), torch.as_tensor(value)), name
    else:
        assert not holders


@fp16_allowed()
def train_head_alone(rank: int, world_size: int, name: str) -> tuple[list[float], bool, list[float]]:
    """The last stage has nothing but the tied decoder: losses, whether the copies are equal, learning rates."""
    make, more = toy.OPTIMIZERS["sgd"], {}
    if name:
        make, more = made_for(name, make), FORMATS[name].config
    from deepspeed.pipe import PipelineModule, TiedLayerSpec

    import ds_ddg

    ends = [TiedLayerSpec("embed", nn.Embedding, WORDS, WIDTH, forward_fn=use) for use in (None, project)]
    net = PipelineModule(
        [ends[0], toy.Residual(WIDTH), ends[1]],
        num_stages=2,
        loss_fn=loss_fn,
        partition_method="type:embedding|residual",
    )
    net_parts = list(net.parts)
    assert net_parts[1] == 2, net_parts
    engine, *_ = ds_ddg.initialize(
        model=net,
        config=toy.config(1, {}, scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}, **more),
        optimizer=make,
        model_parameters=list(net.parameters()),
    )
    data = itertools.cycle(list(batches(2)))
    losses, rates = [], []
    for _ in range(12):
        losses.append(engine.train_batch(data).item())
        rates.append(engine.get_lr()[0])
    engine.drain()
    weight = net.tied_modules["embed"].weight.detach().float()
    both = [torch.empty_like(weight) for _ in range(2)]
    torch.distributed.all_gather(both, weight)
    return losses, torch.equal(*both), rates


def assert_head_alone(results: list[Any]) -> list[float]:
    (losses, equal, rates), other = results
    assert other == (losses, equal, rates)
    assert equal
    assert losses[-1] < losses[0]
    assert len(set(rates)) > 5
    return losses


def test_stage_with_nothing_but_a_tied_weight(ranks: GetRanks) -> None:
    plain, zero_1 = (ranks(2).run(train_head_alone, name) for name in ("", "fp32, ZeRO-1"))
    assert assert_head_alone(plain) == assert_head_alone(zero_1)


@pytest.mark.parametrize("name", proving(DEFAULT, ", a stage with nothing but a tied weight", exact=False))
def test_wrapped_stage_with_nothing_but_a_tied_weight(ranks: GetRanks, name: str) -> None:
    """DeepSpeed's wrappers would fail there without a gradient."""
    assert_head_alone(ranks(2).run(train_head_alone, name))


def by_shape(parameters: Any) -> torch.optim.Optimizer:
    """Groups as for weight decay: on the last stage the first one holds the tied weight alone."""
    words, others = ([p for p in parameters if (p.shape == (WORDS, WIDTH)) == tied] for tied in (True, False))
    groups = [{"params": group} for group in (words, others) if group]
    return torch.optim.SGD(groups, lr=0.01, momentum=0.9)


def one_group(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


@pytest.mark.parametrize("name", FORMATS)
def test_parameter_group_of_a_tied_weight_alone(ranks: GetRanks, name: str) -> None:
    """Its stage has something to train, but that group is empty there; how parameters are grouped changes nothing."""
    setting = {"three": False, "micro_batches": 2, "ddg": {}}
    grouped, plain = (
        ranks(2).run(train_engine, {**setting, "optimizer": optimizer}, 2, {}, name)
        for optimizer in (by_shape, one_group)
    )
    for a, b in zip(grouped, plain, strict=True):
        assert a.losses == b.losses
        assert all(map(torch.equal, a.states, b.states))


@fp16_allowed()
def switch(rank: int, world_size: int, name: str, three: bool) -> tuple[list[float], list[Tensor]]:
    """Losses and, where there is one, the tied weight after calls of DeepSpeed's schedule, delayed ones, and again."""
    from deepspeed.pipe import PipelineModule

    import ds_ddg

    net = PipelineModule(specs(three), num_stages=world_size, loss_fn=loss_fn, partition_method="uniform")
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    engine, *_ = ds_ddg.initialize(
        model=net,
        config=toy.config(2, {"sync_steps": 4}, **(FORMATS[name].config if name else {})),
        optimizer=one_group_fast,
        model_parameters=list(net.parameters()),
    )
    data = batches(22)
    losses, copies = [], []
    for call in range(11):
        if call == 8:
            engine.schedule = "1f1b"
        losses.append(engine.train_batch(data).item())
        if "embed" in net.tied_modules:
            copies.append(net.tied_modules["embed"].weight.detach().clone())
    return losses, copies


def one_group_fast(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.mark.proves("1F1B between delayed calls, weights tied, bf16 or ZeRO-1", exact=False, modes=DEFAULT)
@pytest.mark.parametrize("three", [False, True])
def test_switches_schedules_with_wrapped_optimizers(ranks: GetRanks, three: bool) -> None:
    """Unwrapped, the arithmetic is all DeepSpeed's; wrapped, it must be the same, to the rounding of the format."""
    plain = ranks(3).run(switch, "", three)
    for name, fine in (
        ("fp32, ZeRO-1", 0.0),
        ("bf16", 0.02),
        ("bf16, ZeRO-1", 0.02),
        ("bf16, ZeRO-1, fp32 sums", 0.02),
    ):
        got = ranks(3).run(switch, name, three)
        for (losses, copies), (expected, weights) in zip(got, plain, strict=True):
            assert losses == pytest.approx(expected, rel=fine, abs=0.0), name
            assert len(copies) == len(weights)
            for copy, owned, weight in zip(copies, got[0][1] if copies else [], weights, strict=True):
                assert torch.equal(copy, owned), f"{name}: a holder's copy is not its owner's"
                torch.testing.assert_close(copy.float(), weight, rtol=fine, atol=fine / 2)


def embed_with_bias(module: Embed, words: Tensor) -> Tensor:
    return module(words) + module.bias[:WIDTH]


@fp16_allowed()
def use_half(rank: int, world_size: int, name: str, user: int) -> list[Tensor]:
    """Both attributes are tied, and only stage `user` uses the bias; how it moved, from schedule to schedule."""
    from deepspeed.pipe import PipelineModule, TiedLayerSpec

    import ds_ddg

    uses = [(embed_with_bias, project), (None, decode)][user]
    ends = [TiedLayerSpec("embed", Embed, forward_fn=use, tied_weight_attr=["weight", "bias"]) for use in uses]
    net = PipelineModule(
        [ends[0], *blocks(), ends[1]], num_stages=world_size, loss_fn=loss_fn, partition_method="uniform"
    )
    more = {} if not name or name.startswith("fp16") else FORMATS[name].config
    config = toy.config(1, {"sync_steps": 3}, **more)
    engine, *_ = ds_ddg.initialize(
        model=net, config=config, optimizer=one_group_fast, model_parameters=list(net.parameters())
    )
    bias, data, moved = net.tied_modules["embed"].bias, batches(6), []
    for _ in range(6):
        engine.train_batch(data)
        moved.append(bias.detach().clone())
    return moved


@pytest.mark.parametrize("name", ["", *(name for name in FORMATS if not name.startswith("fp16"))])
@pytest.mark.parametrize("user", [0, 1])
def test_tied_weight_that_one_stage_does_not_use(ranks: GetRanks, name: str, user: int) -> None:
    """In DeepSpeed's own engine the stage that uses it waits for ever for the gradient of the other."""
    one, other = ranks(2).run(use_half, name, user, timeout=60)
    assert all(map(torch.equal, one, other))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(one[:3])), "it does not move"
    assert not torch.equal(one[3], one[-1]), "it does not move under DDG"
