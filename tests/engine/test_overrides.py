"""The schedule on top of a project's own engine: its overrides take effect, or are refused by name."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.dualpipev import DualPipeVEngine
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER, PipelineEngine
from torch import Tensor

import ds_ddg
from ds_ddg.engine.overrides import WITHOUT_EFFECT
from ds_ddg.run import main
from helpers import toy
from helpers.distributed import GetRanks
from helpers.projects import Project, oracle


class OwnLoop(PipelineEngine):
    """Bypasses DeepSpeed's methods, as qlora-pipe's engine does: no iterator, a list of losses, its own forward."""

    def train_batch(self) -> Any:  # type: ignore[override]
        self.reset_activation_shape()
        self.module.train()
        self._compute_loss = True
        self.timers(TRAIN_BATCH_TIMER).start()
        sched = schedule.TrainSchedule(
            micro_batches=self.micro_batches, stages=self.num_stages, stage_id=self.stage_id
        )
        self._exec_schedule(sched)
        self.agg_train_loss = torch.tensor(41.0)
        self.timers(TRAIN_BATCH_TIMER).stop()
        return [loss.clone() for losses in self.fwd_outputs for loss in losses]

    def eval_batch(self, data_iter: Any) -> Any:  # type: ignore[override]
        self.module.eval()
        self._compute_loss = True
        iterator = self.data_iterator
        self.set_dataiterator(data_iter)
        sched = schedule.InferenceSchedule(
            micro_batches=self.micro_batches, stages=self.num_stages, stage_id=self.stage_id
        )
        with torch.no_grad():
            self._exec_schedule(sched)
        self.set_dataiterator(iterator)
        return [loss.clone() for losses in self.fwd_outputs for loss in losses]

    def _forward_to_a_list(self, buffer_id: int) -> None:
        outputs = super(PipelineEngine, self).forward(self.pipe_buffers["inputs"][buffer_id].clone())
        self.pipe_buffers["outputs"][buffer_id] = outputs
        if self.is_last_stage():
            self.loss = self.module.loss_fn(outputs, self.pipe_buffers["labels"][buffer_id])
            self.fwd_outputs.append([self.loss.detach()])

    _INSTRUCTION_MAP = {**PipelineEngine._INSTRUCTION_MAP, schedule.ForwardPass: _forward_to_a_list}  # noqa: RUF012


class EveryOverride(PipelineEngine):
    """Counts what it is asked to do, and asks DeepSpeed to do it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counted: Counter[str] = Counter()

    def train_batch(self, data_iter: Any = None, twice: int = 0) -> Any:
        self.counted["train_batch"] += 1
        self.twice = 2 * twice
        loss = super().train_batch(data_iter)
        self.counted["with a monitor"] += hasattr(self.monitor, "write_events")
        return loss

    @staticmethod
    def turned(batch: Any) -> Any:
        """What it makes of a micro-batch before it is evaluated."""
        return -batch[0], batch[1]

    def eval_batch(self, data_iter: Any, *args: Any, **kwargs: Any) -> Any:
        self.counted["eval_batch"] += 1
        return super().eval_batch(map(self.turned, data_iter), *args, **kwargs)


def counting(name: str) -> Callable[..., Any]:
    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.counted[name] += 1
        return getattr(super(EveryOverride, self), name)(*args, **kwargs)

    return count


COUNTED = [
    "_exec_backward_pass",
    "_exec_forward_pass",
    "_exec_load_micro_batch",
    "_exec_optimizer_step",
    "_exec_reduce_grads",
    "_exec_schedule",
    "_inference_schedule",
    "_take_model_step",
    "load_checkpoint",
    "reset_activation_shape",
    "save_checkpoint",
    "set_dataiterator",
    "set_train_batch_size",
]
for overridden in COUNTED:
    setattr(EveryOverride, overridden, counting(overridden))


def build(engine_class: type, world_size: int, **settings: Any) -> Any:
    def initialize(**arguments: Any) -> Any:
        with ds_ddg.swap(engine_class):
            return deepspeed.initialize(**arguments)

    return toy.engine(world_size, 2, initialize=initialize, **settings)


def train_own_loop(rank: int, world_size: int, ddg: dict[str, Any]) -> dict[str, Any]:
    """Four calls, an evaluation between them, a switch of schedules at the end; the data ends within a call."""
    engine = build(ds_ddg.ddg_engine(OwnLoop), world_size, ddg=ddg)
    engine.set_dataiterator(toy.batches(9))
    returned, seen = [], []
    for _ in range(4):
        returned.append(engine.train_batch())
        seen.append((engine.loss_step, float(engine._reporter.losses.newest.mean), float(engine.agg_train_loss)))
    evaluated = engine.eval_batch(toy.batches(2, seed=5))
    with pytest.raises(StopIteration):
        engine.train_batch()
    engine.drain()
    steps, state = engine.global_steps, toy.state(engine.module)
    engine.schedule = "1f1b"
    engine.set_dataiterator(toy.batches(4))
    engine.train_batch()
    engine.schedule = "ddg"
    engine.train_batch()
    return {
        "losses": returned,
        "seen": seen,
        "evaluated": evaluated,
        "steps": steps,
        "after": engine.global_steps,
        "state": state,
    }


@pytest.mark.parametrize("ddg", [{}, {"activations": "recompute"}, {"loss": "exact"}], ids=str)
def test_a_loop_of_its_own_trains_as_the_oracle(ranks: GetRanks, ddg: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    modes = {key: value for key, value in ddg.items() if key == "activations"}
    reference = toy.reference(2, micro_batches=2, **modes)
    data = toy.batches(8)
    losses = [float(reference.train_batch(data)) for _ in range(4)]
    reference.drain()
    results = ranks(2).run(train_own_loop, ddg)
    for rank, result in enumerate(results):
        assert result["steps"] == 4
        assert result["after"] == 6
        known = losses if ddg.get("loss") == "exact" else [losses[0], *losses[:3]]
        assert [mean for _, mean, _ in result["seen"]] == known
        assert [own for _, _, own in result["seen"]] == [41.0] * 4, "what it says of its loss stays"
        for ours, expected in zip(result["state"], toy.state(reference.stages[rank]), strict=True):
            assert torch.equal(ours, expected)
    returned: list[list[Tensor]] = results[1]["losses"]
    assert [float(sum(call) / 2) for call in returned] == pytest.approx(losses)
    assert len(results[1]["evaluated"]) == 2


def override_everything(rank: int, world_size: int, directory: str) -> tuple[Counter[str], int, float]:
    engine = build(ds_ddg.ddg_engine(EveryOverride), world_size)
    assert isinstance(engine, EveryOverride)
    assert isinstance(engine, ds_ddg.DDGEngine)
    data = toy.batches(8)
    for _ in range(3):
        engine.train_batch(data, twice=4)
    ours = float(engine.eval_batch(toy.batches(2, seed=5)))
    turned = [EveryOverride.turned(batch) for batch in toy.batches(2, seed=5)]
    with mock.patch.object(EveryOverride, "turned", staticmethod(lambda batch: batch)):
        assert float(engine.eval_batch(iter(turned))) == ours
    engine.reset_activation_shape()
    engine.save_checkpoint(directory)
    engine.load_checkpoint(directory)
    engine.set_train_batch_size(8)
    return engine.counted, engine.twice, ours


def test_overrides_take_effect(ranks: GetRanks, tmp_path: Path) -> None:
    for counted, twice, _ in ranks(2).run(override_everything, str(tmp_path)):
        assert twice == 8, "an argument of its own"
        assert counted["with a monitor"] == counted["train_batch"] == 3
        assert not {name for name in (*COUNTED, "eval_batch") if not counted[name]}


# -- what is refused --------------------------------------------------------------------------------------------------


def nothing(self: Any, *_: Any, **__: Any) -> None:
    """An override."""


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_an_override_without_effect_is_refused_by_name(name: str) -> None:
    base = type("Base", (type("Further", (PipelineEngine,), {name: nothing}),), {})
    with pytest.raises(TypeError, match=rf"put on Base:\n- Further\.{name} would be without effect: \w+"):
        ds_ddg.ddg_engine(base)


@pytest.mark.parametrize("name", ["drain", "_choose_instructions", "schedule", "_links"])
def test_a_name_of_our_own_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=rf"Base\.{name} would hide behind"):
        ds_ddg.ddg_engine(type("Base", (PipelineEngine,), {name: nothing}))


def mapped(base: type, instruction: type) -> type:
    return type("Base", (base,), {"_INSTRUCTION_MAP": {**PipelineEngine._INSTRUCTION_MAP, instruction: nothing}})


@pytest.mark.parametrize("instruction", [schedule.SendGrad, schedule.RecvActivation, schedule.ReduceTiedGrads])
def test_a_mapped_function_without_effect_is_refused(instruction: type) -> None:
    with pytest.raises(TypeError, match=rf"Base\._INSTRUCTION_MAP\[{instruction.__name__}\] would be without effect"):
        ds_ddg.ddg_engine(mapped(PipelineEngine, instruction))
    with pytest.raises(TypeError, match=rf"Base\._INSTRUCTION_MAP\[{instruction.__name__}\] would be without effect"):
        mapped(ds_ddg.DDGEngine, instruction)


def test_another_schedule_of_deepspeeds_is_refused() -> None:
    with pytest.raises(TypeError, match=r"DualPipeVEngine\._train_schedule would be without effect"):
        ds_ddg.ddg_engine(DualPipeVEngine)


def test_every_override_of_ours_is_accounted_for() -> None:
    """What the mixins have in the place of DeepSpeed's calls it, as the tests above show, or is refused."""
    ours = {name for cls in ds_ddg.DDGEngine.__mro__[1:] for name in vars(cls) if cls.__module__.startswith("ds_ddg")}
    ours = {name for name in ours if callable(getattr(PipelineEngine, name, None))} - set(dir(object))
    elsewhere = {
        "_check_for_duplicates",
        "_configure_optimizer",
        "destroy",
        "steps_per_print",
        "train_batch",
        "eval_batch",
    }
    assert ours - elsewhere - set(COUNTED) <= set(WITHOUT_EFFECT)


class Other(schedule.TrainSchedule):
    """Not DeepSpeed's own."""


class Misused(PipelineEngine):
    """Executes what it is told."""

    def train_batch(self, data_iter: Any = None, how: str = "") -> Any:
        self.set_dataiterator(data_iter)
        sched = (Other if how == "other" else schedule.TrainSchedule)(
            micro_batches=3 if how == "more" else 2, stages=self.num_stages, stage_id=self.stage_id
        )
        self._compute_loss = True
        with torch.set_grad_enabled(how != "no gradient"):
            self._exec_schedule(sched)
        if how == "again":
            self._exec_schedule(sched)

    def _exec_load_micro_batch(self, buffer_id: int) -> None:
        if self.data_iterator.how == "iterator":
            batch = next(self.data_iterator)
            self.pipe_buffers["inputs"][buffer_id], self.pipe_buffers["labels"][buffer_id] = batch
        else:
            super()._exec_load_micro_batch(buffer_id)
            if self.data_iterator.how == "loads twice":
                self._next_batch()

    _INSTRUCTION_MAP = {**PipelineEngine._INSTRUCTION_MAP, schedule.LoadMicroBatch: _exec_load_micro_batch}  # noqa: RUF012


class Data:
    def __init__(self, how: str) -> None:
        self.how, self.batches = how, toy.batches(20)

    def __iter__(self) -> Data:
        return self

    def __next__(self) -> Any:
        return next(self.batches)


MISUSES = {
    "other": "Misused executes a Other; the delayed schedule takes the place of DeepSpeed's TrainSchedule alone",
    "more": "trains on 3 micro-batches, and gradient_accumulation_steps is 2",
    "again": "executes a TrainSchedule, with gradients on, in train_batch once more",
    "no gradient": "executes a TrainSchedule, with gradients off, in train_batch;",
    "outside": "executes a TrainSchedule, with gradients on, outside a call",
    "iterator": "2 micro-batches of this call were fetched and not trained on",
    "loads twice": "loads more micro-batches than it has",
}


def misuse(rank: int, world_size: int, how: str) -> str:
    engine = build(ds_ddg.ddg_engine(Misused), world_size)
    try:
        if how == "outside":
            Misused.train_batch(engine, Data(how))
        else:
            engine.train_batch(Data(how), how=how)
    except Exception as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("how", MISUSES)
def test_what_cannot_be_executed_is_said_so(ranks: GetRanks, how: str) -> None:
    for said in ranks(2).run(misuse, how):
        assert MISUSES[how] in said


# -- where a project's class is found ---------------------------------------------------------------------------------


def put(engine_class: Any) -> Any:
    """Inside this block it is DeepSpeed's."""
    return mock.patch.object(deepspeed, "PipelineEngine", engine_class)


@pytest.mark.parametrize("wanted", [[], [ds_ddg.DDGEngine]], ids=str)
def test_swap_goes_on_top_of_what_is_there(wanted: list[type]) -> None:
    with put(Project):
        with ds_ddg.swap(*wanted):
            assert deepspeed.PipelineEngine is ds_ddg.ddg_engine(Project)
            assert issubclass(deepspeed.PipelineEngine, ds_ddg.DDGEngine)
        assert deepspeed.PipelineEngine is Project
    assert deepspeed.PipelineEngine is PipelineEngine


def test_swap_goes_on_top_of_what_is_put_there_later() -> None:
    kind = type(deepspeed)
    with ds_ddg.swap(), ds_ddg.swap():
        with put(Project):
            assert deepspeed.PipelineEngine is ds_ddg.ddg_engine(Project)
        assert deepspeed.PipelineEngine is ds_ddg.DDGEngine
    assert deepspeed.PipelineEngine is PipelineEngine
    assert type(deepspeed) is kind
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, deepspeed, "PipelineEngine", PipelineEngine)
        with ds_ddg.swap():
            with ds_ddg.swap():
                deepspeed.PipelineEngine = Project
                assert deepspeed.PipelineEngine is ds_ddg.ddg_engine(Project)
            assert deepspeed.PipelineEngine is ds_ddg.ddg_engine(Project)
        assert deepspeed.PipelineEngine is Project


def test_swap_takes_what_has_it_already() -> None:
    class Mine(ds_ddg.DDGEngine):
        pass

    with ds_ddg.swap(ds_ddg.ddg_engine(Project)), ds_ddg.swap():
        assert deepspeed.PipelineEngine is ds_ddg.ddg_engine(Project)
    with put(Mine), ds_ddg.swap():
        assert deepspeed.PipelineEngine is Mine
    with ds_ddg.swap(Mine):
        assert deepspeed.PipelineEngine is Mine


def test_swap_drops_no_class_of_a_project() -> None:
    with (
        put(Project),
        pytest.raises(TypeError, match=r"PipelineEngine is Project, whose overrides DDGOwnLoop does not"),
    ):
        ds_ddg.swap(ds_ddg.ddg_engine(OwnLoop)).__enter__()
    assert deepspeed.PipelineEngine is PipelineEngine
    with ds_ddg.swap(), pytest.raises(TypeError, match="ddg_engine needs a subclass"):
        deepspeed.PipelineEngine = print


def build_past_deepspeed(rank: int, world_size: int) -> list[str]:
    """Warnings about an engine that a project's own function builds, and about the one that DeepSpeed's makes."""
    with mock.patch("ds_ddg.entry.logger.warning") as warning, ds_ddg.swap():
        toy.engine(world_size, 2, initialize=deepspeed.initialize)
        assert not warning.called
        net = PipelineModule(toy.layers(), num_stages=world_size, loss_fn=toy.loss_fn)
        config = DeepSpeedConfig({**toy.config(2), "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}, net.mpu())
        with ds_ddg.swap():
            Project(args=None, model=net, mpu=net.mpu(), config_class=config, model_parameters=list(net.parameters()))
    return [str(call.args[0]) for call in warning.call_args_list]


def test_an_engine_that_the_swap_does_not_reach_is_named(ranks: GetRanks) -> None:
    for (said,) in ranks(2).run(build_past_deepspeed):
        assert said.startswith("Project is built without the delayed schedule")
        assert "build ds_ddg.ddg_engine(Project) in its place" in said


SCRIPT = """
import json, sys
from deepspeed import initialize
import deepspeed, torch
from helpers import toy
from deepspeed.pipe import PipelineModule
from helpers.projects import Project

deepspeed.PipelineEngine = {engine}
net = PipelineModule(toy.layers(), num_stages=2, loss_fn=toy.loss_fn, partition_method="uniform")
torch.manual_seed(11)
engine, _, _, _ = initialize(
    model=net, config=toy.config(2), optimizer=toy.OPTIMIZERS["sgd"](net.parameters()),
    model_parameters=list(net.parameters()),
)
data = toy.batches(8)
losses = [float(engine.train_batch(data)) for _ in range(4)]
with open(sys.argv[-1] + str(engine.global_rank), "w") as f:
    json.dump([losses, engine.reductions], f)
"""


def run_script(rank: int, world_size: int, script: str, target: str) -> bool:
    argv, path = list(sys.argv), list(sys.path)
    try:
        main([f"--local_rank={rank}", script, target])
        return deepspeed.PipelineEngine is Project
    finally:
        sys.argv, sys.path = argv, path
        deepspeed.PipelineEngine = PipelineEngine


def test_a_script_that_puts_its_own_engine_there_keeps_it(ranks: GetRanks, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT.format(engine="Project"))
    assert ranks(2).run(run_script, str(tmp_path / "train.py"), str(tmp_path / "rank")) == [True, True]
    losses = oracle(4)
    for rank in range(2):
        seen, reductions = json.loads((tmp_path / f"rank{rank}").read_text())
        assert seen == [losses[0], *losses[:3]], "one call old, as under DDG"
        assert reductions == 4
