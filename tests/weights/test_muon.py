"""DeepSpeed's Muon: which parameters it takes, whatever the split, and that it trains as the oracle does."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import logger

from ds_ddg.weights.muon_step import stepping
from helpers import formats, muon_runs, tied_runs, toy
from helpers.distributed import GetRanks
from helpers.modes import DEFAULT, MODE_BLOCKS
from helpers.resuming import assert_resumed
from helpers.versus import versus

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("ddg", MODE_BLOCKS, ids=lambda ddg: "-".join(ddg.values()))
@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 1), (2, 2), (4, 1), (4, 2)])
@pytest.mark.proves("Muon: matrices and convolutions, AdamW for the rest", modes="ddg")
def test_equals_the_oracle(ranks: GetRanks, stages: int, micro_batches: int, ddg: dict[str, Any]) -> None:
    """Also on stages without a matrix, and with nothing else."""
    versus(ranks, muon_runs.setup_of(stages=stages, micro_batches=micro_batches, ddg=ddg, clip=0.5))


def together(by_rank: list[Any]) -> dict[str, bool]:
    """Join what the ranks chose; each name has one value."""
    joined: dict[str, bool] = {}
    for chosen in by_rank:
        for name, muon in chosen.items():
            assert joined.setdefault(name, muon) == muon, name
    return joined


def expected(tied: bool) -> dict[str, bool]:
    residual = {f"3.{name}": name in ("up.weight", "down.weight") for name in RESIDUAL}
    inner = {f"1.{name}": muon for name, muon in muon_runs.KINDS.items()} | {"2.weight": True, "2.bias": False}
    words = "tied_modules.words" if tied else "0"
    ends = {f"{words}.table.weight": False, f"{words}.types.weight": False}
    if not tied:
        ends |= {"4.pool.weight": True, "4.pool.bias": False, "4.classes.weight": False, "4.classes.bias": False}
    return {**ends, **inner, **residual}


RESIDUAL = ["norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "down.bias"]


@pytest.mark.parametrize("tied", [False, True])
def test_chooses_by_structure_whatever_the_split(ranks: GetRanks, tied: bool) -> None:
    """Names tell nothing here; the output layer is on the last stage but one where that has no weights."""
    for stages in (1, 3, 6):
        assert together(ranks(stages).run(muon_runs.flags, tied, {})) == expected(tied), f"K = {stages}"


@pytest.mark.parametrize("tied", [False, True])
def test_a_scripts_own_flags_win(ranks: GetRanks, tied: bool) -> None:
    table = "tied_modules.words.table.weight" if tied else "0.table.weight"
    asked = {table: True, "1.positions": True, "2.weight": False}
    for stages in (1, 3):
        assert together(ranks(stages).run(muon_runs.flags, tied, asked)) == expected(tied) | asked


def warned_of(rank: int, world_size: int) -> list[str]:
    lines = toy.Lines(logging.WARNING)
    logger.addHandler(lines)
    try:
        muon_runs.flags(rank, world_size, False, {"1.depthwise.weight": False})
    finally:
        logger.removeHandler(lines)
    return [line for line in lines.lines if "AdamW updates" in line]


def test_warns_of_matrices_of_no_known_kind(ranks: GetRanks) -> None:
    """On their stage; a flag says that AdamW is meant."""
    assert ranks(2).run(warned_of) == [
        [
            "stage 0: AdamW updates 1.positions (5, 12), 1.mix.weight (12, 12, 3), of no kind that is known to be "
            "Muon's; set use_muon of each, True or False, before ds_ddg.initialize"
        ],
        [],
    ]


def test_a_vector_cannot_be_muons(ranks: GetRanks) -> None:
    errors = ranks(2).run(muon_runs.flags, False, {"2.bias": True})
    assert all("use_muon is True for a parameter that is no matrix" in error for error in errors)
    assert any("(12,)" in error for error in errors)


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.proves("Muon, bf16 and ZeRO-1 with fp32 sums", modes=DEFAULT)
def test_bf16(ranks: GetRanks, stages: int) -> None:
    setup = muon_runs.setup_of(
        layers=muon_runs.bf16_layers,
        batches=muon_runs.bf16_batches,
        loss_fn=formats.loss_fn,
        optimizer=muon_runs.InBf16,
        config={**muon_runs.CONFIG, **muon_runs.BF16},
        stages=stages,
        micro_batches=1,
    )
    versus(ranks, setup)


@pytest.mark.proves("Muon, weights tied across stages", modes=DEFAULT)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_tied_weights(ranks: GetRanks, monkeypatch: pytest.MonkeyPatch, micro_batches: int) -> None:
    monkeypatch.setitem(toy.OPTIMIZERS, "muon", muon_runs.Oracle)  # type: ignore[arg-type]
    setting = {"three": False, "micro_batches": micro_batches, "ddg": {}}
    got = ranks(3).run(tied_runs.train_engine, {**setting, "optimizer": None}, 3, muon_runs.CONFIG)
    with formats.fp16_allowed():  # as on these ranks: DeepSpeed's Muon computes in fp16 where it can
        tied_runs.assert_exact(got, {**setting, "optimizer": "muon"}, 3)


@pytest.mark.proves("Muon, frozen layers", modes=DEFAULT)
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_layers(ranks: GetRanks, frozen: int) -> None:
    """Also on a stage with nothing to train."""
    layers = partial(formats.layers, frozen=frozen)
    batches = partial(formats.batches, 60, torch.float32)
    versus(ranks, muon_runs.setup_of(layers=layers, batches=batches, loss_fn=formats.loss_fn, stages=3))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.proves("Muon, resuming from a checkpoint", modes=DEFAULT)
def test_resumes_bit_for_bit(ranks: GetRanks, tmp_path: Path, bf16: bool) -> None:
    """Both momenta and both learning rates, on stages without a matrix too."""
    assert_resumed(ranks(4).run(muon_runs.go_on, str(tmp_path), bf16, timeout=120), 1)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.proves("Muon, data x pipeline", modes=DEFAULT)
def test_replicas(ranks: GetRanks, bf16: bool) -> None:
    """With the same data and random numbers, two replicas train as one; in bf16 each has a part of the matrices."""
    one = ranks(2).run(muon_runs.last_state, bf16)
    assert ranks(4).run(muon_runs.last_state, bf16) == [state for state in one for _ in range(2)]


def test_the_same_beside_it_on_1f1b(ranks: GetRanks) -> None:
    """All parameters equal those of one stage; both learning rates are the same on every rank."""
    whole = ranks(1).run(muon_runs.beside, {})[0]
    for ddg in ({"enabled": False}, {"sync_steps": 100}):
        by_rank = ranks(2).run(muon_runs.beside, ddg)
        assert [rates for _, rates, _ in by_rank] == [whole[1]] * 2
        assert len(set(whole[1])) == 2
        assert by_rank[0][0] == by_rank[1][0]
        torch.testing.assert_close(by_rank[0][0], whole[0], rtol=1e-6, atol=0)
        torch.testing.assert_close([p for _, _, part in by_rank for p in part], whole[2], rtol=1e-5, atol=1e-6)


def test_learning_rates_are_every_ranks(ranks: GetRanks) -> None:
    """A stage without a matrix has Muon's, too."""
    rates = [rates for _, rates, _ in ranks(4).run(muon_runs.beside, {})]
    assert rates == [ranks(1).run(muon_runs.beside, {})[0][1]] * 4


REFUSED = {
    "a key that DeepSpeed ignores": ({"muon_momentum": 0.9}, {}, "Muon has no parameter 'muon_momentum': it has lr"),
    "a rate that is none": ({"muon_lr": -0.1}, {}, 'Muon with "muon_lr": -0.1'),
    "a word": ({"muon_lr": "0.1"}, {}, "Muon with \"muon_lr\": '0.1'"),
    "a momentum of one": ({"momentum": 1.0}, {}, 'Muon with "momentum": 1.0'),
    "heads": ({"per_head_muon": True}, {}, "Muon with per_head_muon"),
    "ZeRO-1 in fp32": ({}, {"zero_optimization": {"stage": 1}}, "Muon with ZeRO-1 in fp32"),
    "bf16": ({}, {"bf16": {"enabled": True}}, "Muon with bf16"),
    "bf16 on 1F1B": ({}, {**muon_runs.BF16, "ddg": {"enabled": False}}, "Muon with bf16 on DeepSpeed's own schedule"),
    "bf16 clipped globally": (
        {},
        {**muon_runs.BF16, "gradient_clipping": 1.0, "ddg": {"clip": "global"}},
        'Muon with bf16 and "clip": "global"',
    ),
    "one rate for both": (
        {"muon_lr": 0.02},
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.001}}},
        '"muon_lr" with WarmupLR, whose "warmup_max_lr" takes its place',
    ),
}
MARKS = {
    "ZeRO-1 in fp32": ("Muon with ZeRO-1 in fp32", 'set `"zero_optimization": {"stage": 0}`'),
    "bf16": ("Muon with bf16 and no fp32 sums", "ZeRO-1 and `grad_accum_dtype` fp32"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.refuses(*MARKS[n]) if n in MARKS else ()) for n in REFUSED]
)
def test_refused_by_name(name: str) -> None:
    params, more, message = REFUSED[name]
    assert message in "\n".join(muon_runs.refusals(params, more))


def test_two_rates_for_a_scheduler() -> None:
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": [0.02, 0.001]}}
    assert muon_runs.refusals(muon_runs.MUON, {"scheduler": warmup}) == []
    assert muon_runs.refusals({"lr": 0.01}, {"scheduler": {**warmup, "params": {"warmup_max_lr": 0.01}}}) == []


def errors_of(rank: int, world_size: int) -> str:
    setup = muon_runs.setup_of(stages=world_size, config={**muon_runs.CONFIG, **muon_runs.BF16})
    with pytest.raises(ValueError, match="use_muon") as raised:
        setup.engine()
    return str(raised.value)


@pytest.mark.refuses("Muon with bf16 and convolutions", "set `use_muon` of their kernels to False, or use fp32")
def test_kernels_in_bf16_are_refused_everywhere(ranks: GetRanks) -> None:
    """DeepSpeed would refuse them where they are, and let the other stages wait."""
    errors = ranks(2).run(errors_of)
    assert all("Muon in bf16 on weights of 2 dimensions alone, and a weight here has 4" in error for error in errors)


def test_kernels_in_any_memory_format() -> None:
    """A flattened momentum is then a copy, and what is written there would be lost."""
    seen = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(6, 3, 3, 3).to(memory_format=memory_format))
        optimizer = muon_runs.engine_muon(weight)
        for _ in range(3):
            weight.grad = torch.randn(6, 3, 3, 3).to(memory_format=memory_format)
            with stepping(optimizer):
                optimizer.step()
        seen.append(weight.detach().contiguous())
    torch.testing.assert_close(seen[0], seen[1])
