"""The engine with rules for stale gradients: equal to the oracle with steps by hand, and to ``ds_ddg.delayed``."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_ddg
from ds_ddg.staleness.apply import PREVIOUS_STEP
from helpers import formats, fp16_runs, stale_runs, tied_runs, toy
from helpers.distributed import GetRanks
from helpers.formats import FORMATS, ZERO_1
from helpers.matrix import mode_of
from helpers.modes import DEFAULT
from helpers.resuming import assert_resumed, go_on
from helpers.stale_combos import COMBINATIONS, REPLICAS, Combination, hand_over, past_the_hooks, second_engine
from helpers.stale_runs import (
    CALLS,
    MORE_RULES,
    REFILL,
    RULES,
    ByHand,
    Loop,
    Rule,
    adamw,
    change,
    train_engines,
    train_oracle,
)
from helpers.versus import Setup, gaps, nothing, run_engine, run_oracle

pytestmark = pytest.mark.usefixtures("one_thread")


def delayed_loop(stages: int, micro_batches: int, rule: Rule) -> Loop:
    """A loop that has been trained."""
    loop = Loop(
        micro_batches,
        rule,
        lambda net, optimizer: ds_ddg.delayed(
            optimizer, stale_runs.split(net, stages), micro_batches=micro_batches, rules=rule.staleness
        ),
    )
    loop.train(toy.batches(CALLS * micro_batches))
    return loop


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.proves('"staleness": "auto" and a block of rules, fp32', modes=DEFAULT)
def test_engine_equals_oracle_and_loop(ranks: GetRanks, stages: int, micro_batches: int) -> None:
    """With SGD, AdamW and a fused AdamW; through a drain and the fill after it; learning rates halved on the way."""
    by_rank = ranks(stages).run(train_engines, list(RULES.values()), micro_batches)
    for i, (name, rule) in enumerate(RULES.items()):
        expected = train_oracle(stages, micro_batches, rule)
        loop = delayed_loop(stages, micro_batches, rule)
        plain = toy.OPTIMIZERS[rule.optimizer]([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
        usual = plain["betas"] if "betas" in plain else plain["momentum"]
        for k, part in enumerate(stale_runs.split(loop.net, stages)):
            seen = by_rank[k][i]
            for moment, (ours, its) in enumerate(zip(seen.states, expected[k].states, strict=True)):
                assert all(map(torch.equal, ours, its)), f"{name}: stage {k}, moment {moment}"
            assert all(map(torch.equal, seen.states[0], toy.state(part))), f"{name}: stage {k} and the loop"
            rates = [plain["lr"] * 0.5 ** ((call + 1) // 3) for call in range(CALLS + REFILL)]
            assert seen.groups == [(pytest.approx(rate), usual) for rate in rates], "what a script sees"
            assert (PREVIOUS_STEP in seen.keys) == (rule.lead > 0 and k < stages - 1)
            assert seen.collectives == 0
            assert (seen.norm is not None) == (rule.clip > 0)
            assert seen.norm == by_rank[0][i].norm


def combinations() -> list[Any]:
    return [
        pytest.param(it, id=name, marks=pytest.mark.proves(feature, modes=[mode_of(it.setup.ddg)]))
        for feature, those in COMBINATIONS.items()
        for name, it in those.items()
    ]


@pytest.mark.parametrize("combination", combinations())
@pytest.mark.filterwarnings("ignore:.*lr_scheduler")
def test_together_with_other_settings(ranks: GetRanks, combination: Combination) -> None:
    expected = run_oracle(combination.oracles)
    by_rank = ranks(combination.setup.stages).run(run_engine, combination.engines)
    for stage, (ours, its) in enumerate(zip(by_rank, expected, strict=True)):
        assert not gaps(ours, its), f"stage {stage}"
    others = run_oracle(replace(combination, rule=replace(combination.rule, staleness="off", clip=0.0)).oracles)
    assert gaps(expected[0], others[0]), "the rule did nothing"


@pytest.mark.parametrize("name", REPLICAS)
@pytest.mark.proves('"staleness", data x pipeline', modes=DEFAULT)
def test_replicas(ranks: GetRanks, name: str) -> None:
    """With the same data they train as one: the mean of two equal gradients is either."""
    expected = run_oracle(REPLICAS[name].oracles)
    by_rank = ranks(4).run(run_engine, REPLICAS[name].engines)
    for rank, ours in enumerate(by_rank):
        assert not gaps(ours, expected[rank // 2]), f"rank {rank}"


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", MORE_RULES)
@pytest.mark.proves('"staleness" with Muon; with BasisRotation; a discount that fades; fp32', modes=DEFAULT)
def test_engine_equals_the_loop(ranks: GetRanks, name: str, micro_batches: int) -> None:
    if name == "muon":
        pytest.importorskip("deepspeed.runtime.zero.muon.muon_optimizer")
    rules = [MORE_RULES[name], replace(MORE_RULES[name], staleness="off")]
    by_rank = ranks(2).run(train_engines, rules, micro_batches)
    loops = [delayed_loop(2, micro_batches, rule) for rule in rules]
    for i, loop in enumerate(loops):
        for k, part in enumerate(stale_runs.split(loop.net, 2)):
            assert all(map(torch.equal, by_rank[k][i].states[0], toy.state(part))), f"stage {k}"
    assert not torch.equal(toy.state(loops[0].net)[0], toy.state(loops[1].net)[0]), "the rule did nothing"


# What sums gradients in another format than that of its weights is left to the tests of formats.
SUMS = [name for name in FORMATS if "sums" in name or "immediate" in name]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.proves(f'"staleness": "auto", {name}', modes=DEFAULT)) for name in FORMATS],
)
def test_below_deepspeeds_wrappers(ranks: GetRanks, name: str) -> None:
    """They step the optimizer inside, ZeRO group by group; one stage has nothing to train."""
    rule = RULES["A"]
    for frozen, micro_batches in ((None, 1), (1, 1 if name in SUMS else 2)):
        got = ranks(3).run(
            formats.train_engine, name, micro_batches, rule.optimizer, {"staleness": rule.staleness}, 0.0, frozen
        )
        assert (FORMATS[name].wrapper or "AdamW") in {result.wrapper for result in got}
        assert [result.collectives for result in got] == [0, 0, 0]
        expected = stale_runs.train_oracle_in(name, 3, micro_batches, rule, frozen)
        for stage, (ours, its) in enumerate(zip(got, expected, strict=True)):
            assert all(map(torch.equal, ours.states, its)), f"stage {stage}"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.proves(f'"staleness" with a clip, {name}', modes=DEFAULT, exact=False))
        for name in FORMATS
    ],
)
def test_wrappers_clip_delayed_stages_alone(ranks: GetRanks, name: str) -> None:
    """DeepSpeed clips in an arithmetic of its own."""
    rule = RULES["S"]
    got = ranks(3).run(formats.train_engine, name, 1, rule.optimizer, {"staleness": rule.staleness}, 0.0)
    expected, unclipped = (
        stale_runs.train_oracle_in(name, 3, 1, rule, None) for rule in (rule, replace(rule, clip=0.0))
    )
    near = 1e-6 if FORMATS[name].weights is torch.float32 else 0.01
    for stage, (ours, its, other) in enumerate(zip(got, expected, unclipped, strict=True)):
        assert farthest(ours.states, its) < near, f"stage {stage}"
        if stage < 2 and near < 0.01:
            assert farthest(ours.states, other) > 1e-4, "the clip was not at work"


def farthest(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(some, others, strict=True))


FORMS = ((1, "stash", "adamw"), (2, "stash", "adamw"), (1, "current", "adam"), (2, "stash", "sgd"))


@pytest.mark.proves('"staleness", resumed from a checkpoint', modes=DEFAULT)
def test_resumes_to_the_last_bit(ranks: GetRanks, tmp_path: Path) -> None:
    fading = {"learning_rate": 1.0, "anneal": 7, "extrapolation": 1.0}
    for optimizer, staleness in (("adam", "auto"), ("sgd", {"rules": "auto", "clip": 0.05}), ("sgd", fading)):
        forms = [form for form in FORMS if form[2].startswith(optimizer)]
        results = ranks(3).run(go_on, str(tmp_path), 3, forms, {"staleness": staleness}, timeout=120)
        assert_resumed(results, len(forms))
        keys = [{key for state in found[0][3]["optimizer"].values() for key in state} for found in results]
        assert [PREVIOUS_STEP in found for found in keys] == [True, True, False]


@pytest.mark.parametrize("name", ["bf16, ZeRO-1, fp32 sums", "bf16, ZeRO-1", "fp32, ZeRO-1"])
def test_wrappers_resume_to_the_last_bit(ranks: GetRanks, tmp_path: Path, name: str) -> None:
    for one, other in ranks(3).run(stale_runs.resume_in, name, "auto", str(tmp_path)):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize(
    ("config", "saved", "loaded", "micro_batches"),
    [
        ({}, "on", "on", 2),
        ({}, "on", "off", 1),
        ({}, "off", "on", 1),
        ({}, "deepspeed", "on", 1),
        (ZERO_1, "on", "on", 2),
        (ZERO_1, "deepspeed", "on", 1),
    ],
)
@pytest.mark.proves('"staleness", resumed with other rules or M, or from DeepSpeed\'s engine', modes=DEFAULT)
def test_resumes_with_other_rules(
    ranks: GetRanks, tmp_path: Path, config: dict[str, Any], saved: str, loaded: str, micro_batches: int
) -> None:
    """The extrapolation goes on where the step before had one, and begins anew where it had not."""
    found = ranks(2).run(hand_over, str(tmp_path), config, saved, loaded, micro_batches)
    for stage, result in enumerate(found):
        assert result.keeps == [saved == loaded == "on" and stage == 0] * 2
        assert all(map(torch.equal, *result.states)), "it is of no account what the engine did before"


@pytest.mark.parametrize("ddg", [{"staleness": "off"}, {"enabled": False, "staleness": "auto"}])
def test_an_optimizer_of_another_engine(ranks: GetRanks, ddg: dict[str, Any]) -> None:
    """It does not step by the rules of the engine before."""
    expected = ranks(2).run(second_engine, {**ddg, "staleness": "off"})
    for (ours, keeps), (its, _) in zip(ranks(2).run(second_engine, ddg), expected, strict=True):
        assert not keeps
        assert all(map(torch.equal, ours, its))


@pytest.mark.parametrize("config", fp16_runs.OPTIMIZERS.values(), ids=list(fp16_runs.OPTIMIZERS))
@pytest.mark.proves('"staleness", steps skipped in fp16', modes=DEFAULT, exact=False)
def test_a_skipped_step_is_none(ranks: GetRanks, config: dict[str, Any]) -> None:
    """Where the gradient overflows, the extrapolation waits with the weights."""
    rules = {"learning_rate": 0.5, "momentum": "stretch", "extrapolation": 1.0}
    results = ranks(3).run(fp16_runs.train, config, [24, 10, 10], 1, {"staleness": rules})
    assert results[0].told[-1][0] >= 3, "nothing was skipped"
    for delay, result in ((2, results[0]), (1, results[1])):
        for call in range(delay + 1, fp16_runs.CALLS):
            before, after = result.previous[call - 1 : call + 1]
            stays = len(before) == len(after) and all(map(torch.equal, before, after))
            assert stays == (result.scales[call] < result.scales[call - 1])
    assert not any(results[2].previous)


# -- where the staleness changes, or belongs to another stage --------------------------------------------------------


def change_oracle(rule: Rule, oracle: Any, call: int) -> None:
    if call == 0:
        oracle.optimizers = [ByHand(optimizer, rule, 0.0) for optimizer in oracle.optimizers]
    if call in (3, 6, 8):
        oracle.drain()
        oracle.delays = [0] * 3 if call == 3 else [2, 1, 0]
        oracle.micro_batches = 3 if call == 8 else 1
    for optimizer, delay in zip(oracle.optimizers, oracle.delays, strict=True):
        optimizer.s = delay / oracle.micro_batches


@pytest.mark.proves('"staleness", 1F1B and another number of micro-batches on the way', modes=DEFAULT)
def test_goes_by_the_present_staleness(ranks: GetRanks) -> None:
    """None on DeepSpeed's schedule, after which the extrapolation begins anew; less with more micro-batches."""
    rule = RULES["A"]
    setup = Setup(
        toy.layers,
        partial(toy.batches, 60),
        stages=3,
        micro_batches=1,
        loss_fn=toy.loss_fn,
        optimizer=adamw,
        before=change,
        oracle_before=partial(change_oracle, rule),
    )
    expected = run_oracle(setup)
    by_rank = ranks(3).run(run_engine, replace(setup, ddg={"staleness": rule.staleness}, oracle_before=nothing))
    for stage, (ours, its) in enumerate(zip(by_rank, expected, strict=True)):
        assert not gaps(ours, its), f"stage {stage}"


@pytest.mark.parametrize("three", [False, True])
@pytest.mark.proves('"staleness", tied weights', modes=DEFAULT)
def test_a_tied_weight_is_as_old_as_its_owner(ranks: GetRanks, monkeypatch: pytest.MonkeyPatch, three: bool) -> None:
    stages = 3
    setting = {"three": three, "micro_batches": 1, "optimizer": "adamw", "ddg": {"staleness": "auto"}}
    got = ranks(stages).run(tied_runs.train_engine, setting, stages, {})
    delays = itertools.count(stages - 1, -1)
    by_hand = lambda parameters: ByHand(adamw(parameters), RULES["A"], float(next(delays)))  # noqa: E731
    monkeypatch.setitem(toy.OPTIMIZERS, "by hand", by_hand)
    tied_runs.assert_exact(got, {**setting, "optimizer": "by hand", "ddg": {}}, stages)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "staleness", "ddg", "message"),
    [
        ("sgd", "auto", {}, "the scale of your loss"),
        ("sgd", {"clip": 1.0}, {"clip": "global"}, '"staleness": {"clip": 1} with "clip": "global"'),
    ],
)
@pytest.mark.refuses('"staleness": "auto" with SGD and no clip, or a clip and "clip": "global"', "name the clip")
def test_refuses_on_every_rank(
    ranks: GetRanks, optimizer: str, staleness: Any, ddg: dict[str, Any], message: str
) -> None:
    for answer in ranks(2).run(stale_runs.build_refused, optimizer, staleness, ddg):
        assert message in answer


def test_a_step_past_the_rules_is_an_error(ranks: GetRanks) -> None:
    for answer in ranks(2).run(past_the_hooks):
        assert "AdamW has stepped without the hooks of torch.optim.Optimizer" in answer
