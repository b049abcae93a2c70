"""The ways to get the delayed engine without naming it: a block, a subclass, a script that knows nothing of it."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.engine import PipelineEngine

import ds_ddg
from ds_ddg.run import main
from helpers import toy
from helpers.distributed import GetRanks
from helpers.projects import Project, oracle

SCRIPT = """
import json, sys
import deepspeed, torch
from helpers import toy
from deepspeed.pipe import PipelineModule

net = PipelineModule(toy.layers(), num_stages=2, loss_fn=toy.loss_fn, partition_method="uniform")
torch.manual_seed(11)
engine, _, _, _ = deepspeed.initialize(
    model=net, config=toy.config(2), optimizer=toy.OPTIMIZERS["sgd"](net.parameters()),
    model_parameters=list(net.parameters()),
)
data = toy.batches(8)
losses = [float(engine.train_batch(data)) for _ in range(4)]
names = [c.__name__ for c in type(engine).__mro__]
with open(sys.argv[-1] + str(engine.global_rank), "w") as f:
    json.dump({"argv": sys.argv, "main": __name__, "mro": names, "losses": losses}, f)
"""


def run_script(rank: int, world_size: int, script: str, target: str) -> bool:
    argv, path = list(sys.argv), list(sys.path)
    try:
        main([f"--local_rank={rank}", script, "--epochs", "1", target])
    finally:
        sys.argv, sys.path = argv, path
    return deepspeed.PipelineEngine is PipelineEngine


def train_project(rank: int, world_size: int) -> tuple[bool, int, list[float]]:
    engine_class = ds_ddg.ddg_engine(Project)

    def initialize(**arguments: Any) -> Any:
        with ds_ddg.swap(engine_class):
            return deepspeed.initialize(**arguments)

    engine = toy.engine(world_size, 2, initialize=initialize)
    data = toy.batches(8)
    losses = [float(engine.train_batch(data)) for _ in range(4)]
    return isinstance(engine, Project), engine.reductions, losses


def test_a_script_that_knows_nothing_of_it(ranks: GetRanks, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    restored = ranks(2).run(run_script, str(script), str(tmp_path / "rank"))
    assert restored == [True, True]
    losses = oracle(4)
    for rank in range(2):
        seen = json.loads((tmp_path / f"rank{rank}").read_text())
        assert seen["argv"][:2] == [str(script), f"--local_rank={rank}"], "where the launcher's rank must be found"
        assert seen["argv"][2:4] == ["--epochs", "1"]
        assert seen["main"] == "__main__"
        assert "DDGEngine" in seen["mro"]
        assert seen["losses"] == [losses[0], *losses[:3]], "one call old, as under DDG"


@pytest.mark.smoke
def test_a_projects_own_engine_keeps_its_instructions(ranks: GetRanks) -> None:
    losses = oracle(4)
    for is_project, reductions, seen in ranks(2).run(train_project):
        assert is_project
        assert reductions == 4
        assert seen == [losses[0], *losses[:3]]


def test_swap_restores_the_name_after_an_error() -> None:
    inside = []
    with contextlib.suppress(ZeroDivisionError), ds_ddg.swap():
        inside.append(deepspeed.PipelineEngine)
        raise ZeroDivisionError
    assert inside == [ds_ddg.DDGEngine]
    assert deepspeed.PipelineEngine is PipelineEngine


@pytest.mark.parametrize("base", [dict, ds_ddg.DDGEngine, PipelineModule])
def test_only_an_engine_without_it_can_get_it(base: type) -> None:
    with pytest.raises(TypeError, match="ddg_engine needs"):
        ds_ddg.ddg_engine(base)


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "usage"), (["--local_rank=0"], "usage"), (["no.py"], "no.py")]
)
def test_no_script_is_said_so(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(arguments)
