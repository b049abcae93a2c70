"""The engine's collaborators, each alone: built without an engine, with what they need handed in."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.schedule import ForwardPass, RecvActivation
from torch import nn

from ds_ddg.comm.failures import FailureGuard, KnownToAllError, OutOfDataError
from ds_ddg.comm.lifetime import Process
from ds_ddg.comm.loss_exchange import Loss, Update
from ds_ddg.comm.message import Kind, Message
from ds_ddg.comm.p2p import StageError
from ds_ddg.comm.stage_links import Links
from ds_ddg.config import DDGConfig
from ds_ddg.engine.auto_slack import SlackTuner, trial_calls
from ds_ddg.engine.data_feed import Feed
from ds_ddg.engine.micro_batch import MicroBatchRunner
from ds_ddg.host import barrier_replaced
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.stage import RunState, Stage
from ds_ddg.telemetry.console import Console
from ds_ddg.telemetry.delay_effects import DelayEffects
from ds_ddg.telemetry.observer import Observer, Timestamp
from ds_ddg.telemetry.recorder import Recorder
from ds_ddg.telemetry.trace_writer import TraceWriter
from ds_ddg.weights.optimizer_wrappers import clocks_stopped, idle_optimizer, norm_unscaled
from ds_ddg.weights.stage_groups import StagePeers
from ds_ddg.weights.stage_optimizer import StageOptimizer


def stage(stage_id: int = 0, num_stages: int = 2, **settings: Any) -> Stage:
    return Stage(stage_id, num_stages, stage_id, DDGConfig(**settings))


def no_ties() -> Any:
    return SimpleNamespace(
        owners=set(), borrowed=[], recv_gradients=list, send_gradients=lambda: None, send_weights=lambda: None
    )


# -- where a stage is -------------------------------------------------------------------------------------------------


def test_a_run_moves_through_calls_drains_and_sizes() -> None:
    run = RunState(3, 2)
    run.switch("ddg")
    assert run.delayed
    run.begin()
    assert [run.end_call(), run.end_call()] == [0, 1]
    assert (run.call, run.next_micro_batch, run.filled_at, run.drained) == (2, 4, 0, False)
    run.drain()
    assert (run.filled_at, run.drained) == (4, True)
    run.resize(3)
    assert (run.filled_at, run.plan.micro_batches) == (6, 3)
    run.choose_slack(1)
    assert run.plan.delay(0) == 4
    run.resume(10)
    assert (run.call, run.filled_at) == (10, 30)


def test_a_stage_knows_its_place() -> None:
    assert [(s.is_first, s.is_last) for s in (stage(0), stage(1))] == [(True, False), (False, True)]
    assert stage(1).name == "stage 1 (rank 1)"


# -- one micro-batch --------------------------------------------------------------------------------------------------


class FakeHost(SimpleNamespace):
    """As much of DeepSpeed's engine as the runner uses, for a stage of one layer."""

    def carry_out(self, instruction: type, buffer_id: int) -> None:
        buffers = self.pipe_buffers
        if instruction.__name__ == "ForwardPass":
            buffers["inputs"][buffer_id].requires_grad_()
            buffers["outputs"][buffer_id] = self.module(buffers["inputs"][buffer_id])
        elif instruction.__name__ == "BackwardPass":
            torch.autograd.backward(buffers["outputs"][buffer_id], self.grad_layer)

    def _reentrant_activation_checkpointing(self) -> bool:
        return False

    def fp16_enabled(self) -> bool:
        return False


def host(slots: int) -> Any:
    torch.manual_seed(0)
    module = nn.Linear(3, 3)
    module.activation_checkpoint_interval = module.micro_offset = 0  # type: ignore[assignment]
    return FakeHost(
        module=module,
        device=torch.device("cpu"),
        dynamic_shape=False,
        pipe_buffers={column: [None] * slots for column in ("inputs", "outputs", "labels")},
        loss=None,
        total_loss=None,
        grad_layer=None,
        optimizer=None,
    )


@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("weights", ["stash", "current"])
def test_a_backward_runs_at_the_weights_of_its_setting(weights: str, activations: str) -> None:
    """A middle stage of three: forward, an update, then backward of the micro-batch before it."""
    here, engine = stage(1, 3, weights=weights, activations=activations), host(2)
    for column in ("grads", "rng", "past"):
        engine.pipe_buffers[column] = [None, None]
    sent: list[Any] = []
    x, gradient = torch.randn(2, 3), torch.randn(2, 3)
    links: Any = SimpleNamespace(
        recv_activations=lambda: x.clone(),
        send_activations=sent.append,
        recv_grads=lambda: (gradient,),
        send_grads=sent.append,
    )
    updates = StageOptimizer(here, RunState(3, 1), engine, no_ties())
    updates.new_versions()
    effects = DelayEffects(lambda: updates.versions, lambda: 1)
    runner = MicroBatchRunner(here, engine, links, None, no_ties(), updates, effects)  # type: ignore[arg-type]
    for column in ("grads", "rng", "past"):
        engine.pipe_buffers[column] = [None, None]
    before = engine.module.weight.detach().clone()
    runner.recv_activation(0)
    runner.forward(0)
    runner.send_activation(0)
    with torch.no_grad(), updates.versions.updating():
        engine.module.weight.mul_(2.0)
    runner.recv_gradient(0)
    runner.backward(0)
    runner.send_gradient(0)
    output, (input_gradient,) = sent
    torch.testing.assert_close(output, nn.functional.linear(x, before, engine.module.bias))
    # Old activations with the newest weights are what "current" and "keep" means; autograd saved the weight itself.
    seen = before if weights == "stash" else 2.0 * before
    torch.testing.assert_close(input_gradient, gradient @ seen)
    torch.testing.assert_close(engine.module.weight.grad, gradient.T @ x)
    assert all(column[0] is None for column in engine.pipe_buffers.values()), "nothing is retained"
    updates.versions.assert_empty()


# -- updates ----------------------------------------------------------------------------------------------------------


def test_the_norm_is_unknown_while_a_stage_overflows() -> None:
    engine: Any = SimpleNamespace(skipped_steps=0, _step_applied=True)
    updates = StageOptimizer(stage(), RunState(2, 1), engine, no_ties())
    updates.learn(Update(25.0, 0))
    assert (updates.pipeline_norm, engine.skipped_steps, engine._step_applied) == (5.0, 0, True)
    updates.learn(Update(9.0, 1))
    assert (updates.pipeline_norm, engine.skipped_steps, engine._step_applied) == (5.0, 1, False)
    updates.learn(Update(0.0, 0))
    assert (updates.pipeline_norm, engine._step_applied) == (None, True)


# -- what is replaced in DeepSpeed's objects and modules for the time of a block --------------------------------------


def test_an_idle_optimizer_lets_the_scheduler_go_on() -> None:
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    real = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(real, 1, 0.5)
    engine: Any = SimpleNamespace(optimizer=real)

    def inside() -> None:
        with idle_optimizer(engine):
            engine.optimizer.step()
            engine.optimizer.zero_grad()
            scheduler.step()
            assert engine.optimizer.param_groups is real.param_groups
            raise KeyError

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a scheduler that steps first
        with pytest.raises(KeyError):
            inside()
    assert engine.optimizer is real
    assert (parameter.item(), parameter.grad.item()) == (1.0, 1.0)
    assert real.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("num_stages", "fp16", "kind", "norm"),
    [
        (2, True, SimpleNamespace, 6.0 * 4.0 / 8.0),  # DeepSpeed has divided by the scale of the next step
        (2, True, FP16_UnfusedOptimizer, 6.0 / 8.0),  # or not at all
        (2, True, ZeROOptimizer, 6.0),
        (2, False, SimpleNamespace, 6.0),
        (1, True, SimpleNamespace, 6.0),
    ],
)
def test_a_norm_is_left_without_the_scale_of_its_step(num_stages: int, fp16: bool, kind: type, norm: float) -> None:
    optimizer: Any = Mock(spec=kind) if kind is not SimpleNamespace else SimpleNamespace()
    optimizer.loss_scale = 8.0
    engine: Any = SimpleNamespace(optimizer=optimizer, fp16_enabled=lambda: fp16, _global_grad_norm=None)
    with norm_unscaled(engine, num_stages):
        engine._global_grad_norm = 6.0
        optimizer.loss_scale = 4.0
    assert engine._global_grad_norm == norm
    with norm_unscaled(engine, num_stages):
        engine._global_grad_norm = None  # an overflow has no norm
    assert engine._global_grad_norm is None


def test_while_clocks_are_stopped_a_step_counts_for_nothing() -> None:
    scheduler = object()
    engine: Any = SimpleNamespace(global_steps=3, global_samples=12, lr_scheduler=scheduler, skipped_steps=0)

    def inside() -> None:
        with clocks_stopped(engine):
            assert engine.lr_scheduler is None
            engine.global_steps, engine.global_samples, engine.skipped_steps = 4, 16, 1
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert vars(engine) == {"global_steps": 3, "global_samples": 12, "lr_scheduler": scheduler, "skipped_steps": 1}


def test_a_barrier_of_all_ranks_is_replaced_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    own = called.append
    monkeypatch.setattr(deepspeed.comm, "barrier", own)

    def inside() -> None:
        with barrier_replaced(lambda: called.append("meet")):
            deepspeed.comm.barrier()
            deepspeed.comm.barrier("some of them")
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert called == ["meet", "some of them"]
    assert deepspeed.comm.barrier is own


# -- what outlives an engine ------------------------------------------------------------------------------------------


def test_a_process_keeps_links_while_they_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.register_at_fork", lambda **_: None)
    process, kept = Process(), []
    for _ in range(2):
        links: Any = type("Links", (), {"usable": True})()
        process.keep(links)
        kept.append(weakref.ref(links))
        del links
    first, second = kept[0](), kept[1]()
    assert first is not None
    assert second is not None
    first.usable = False
    del first
    process.keep(second)
    assert [reference() is None for reference in kept] == [True, False]


def test_what_a_group_keeps_is_freed_with_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.register_at_fork", lambda **_: None)
    process, group = Process(), dist.ProcessGroup(0, 1)
    process.kept_by(group).sends.append(handle := {"handle"})
    assert process.kept_by(group).sends == [handle]
    assert process.kept_by(dist.ProcessGroup(0, 1)).sends == []
    kept = weakref.ref(process.kept_by(group))
    del group
    assert kept() is None


# -- failures ---------------------------------------------------------------------------------------------------------


class FakeLinks:
    def keep_if_lost(self, *_: Any) -> None:
        self.kept = True

    def tell_failure(self, text: str) -> None:
        self.told = [*getattr(self, "told", []), text]


def guard(links: Any) -> FailureGuard:
    return FailureGuard(stage(), RunState(2, 1), links, weakref.ref(links))


def fail(error: Exception) -> None:
    raise error


def test_a_failure_is_told_once_and_for_good() -> None:
    links: Any = FakeLinks()
    failures = guard(links)
    with pytest.raises(ValueError, match="bad"):
        failures.run(failures.run, fail, ValueError("bad"))
    assert links.told == ["stage 0 (rank 0) failed in call 0: ValueError: bad"]
    with pytest.raises(StageError, match="failed in call 0: ValueError: bad"):
        failures.run(list)


def test_what_every_rank_knows_does_not_end_a_run() -> None:
    links: Any = FakeLinks()
    failures = guard(links)
    with pytest.raises(StopIteration):
        failures.run(fail, OutOfDataError())
    with pytest.raises(OSError, match="full"):
        failures.run(fail, KnownToAllError(OSError("full")))
    assert failures.run(lambda: 7) == 7
    assert not hasattr(links, "told")


# -- slack ------------------------------------------------------------------------------------------------------------


def test_a_trial_takes_its_calls_and_then_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    run, drained, seen = RunState(2, 1), [], []
    run.switch("ddg")
    clock = iter(range(1000))
    links: Any = SimpleNamespace(ping=lambda tensors, times: seen.append([tuple(t.shape) for t in tensors]))
    observer: Any = SimpleNamespace(
        timestamp=lambda keep: keep(Timestamp(float(next(clock)), 0.0)),
        clock=SimpleNamespace(read=lambda wait: None),
        subscribe=lambda hop, _: [hop("hop", 0.0, back) for back in (9.0, 1.0, 1.0)],
    )
    drain = lambda: drained.append(run.call)  # noqa: E731
    tuner = SlackTuner(stage(slack="auto"), run, links, observer, torch.device("cpu"), None, drain)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda out, value, group: out.__setitem__(0, value))
    tuner.observe([torch.zeros(4, 3)])
    calls = trial_calls(run.plan)
    settled = [tuner.settle() for _ in range(calls + 2)]
    assert settled == [*[False] * calls, True, False]
    assert seen == [[(4, 3)]]
    assert len(drained) == 1
    assert run.slack == 1, "half a tick of latency is hidden by one more micro-batch in flight"
    assert not tuner.trying


# -- waits ------------------------------------------------------------------------------------------------------------


class FakeClock:
    """A second passes between two looks at it."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        self.time += 1.0
        return self.time

    def then(self, act: Any, what: str, *moments: float) -> None:
        act(what, *moments)

    def read(self, wait: bool = False) -> None:
        pass


def test_a_wait_is_timed_once_for_all_who_subscribed() -> None:
    observer, seen, others = Observer(FakeClock()), [], []
    observer.subscribe(lambda *wait: seen.append(wait), "gradient", "send")
    observer.subscribe(lambda *wait: others.append(wait), "gradient")
    with observer.waits("gradient"):
        pass
    with observer.waits("data"):  # nobody wants to know
        pass
    with pytest.raises(KeyError), observer.waits("send"):
        raise KeyError
    assert seen == [("gradient", 1.0, 2.0), ("send", 3.0, 4.0)]
    assert others == seen[:1]
    stamps: list[Timestamp] = []
    observer.timestamp(stamps.append)
    assert stamps == [Timestamp(5.0, 1.0)], "sending is no waiting for another stage"
    assert observer.seconds == {"activation": 0.0, "gradient": 1.0, "loss": 0.0}


class Waits:
    """An observer that knows what is waited for while a channel is read or written."""

    def __init__(self) -> None:
        self.now: list[str] = []
        self.seen: list[tuple[str, str]] = []

    @contextmanager
    def waits(self, what: str) -> Iterator[None]:
        self.now.append(what)
        yield
        self.now.pop()

    def channel(self, *messages: Message) -> Any:
        coming = iter(messages)

        def take(*_: Any, what: str) -> Message:
            self.seen.append(("+".join(self.now), what))
            return next(coming)

        def post(*_: Any, **__: Any) -> None:
            self.seen.append(("+".join(self.now), "post"))

        return SimpleNamespace(take=take, post=post, listen=lambda: None)


def test_links_say_what_they_wait_for() -> None:
    waits, here = Waits(), ("train_batch", 0, 1)
    links = Links([[0]], 0, DDGPlan(1), observer=waits)
    info = {"tuple": False, "needed": "1", "here": here, "riders": {"rows": ((0, 1),)}}
    first = Message(Kind.DATA, info, (torch.ones(1),))
    second = Message(Kind.DATA, {**info, "here": None}, (torch.ones(1),))
    links._activations_in = waits.channel(first, second)
    links._activations_out = links._gradients_out = waits.channel()
    links._gradients_in = waits.channel(Message(Kind.DATA, {"scale": 1.0}, (torch.ones(1),)))
    links._losses_in = waits.channel(Message(Kind.DATA, {"mean": 2.0}), Message(Kind.DATA, {"shared": 1.0}))
    assert links.begin(here, ready=True, with_data=True) is Kind.BEGIN
    assert links.riders == {"rows": ((0, 1),)}
    for _ in range(2):
        links.send_activations(links.recv_activations())
        assert links.riders == {}, "what came with the first went on with the first"
    links.recv_grads()
    links.send_grads([None])
    links.share(0.0)
    assert links.next_loss() == {"mean": 2.0}  # has come already, so it is no wait
    assert waits.seen == [
        ("activation", "the start of train_batch"),
        ("send", "post"),
        ("activation", "an activation"),
        ("send", "post"),
        ("gradient", "a gradient"),
        ("send", "post"),
        ("loss", "the last stage"),
        ("loss", "the last stage"),
    ]


def test_fetching_is_a_wait_for_data() -> None:
    waits = Waits()

    def data() -> Iterator[Any]:
        waits.seen.append(("+".join(waits.now), "next"))
        yield torch.ones(1, 1), torch.ones(1)

    feed = Feed(True, True, StagePeers([]), observer=waits)
    assert feed.fetch(data(), 1, None)
    assert waits.seen == [("data", "next")]
    assert waits.now == []


class Lines(list[str]):
    """As much of a `Log` as a recorder uses."""

    begin = flush = flush_if_due = close = lambda *_: None
    add = list.append


def traced(run: RunState, lines: Lines, observer: Observer) -> tuple[TraceWriter, Any]:
    """A trace of a stage whose instructions take a second each."""
    recorder = Recorder(lines, 0, observer.clock)  # type: ignore[arg-type]
    observer.subscribe(recorder.waited, "activation", "data")

    def receive() -> None:
        with observer.waits("activation") if run.delayed else nullcontext():
            pass

    instruction_map = {RecvActivation: receive, ForwardPass: lambda: None}
    engine: Any = SimpleNamespace(_INSTRUCTION_MAP=instruction_map)
    return TraceWriter(run, engine, recorder), engine


@pytest.mark.parametrize("schedule", ["ddg", "1f1b"])
def test_a_receive_is_recorded_once_on_either_schedule(schedule: str) -> None:
    run, lines, observer = RunState(2, 1, schedule=schedule), Lines(), Observer(FakeClock())
    tracer, engine = traced(run, lines, observer)
    own = engine._INSTRUCTION_MAP

    def execute(steps: Any) -> None:
        for step in steps:
            engine._INSTRUCTION_MAP[step]()

    tracer.execute(execute, [RecvActivation, ForwardPass])
    assert lines == ['["0F0", 3.000000, 4.000000, {"activation": 1.000000}]']
    assert engine._INSTRUCTION_MAP is own


def test_an_evaluation_is_part_of_the_script() -> None:
    run, lines, observer = RunState(2, 1, schedule="ddg"), Lines(), Observer(FakeClock())
    tracer, engine = traced(run, lines, observer)
    recorder: Any = tracer._recorder
    recorder._left = 0.0
    with torch.no_grad():
        tracer.execute(lambda _: engine._INSTRUCTION_MAP[RecvActivation](), None)  # from 1 to 2
    with observer.waits("data"):  # from 3 to 4
        pass
    tracer.execute(lambda _: engine._INSTRUCTION_MAP[ForwardPass](), None)
    assert lines == ['["0F0", 5.000000, 6.000000, {"script": 3.000000, "data": 1.000000}]']


# -- the console ------------------------------------------------------------------------------------------------------


def test_a_muted_host_neither_records_nor_prints(capsys: pytest.CaptureFixture[str]) -> None:
    monitor = SimpleNamespace(enabled=True)
    timer = SimpleNamespace(event_timers=[1, 2], elapsed=lambda reset: 4000.0)
    engine: Any = SimpleNamespace(
        monitor=monitor,
        timers=lambda name: timer,
        global_steps=9,
        train_batch_size=lambda: 8,
        wall_clock_breakdown=lambda: False,
    )
    console = Console(stage(), engine)
    assert console.period(5) == 5
    with console.host_muted():
        assert not engine.monitor.enabled
        assert console.period(5) > 10**9
        assert console.period(None) is None
    assert engine.monitor is monitor
    console.print_call(Loss(6, 0.5), 6, {})
    assert capsys.readouterr().out == (
        "steps: 9 loss: 0.5000 (of call 6, counted from 0) iter time (s): 2.000 samples/sec: 4.000\n"
    )
