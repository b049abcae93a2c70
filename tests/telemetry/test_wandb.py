"""Weights & Biases through DeepSpeed's config: it shows what the CSV file has, though it takes steps in order only."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ds_ddg.telemetry.wandb import InOrder
from helpers import toy
from helpers.distributed import GetRanks, spawn
from helpers.monitors import recorded

Rows = dict[int, dict[str, float]]
"""Values by step and name."""


class Shelf(ModuleType):
    """As W&B treats steps: a value of an older one than the newest is dropped."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.rows: Rows = {}

    def init(self, **_: Any) -> None:
        self.run = "started"

    def log(self, data: dict[str, float], step: int, commit: Any = None) -> None:
        if step >= max(self.rows, default=0):
            self.rows.setdefault(step, {}).update(data)


def train(rank: int, world_size: int, directory: str, ddg: dict[str, Any], real: bool) -> Rows:
    """Each way of ending a stretch of calls, with an evaluation while micro-batches are in flight."""
    shelf = Shelf()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MODE": "offline", "DIR": directory, "SILENT": "true"}.items():
            patch.setenv(f"WANDB_{name}", value)
        if not real:
            patch.setitem(sys.modules, "wandb", shelf)
        monitors = {
            "wandb": {"enabled": True, "project": "ddg", "group": "tests", "team": "ours"},
            "csv_monitor": {"enabled": True, "output_path": directory, "job_name": "job"},
        }
        engine = toy.engine(world_size, 2, "sgd", ddg, steps_per_print=None, **monitors)
        data = toy.batches(40)
        for schedule, calls in (("ddg", 5), ("1f1b", 2), ("ddg", 4)):
            engine.schedule = schedule
            for call in range(calls):
                engine.train_batch(data)
                if call == 2:
                    engine.eval_batch(toy.batches(2))
        engine.drain()
        engine.eval_batch(toy.batches(2))
        if real and rank == 0:
            import wandb

            wandb.finish()
    return shelf.rows


def by_step(directory: Path) -> Rows:
    """What the CSV files have."""
    rows: Rows = {}
    for name, values in recorded(directory).items():
        for step, value in values:
            rows.setdefault(step, {})[name] = value
    return rows


def assert_same_as_csv(rows: Rows, directory: Path) -> None:
    exact = by_step(directory)
    files = {step: {name: pytest.approx(value) for name, value in row.items()} for step, row in exact.items()}
    assert {step: {name.replace("/", "_"): v for name, v in row.items()} for step, row in rows.items()} == files
    names = set().union(*rows.values())
    assert {"Train/Samples/train_loss", "Train/Samples/eval_loss", "Train/DDG/stage0/staleness"} < names
    assert sorted(rows) == [8 * (call + 1) for call in range(11)]
    assert all("Train/Samples/train_loss" in row for row in rows.values())


@pytest.mark.parametrize("ddg", [{}, {"slack": 1}, {"loss": "exact"}], ids=str)
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.proves("monitors (W&B), values with the samples of their call", modes="ddg")
def test_nothing_is_dropped(ranks: GetRanks, tmp_path: Path, stages: int, ddg: dict[str, Any]) -> None:
    assert_same_as_csv(ranks(stages).run(train, str(tmp_path), ddg, False)[0], tmp_path)


def test_offline_run_of_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    spawn(train, 2, str(tmp_path), {}, True)
    assert_same_as_csv(history(tmp_path), tmp_path)


def history(directory: Path) -> Rows:
    """What W&B would send to its server."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = directory.glob("wandb/offline-run-*/*.wandb")
    rows: Rows = {}
    for content in records(path.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            values = {name: json.loads(value) for name, value in items.items() if name.startswith("Train")}
            rows[record.history.step.num] = values
    return rows


def records(data: bytes) -> Iterator[bytes]:
    """Of LevelDB's log format, behind W&B's own 7 bytes: checksum, length, whether more follows; blocks of 32 KiB."""
    position, record = 7, b""
    while position + 7 <= len(data):
        rest = -position % 2**15
        if 0 < rest < 7:
            position += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # all of it, or its end
            yield record
            record = b""


def test_values_wait_for_older_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    ordered = InOrder(SimpleNamespace(write_events=sent.extend, enabled="yes"))
    assert ordered.enabled == "yes"
    ordered.write_events([("now", 0.0, 8)])
    ordered.complete(8)
    ordered.write_events([("rate", 1.0, 24), ("rate", 2.0, 16), ("loss", 3.0, 8)])
    assert sent == [("now", 0.0, 8), ("loss", 3.0, 8)]
    ordered.write_events([("loss", 4.0, 16)])
    ordered.complete(16)
    assert sent[2:] == [("rate", 2.0, 16), ("loss", 4.0, 16)]
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None))
    ordered._at_exit()
    assert len(sent) == 4, "the script has ended the run"
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run="going on"))
    ordered._at_exit()
    assert sent[4:] == [("rate", 1.0, 24)]
