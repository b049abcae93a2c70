"""The engine with rules for stale gradients: equal to the oracle with steps by hand, and to a loop with late gradients."""

from __future__ import annotations

import pytest
import torch

import ds_ddg
from ds_ddg.staleness.apply import PREVIOUS_STEP
from helpers import stale_runs, toy
from helpers.distributed import GetRanks
from helpers.modes import DEFAULT
from helpers.stale_runs import CALLS, REFILL, RULES, Loop, train_engines, train_oracle

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.proves('"staleness": "auto" and a block of rules, fp32', modes=DEFAULT)
def test_engine_equals_oracle_and_loop(ranks: GetRanks, stages: int, micro_batches: int) -> None:
    """With SGD, AdamW and a fused AdamW; through a drain and the fill after it; learning rates halved on the way."""
    by_rank = ranks(stages).run(train_engines, list(RULES), micro_batches)
    for i, (name, rule) in enumerate(RULES.items()):
        expected = train_oracle(stages, micro_batches, rule)
        loop = Loop(
            micro_batches,
            rule,
            lambda net, optimizer, rule=rule: ds_ddg.delayed(
                optimizer, stale_runs.split(net, stages), micro_batches=micro_batches, rules=rule.staleness
            ),
        )
        loop.train(toy.batches(CALLS * micro_batches))
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
