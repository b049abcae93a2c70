"""What a run records of itself: every operation of the plan, at no change to the training, and it survives a kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_ddg.analysis.trace_reader import read
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.schedules.plan import Op
from ds_ddg.schedules.synchronous import OneFOneBPlan
from ds_ddg.telemetry.jsonl import Log
from ds_ddg.telemetry.recorder import Recorder
from helpers import toy
from helpers.distributed import GetRanks

CALLS = 5


def train(rank: int, world_size: int, folder: str) -> tuple[bool, list[str], list[str]]:
    """With a trace and without one: whether they agree, what a profile names, and what it names without one."""
    states = []
    for trace in (f"{folder}/ddg", None):
        engine = toy.engine(world_size, 2, "sgd", {} if trace is None else {"trace": trace})
        data = toy.batches(2 * CALLS + 2)
        for call in range(CALLS):
            engine.train_batch(data)
            if call == 2:
                engine.eval_batch(toy.batches(2))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            engine.eval_batch(toy.batches(2))  # named too, and not recorded
            engine.drain()
        names = sorted({event.key for event in profile.key_averages() if event.key.startswith("ds_ddg.")})
        states.append((toy.state(engine.module), names))
        del engine
    engine = toy.engine(world_size, 2, "sgd", {"trace": f"{folder}/1f1b", "enabled": False})
    data = toy.batches(2 * CALLS)
    own = engine._INSTRUCTION_MAP
    for _ in range(CALLS):
        engine.train_batch(data)
    put_back = engine._INSTRUCTION_MAP is own
    engine.destroy()
    (ours, names), (its, same_names) = states
    equal = all(torch.equal(a, b) for a, b in zip(ours, its, strict=True)) and put_back
    return equal, names, same_names


def test_records_every_operation_and_changes_nothing(ranks: GetRanks, tmp_path: Path) -> None:
    drained = {"ds_ddg.BackwardPass", "ds_ddg.ReduceGrads", "ds_ddg.UpdateWeights", "ds_ddg.RecvGrad"}
    for stage, (equal, names, same_names) in enumerate(ranks(3).run(train, str(tmp_path))):
        assert equal
        assert names == same_names
        assert set(names) >= {"ds_ddg.ForwardPass"} | (drained if stage < 2 else {"ds_ddg.RecvActivation"})
    for name, plan in (("ddg", DDGPlan(3, 2)), ("1f1b", OneFOneBPlan(3, 2))):
        run = read(tmp_path / name)
        assert (run.plan.name, run.plan.num_stages, run.plan.micro_batches) == (name, 3, 2)
        for stage, records in enumerate(run.stages):
            assert [event.op for event, _ in records] == list(plan.stream(stage, CALLS, drain=True))
            gaps = {reason for _, gap in records for reason in gap}
            assert gaps >= {"script", "data", "send"} | ({"gradient"} if stage < 2 else {"activation"})
            assert run.timeline.peak_activations(stage) == plan.activations(stage)
            assert run.timeline.staleness(stage) == plan.staleness(stage)
        assert run.disorder <= 0, "processes of a machine have one clock"
        for share in run.shares():
            assert 0 < share.busy < 1
            assert share.busy + sum(share.gaps.values()) == pytest.approx(1, abs=0.05)


def replaced(rank: int, world_size: int, folder: str) -> list[str]:
    """What stands in place of a method of an object."""
    engine = toy.engine(world_size, 1, "sgd", {"trace": folder})
    engine.train_batch(toy.batches(1))
    engine.drain()
    return [
        name for thing in (engine._links, engine._calls.feed) for name in vars(thing) if hasattr(type(thing), name)
    ]


def test_a_trace_replaces_no_method_of_an_object(ranks: GetRanks, tmp_path: Path) -> None:
    assert ranks(2).run(replaced, str(tmp_path)) == [[], []]


def refused(rank: int, world_size: int, folder: str) -> str:
    try:
        toy.engine(world_size, 1, "sgd", {"trace": folder})
    except ValueError as error:
        return str(error)
    return ""


def test_a_folder_that_cannot_be_written_is_named(ranks: GetRanks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for message in ranks(2).run(refused, f"{tmp_path}/file/trace"):
        assert message.startswith(f'"ddg": {{"trace": \'{tmp_path}/file/trace\'}} cannot be written: ')


def entries(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_of_a_long_run_the_end_is_kept(tmp_path: Path) -> None:
    log = Log(tmp_path / "stage0", limit=1000)
    log.begin("rank", {"stage": 0})
    for number in range(300):
        log.add(f'["0F{number}", 0.0, 0.0, {{}}]')
        if number % 10 == 9:
            log.flush()
    log.close()
    old, new = entries(tmp_path / "stage0.older.jsonl"), entries(tmp_path / "stage0.jsonl")
    assert old[0] == new[0] == {"rank": {"stage": 0}}
    kept = [line[0] for line in old[1:] + new[1:]]
    assert kept == [f"0F{number}" for number in range(300 - len(kept), 300)]
    assert 20 < len(kept) < 100
    Log(tmp_path / "stage0").close()
    assert not (tmp_path / "stage0.older.jsonl").exists(), "of the run before"


def test_gaps_are_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of our own: 1 s in a wait inside the call, 2 s of script between calls of which 0.5 s are data."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def passes(seconds: float) -> Callable[..., None]:
        def run(*_: Any) -> None:
            now[0] += seconds

        return run

    log = Log(tmp_path / "stage1")
    recorder = Recorder(log, 1)
    fetch = recorder.waiting("data", passes(0.5))
    for _ in range(2):
        fetch()
        recorder.waiting("activation", passes(1))()
        recorder.operation("F", passes(3))()
        recorder.operation("B", passes(6))()
        recorder.waiting("send", passes(0.25))()
        recorder.end(flush=True)
        recorder.waiting("loss", passes(0.5))()
        now[0] += 1.5
    log.close()
    second = entries(tmp_path / "stage1.jsonl")[3]
    waits = {"send": 0.25, "loss": 0.5, "script": 1.5, "data": 0.5, "activation": 1}
    assert second == ["1F1", 14.25, 17.25, waits]


def record_for_ever(folder: str, ready: Any) -> None:
    log = Log(Path(folder) / "stage0-replica0-slice0")
    recorder = Recorder(log, 0, run=1, stages=1, replica=0, slice=0)
    recorder.under(schedule="ddg", micro_batches=1, slack=0)
    steps = [recorder.operation(kind, lambda: None) for kind in "FBU"]
    while True:
        for step in steps:
            step()
        recorder.end(flush=False)
        time.sleep(0.001)
        if log._path.stat().st_size > 2_000:
            ready.set()


def test_a_killed_rank_leaves_what_it_had(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=record_for_ever, args=(str(tmp_path), ready), daemon=True)
    process.start()
    assert process.pid is not None
    assert ready.wait(20)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    records = read(tmp_path).stages[0]
    assert [event.op for event, _ in records[:3]] == [Op("F", 0, 0), Op("B", 0, 0), Op("U", 0, 0)]
    assert len(records) > 20
