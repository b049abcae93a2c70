"""The engine's collaborators, each alone: built without an engine, with what they need handed in."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ds_ddg.comm.failures import FailureGuard, KnownToAllError, OutOfDataError
from ds_ddg.comm.loss_exchange import Loss, Update
from ds_ddg.comm.p2p import StageError
from ds_ddg.config import DDGConfig
from ds_ddg.engine.auto_slack import SlackTuner, trial_calls
from ds_ddg.engine.micro_batch import MicroBatchRunner
from ds_ddg.stage import RunState, Stage
from ds_ddg.telemetry.console import Console
from ds_ddg.telemetry.stage_metrics import Timestamp
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
    runner = MicroBatchRunner(here, engine, links, None, no_ties(), updates)  # type: ignore[arg-type]
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
    links: Any = SimpleNamespace(
        timestamp=lambda keep: keep(Timestamp(float(next(clock)), 0.0)),
        clock=SimpleNamespace(read=lambda wait: None),
        ping=lambda tensors: seen.append([tuple(t.shape) for t in tensors]) or 0.5,
    )
    tuner = SlackTuner(stage(slack="auto"), run, links, torch.device("cpu"), None, lambda: drained.append(run.call))
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
