"""Times of a device, without one: a stand-in whose work takes as long as the test says, while the host goes on.

On a GPU: tests/gpu.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from ds_ddg.analysis.trace_reader import read
from ds_ddg.engine.auto_slack import trial_calls
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.telemetry.clock import DeviceClock, HostClock, clock_for
from ds_ddg.telemetry.delay_effects import DelayEffects
from ds_ddg.telemetry.jsonl import Log
from ds_ddg.telemetry.observer import Observer, Timestamp
from ds_ddg.telemetry.recorder import Recorder, _close
from ds_ddg.telemetry.stage_metrics import StageMeter
from helpers import toy
from helpers.distributed import GetRanks

CPU = torch.device("cpu")


class Device:
    """A device and its host, in simulated time; what is launched runs in order and takes its time.

    Args:
        rate: seconds that its clock counts in one of the host's.
    """

    def __init__(self, rate: float = 1.0) -> None:
        self.now, self.free_at, self.rate = 0.0, 0.0, rate
        self.defect = ""

    def launch(self, seconds: float) -> None:
        self.free_at = max(self.now, self.free_at) + seconds

    def copy_arrives(self, at: float) -> None:
        """What is launched from here on has to wait for it, as for a message."""
        self.free_at = max(self.free_at, at)

    def current_stream(self, device: torch.device) -> Device:
        return self

    def Event(self, enable_timing: bool) -> Event:  # noqa: N802, as torch calls it
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self, stream: Device) -> None:
        self.at = max(stream.now, stream.free_at)

    def query(self) -> bool:
        if self.device.defect:
            raise RuntimeError(self.device.defect)
        return self.device.now >= self.at

    def synchronize(self) -> None:
        if self.device.defect:
            raise RuntimeError(self.device.defect)
        self.device.now = max(self.device.now, self.at)

    def elapsed_time(self, end: Event) -> float:
        assert self.query()
        assert end.query(), "torch refuses an event that has not passed"
        return float(np.float32(1e3 * self.device.rate * (end.at - self.at)))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr("time.perf_counter", lambda: made.now)
    return made


def test_the_host_knows_the_time_at_once() -> None:
    clock = clock_for(CPU)
    assert isinstance(clock, HostClock)
    seen: list[Any] = []
    before = time.perf_counter()
    clock.then(lambda *all_of_it: seen.extend(all_of_it), "what", clock.now(), clock.now())
    assert seen[0] == "what"
    assert before <= seen[1] <= seen[2] <= time.perf_counter()


def test_a_lead_of_the_host_is_no_wait(device: Device) -> None:
    """The host waits 2 s for a message; the device has work for 5, then for none."""
    observer = Observer(DeviceClock(CPU, device))
    for work in (5.0, 0.0):
        device.launch(work)
        with observer.waits("loss"):
            device.now += 2.0
        device.launch(1.0)
        marks: list[Timestamp] = []
        observer.timestamp(marks.append)
        assert not marks, "the device has not done it"
        observer.clock.read()
        assert not marks
        observer.clock.read(wait=True)
        assert marks[0].time == device.now == device.free_at
        waited = 0.0 if work else 2.0
        assert observer.seconds["loss"] == marks[0].waited == pytest.approx(waited)


def meter_of(device: Device) -> tuple[StageMeter, Callable[[float, float], None], Callable[[], float]]:
    """A meter, a call that waits and works for so long, and the busy share by the meter."""
    observer = Observer(DeviceClock(CPU, device))
    versions: Any = SimpleNamespace(version=0, alive=1, in_flight=0)
    meter = StageMeter(0, observer, DelayEffects(lambda: versions, lambda: 0), 1)

    def call(wait: float, work: float) -> None:
        with observer.waits("loss"):
            device.copy_arrives(max(device.now, device.free_at) + wait)
        meter.begin_call(0)
        device.launch(work)
        meter.end_call()

    return meter, call, lambda: meter.now(versions, 1)[2]


def test_busy_share_of_calls_that_are_known(device: Device) -> None:
    """The host is far ahead: what is told is that of the last call that the device has done, and never a mixture."""
    _, call, busy = meter_of(device)
    for wait, work in ((0.0, 4.0), (1.0, 3.0), (3.0, 1.0), (2.0, 2.0)):
        call(wait, work)
    assert busy() == 0.0, "nothing is known"
    shares = []
    for now in (9.0, 13.0, 17.0):
        device.now = now
        call(0.0, 4.0)  # which looks at what has passed
        shares.append(busy())
    assert shares == [0.75, 0.25, 0.5]


def test_a_period_with_nothing_known_repeats_the_last_call(device: Device) -> None:
    """A monitor without steps_per_print makes every call a period, and the host may be a call ahead."""
    meter, call, _ = meter_of(device)
    versions: Any = SimpleNamespace(version=0, alive=1, in_flight=0)
    for now in (0.0, 0.0, 8.0):
        device.now = now
        call(1.0, 3.0)
    shares = []
    for _ in range(3):
        meter.end_period(versions, 1)
        assert meter.row is not None
        shares.append(meter.row[2])
        call(1.0, 3.0)
    assert shares == [pytest.approx(6 / 7, abs=1e-4), 0.75, 0.75], "two calls less the first wait, then the last one"


def test_a_pause_is_not_counted(device: Device) -> None:
    """30 s between a drain and the next call, as for saving a checkpoint; the first message comes late besides."""
    meter, call, busy = meter_of(device)
    call(1.0, 3.0)
    device.now = device.free_at
    meter.forget()
    device.now += 30.0
    call(2.0, 1.0)
    call(1.0, 1.0)
    device.now = device.free_at
    call(0.0, 0.0)
    versions: Any = SimpleNamespace(version=0, alive=1, in_flight=0)
    meter.end_period(versions, 1)
    assert meter.row is not None
    assert meter.row[2] == pytest.approx(2 / 3, abs=1e-4), "two calls from the first message on: 1 s, 1 s waiting, 1 s"
    assert busy() == 1.0


def test_reading_waits_for_nothing_and_keeps_the_order(device: Device) -> None:
    clock = DeviceClock(CPU, device)
    seen: list[str] = []
    for seconds in (1.0, 3.0):
        device.launch(seconds)
        clock.then(lambda what, now: seen.append(f"{what} at {now}"), "done", clock.now())
    clock.then(seen.append, "plan")  # without a moment of its own, and still behind them
    clock.read()
    device.now = 2.0
    assert seen == []
    clock.read()
    assert (seen, device.now) == (["done at 1.0"], 2.0)
    clock.read(wait=True)
    assert (seen, device.now) == (["done at 1.0", "done at 4.0", "plan"], 4.0)


def test_what_is_done_later_is_bounded(device: Device) -> None:
    """A long evaluation asks for nothing in between."""
    clock = DeviceClock(CPU, device)
    seen: list[float] = []
    for _ in range(1000):
        device.launch(0.1)
        clock.then(lambda _, now: seen.append(now), "done", clock.now())
        device.now += 0.1
    assert len(seen) > 700


@pytest.mark.parametrize("rate", [1.0, 1 + 1e-5, 1 - 1e-5])
def test_clocks_do_not_drift_apart_in_a_long_run(device: Device, rate: float) -> None:
    """A week of ticks of 50 ms, some of them; floats of 32 bits and a clock that is .00001 off, 6 s in a week."""
    device.rate = rate
    clock = DeviceClock(CPU, device)
    spans: list[tuple[float, float]] = []
    for hour in range(24 * 7):
        device.now = max(device.now, 3600.0 * hour)
        for _ in range(20):
            start = clock.now()
            device.launch(0.05)
            clock.then(lambda _, start, end: spans.append((start, end)), "tick", start, clock.now())
            device.now = device.free_at + 1e-4
            clock.read()
    assert spans == sorted(spans)
    truth = [(3600.0 * hour + 0.0501 * tick) for hour in range(24 * 7) for tick in range(20)]
    assert [start for start, _ in spans] == pytest.approx(truth, rel=0, abs=0.06)
    lengths = [end - start for start, end in spans]
    assert lengths == pytest.approx([0.05] * len(spans), rel=0, abs=2e-3 if rate == 1.0 else 0.051)
    assert np.median(lengths) == pytest.approx(0.05, abs=1e-4)


def test_clocks_meet_again_when_the_device_is_waited_for(device: Device) -> None:
    device.rate = 1 - 1e-5
    clock = DeviceClock(CPU, device)
    device.now, seen = 3600.0, []
    device.launch(10.0)  # far ahead of the host, so what it is launched at tells little
    clock.then(lambda _, now: seen.append(now), "done", clock.now())
    clock.read(wait=True)
    clock.then(lambda _, now: seen.append(now), "idle", clock.now())
    clock.read()
    assert seen[0] == pytest.approx(3610.0 * device.rate, abs=1e-3)
    assert seen[1] == 3610.0


def test_every_moment_must_have_passed(device: Device) -> None:
    """A script may leave another stream current between the two."""
    clock = DeviceClock(CPU, device)
    side = Device()
    seen: list[float] = []
    device.launch(5.0)
    start = clock.now()
    with mock.patch.object(device, "current_stream", return_value=side):
        end = clock.now()
    clock.then(lambda _, start, end: seen.extend((start, end)), "data", start, end)
    clock.read()
    assert not seen
    clock.read(wait=True)
    assert seen[0] == 5.0


def test_gaps_of_the_device_are_named_by_what_it_waited_for(tmp_path: Path, device: Device) -> None:
    """As in test_record.py; here the host is a forward ahead when the message is late, and the script takes 2 s."""
    log = Log(tmp_path / "stage0-replica0-slice0")
    recorder = Recorder(log, 0, DeviceClock(CPU, device), run=1, stages=1, replica=0, slice=0)
    recorder.under(schedule="ddg", micro_batches=1, slack=0)

    def message(_: Any = None) -> None:
        device.now += 4.0  # the host waits for it
        device.copy_arrives(device.now + 0.5)

    fetch = recorder.waiting("data", lambda: None)
    for _ in range(2):
        fetch()
        recorder.operation("F", lambda: device.launch(3.0))()
        recorder.waiting("gradient", message)()  # 1.5 s more than the forward takes
        recorder.operation("B", lambda: device.launch(6.0))()
        recorder.operation("U", lambda: device.launch(1.0))()
        recorder.end(flush=False)
        device.now += 9.0  # the device has 7.5 s of work, then waits for the script
    recorder.end(flush=True)
    found = [(str(event.op), event.start, event.end, gap) for event, gap in read(tmp_path).stages[0]]
    idle = {"gradient": 1.5}
    names = [name for name, *_ in found]
    assert names == ["0F0", "0B0", "0U0", "0F1", "0B1", "0U1"]
    assert [(start, end) for _, start, end, _ in found] == [
        (0, 3), (4.5, 10.5), (10.5, 11.5), (13, 16), (17.5, 23.5), (23.5, 24.5)
    ]  # fmt: skip
    gaps = [{what: seconds for what, seconds in gap.items() if seconds} for *_, gap in found]
    assert gaps == [{}, idle, {}, {"script": 1.5}, idle, {}]


def test_a_device_that_failed_leaves_what_is_known(tmp_path: Path, device: Device) -> None:
    log = Log(tmp_path / "stage0")
    recorder = Recorder(log, 0, DeviceClock(CPU, device))
    recorder.operation("F", lambda: device.launch(1.0))()
    device.now += 2.0
    recorder.end(flush=False)
    recorder.operation("F", lambda: device.launch(1.0))()
    device.defect = "device-side assert triggered"
    with pytest.raises(RuntimeError, match="device-side assert"):
        recorder.end(flush=True)
    with pytest.raises(RuntimeError, match="device-side assert"):
        _close(recorder._clock, log)
    device.defect = ""  # at the end of the process it is asked once more
    assert '"0F0"' in (tmp_path / "stage0.jsonl").read_text()


# -- in the engine ----------------------------------------------------------------------------------------------------


class Late:
    """A device that does everything a little after the host has asked for it."""

    LAG = 0.003  # seconds

    def current_stream(self, device: torch.device) -> Late:
        return self

    def Event(self, enable_timing: bool) -> LateEvent:  # noqa: N802
        return LateEvent()


class LateEvent:
    def record(self, stream: Late) -> None:
        self.at = time.perf_counter() + stream.LAG

    def query(self) -> bool:
        return time.perf_counter() >= self.at

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.at - time.perf_counter()))

    def elapsed_time(self, end: LateEvent) -> float:
        return 1e3 * (end.at - self.at)


CALLS = 40


def train(rank: int, world_size: int, folder: str) -> tuple[float, int, list[torch.Tensor]]:
    """Busy share, slack chosen, weights."""
    with mock.patch("ds_ddg.engine.engine.clock_for", side_effect=lambda device: DeviceClock(device, Late())):
        engine = toy.engine(world_size, 1, "sgd", {"slack": "auto", "trace": folder})
    assert engine.plan.slack == 0
    data = toy.batches(CALLS)
    for _ in range(CALLS):
        engine.train_batch(data)
    busy = engine.ddg_stats()["busy"]
    engine.drain()
    return busy, engine.plan.slack, toy.state(engine.module)


@pytest.mark.usefixtures("one_thread")
def test_engine_measures_records_and_trains_by_it(ranks: GetRanks, tmp_path: Path) -> None:
    made = ranks(3).run(train, str(tmp_path))
    slack = made[0][1]
    assert [s for _, s, _ in made] == [slack] * 3
    trial = trial_calls(DDGPlan(3))
    assert trial < CALLS
    oracle = toy.reference(3)
    data = toy.batches(CALLS)
    for call in range(CALLS):
        if call == trial:
            oracle.drain()
            oracle.delays = [(2 - k) * (1 + slack) for k in range(3)]
        oracle.train_batch(data)
    oracle.drain()
    run = read(tmp_path)
    for stage, (busy, _, state) in enumerate(made):
        assert 0 < busy <= 1
        assert all(torch.equal(a, b) for a, b in zip(state, toy.state(oracle.stages[stage]), strict=True))
        numbers = [event.op.micro_batch for event, _ in run.stages[stage] if event.op.kind == "F"]
        assert numbers == sorted(set(numbers))
        assert numbers[-1] == CALLS - 1
