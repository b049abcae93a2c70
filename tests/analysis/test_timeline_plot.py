"""Pictures compared with pictures; files only for what a viewer needs from them."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from ds_ddg.analysis.timeline_plot import clock, save, text, trace
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.schedules.interleaved import InterleavedPlan
from ds_ddg.schedules.plan import Op
from ds_ddg.schedules.simulator import Cost, replay
from ds_ddg.schedules.synchronous import DualPipeVPlan, OneFOneBPlan
from ds_ddg.schedules.zero_bubble import ZeroBubbleVPlan
from helpers.paths import ROOT


def lines(picture: str) -> list[str]:
    """A picture as typeset below, without the indentation of the source."""
    return [line.strip() for line in picture.strip().splitlines()]


def test_grid_is_the_figure_of_the_paper() -> None:
    timeline = replay(DDGPlan(4), 6, drain=True)
    assert lines(text(timeline)) == lines("""
        stage 0 | F0    F1    F2    F3B0  F4B1  F5B2  B3    B4    B5
        stage 1 | F0    F1    F2B0  F3B1  F4B2  F5B3  B4    B5
        stage 2 | F0    F1B0  F2B1  F3B2  F4B3  F5B4  B5
        stage 3 | F0B0  F1B1  F2B2  F3B3  F4B4  F5B5
    """)


def test_grid_with_updates() -> None:
    timeline = replay(DDGPlan(3, 2), 2, drain=True)
    assert lines(text(timeline, updates=True)) == lines("""
        stage 0 | F0     F1     F2B0   F3B1*  B2     B3*
        stage 1 | F0     F1B0*  F2B1   F3B2*  B3*
        stage 2 | F0B0   F1B1*  F2B2   F3B3*
    """)


def test_clock_shows_the_bubble_of_1f1b() -> None:
    assert lines(clock(replay(OneFOneBPlan(3), 2))) == lines(
        """
        stage 0 | F0 .  .  .  .  .  .  B0--- F1 .  .  .  .  .  .  B1---
        stage 1 | .  F0 .  .  .  B0--- .  .  .  F1 .  .  .  B1--- .  .
        stage 2 | .  .  F0 B0--- .  .  .  .  .  .  F1 B1--- .  .  .  .
    """
    )


def test_second_chunks_are_marked() -> None:
    assert lines(clock(replay(DualPipeVPlan(1, 2), 1))) == lines("""
        stage 0 | F0  F0' F1  B0'---- F1' B0----- B1'---- B1-----
    """)
    assert lines(text(replay(DualPipeVPlan(1, 2), 1))) == ["stage 0 | F0     F0'    F1B0'  F1'B0  B1'    B1"]


def test_clock_shows_that_ddg_has_none() -> None:
    assert lines(clock(replay(DDGPlan(3), 5))) == lines("""
        stage 0 | F0 F1 F2 .  .  .  .  B0--- F3 B1--- F4 B2--- .  .
        stage 1 | .  F0 F1 .  .  B0--- F2 B1--- F3 B2--- F4 B3--- .
        stage 2 | .  .  F0 B0--- F1 B1--- F2 B2--- F3 B3--- F4 B4---
    """)


def test_clock_aligns_long_numbers_and_long_updates() -> None:
    timeline = [(Op.parse(op), start, end) for op, start, end in [
        ("0F99", 5.0, 5.1), ("0F100", 5.1, 5.2), ("0B99", 5.2, 5.4), ("0U99", 5.4, 5.5), ("1F99", 5.1, 5.2),
    ]]  # fmt: skip
    assert lines(clock(timeline)) == lines("""
        stage 0 | F99  F100 B99------ U99
        stage 1 | .    F99  .    .    .
    """)
    assert lines(clock(timeline, unit=0.05))[1] == "stage 1 | .    .    F99------ .    .    .    .    .    ."


def test_stages_without_events_and_many_stages_keep_rows() -> None:
    timeline = [(Op("F", 10, 0), 0.0, 1.0), (Op("F", 0, 0), 0.0, 1.0)]
    rows = text(timeline).splitlines()
    assert (rows[0], rows[1], rows[10]) == ("stage  0 | F0", "stage  1 |", "stage 10 | F0")


@pytest.mark.parametrize("unit", [0, -1.0])
def test_unit_must_be_positive(unit: float) -> None:
    with pytest.raises(ValueError, match=f"must be above 0, got {unit}"):
        clock(replay(DDGPlan(2), 2), unit)


def test_nothing_to_draw() -> None:
    assert (text([]), clock([]), trace([])["traceEvents"]) == ("", "", [])


def test_trace_has_one_process_per_stage_and_microseconds() -> None:
    timeline = [
        (op, start + 100, end + 100) for op, start, end in replay(DDGPlan(2), 2, Cost(forward=0.5, backward=1))
    ]
    events = trace(timeline)["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {0: "stage 0", 1: "stage 1"}
    boxes = [(e["pid"], e["name"], e["cat"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert boxes[:3] == [
        (0, "F0", "forward", 0, 0.5e6),
        (0, "F1", "forward", 0.5e6, 0.5e6),
        (0, "B0", "backward", 2e6, 1e6),
    ]
    assert (1, "U1", "update", 3.5e6, 0) in boxes


def test_json_file_holds_titled_timelines_side_by_side(tmp_path: Path) -> None:
    save({"ddg": replay(DDGPlan(2), 3), "1f1b": replay(OneFOneBPlan(2), 3)}, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {0: "ddg stage 0", 1: "ddg stage 1", 2: "1f1b stage 0", 3: "1f1b stage 1"}


def test_svg_numbers_every_box_and_png_opens(tmp_path: Path) -> None:
    timeline = replay(DDGPlan(2, 2), 2, Cost(update=0.5))
    save({"planned": timeline}, tmp_path / "plan.svg")
    svg = ElementTree.parse(tmp_path / "plan.svg").getroot()
    labels = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"planned", "stage 0", "stage 1", "forward", "backward", "update"} <= set(labels)
    numbers = sorted(str(op.micro_batch) for op, _, _ in timeline if op.kind != "U")
    ticks = ["0", "2"]  # of the time axis
    assert sorted(label for label in labels if label in {"0", "1", "2", "3"}) == sorted(numbers + ticks)
    save(timeline, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_picture_says_what_the_less_high_boxes_are(tmp_path: Path) -> None:
    second, later, weights = "less high: second chunk", "less high: later chunks", "weight gradients"
    for plan, said in (
        (DualPipeVPlan(2, 4), {second}),
        (OneFOneBPlan(2, 4), set()),
        (InterleavedPlan(2, 4, chunks=3), {later}),
        (ZeroBubbleVPlan(2, 4), {second, weights}),
    ):
        save(replay(plan, 1), tmp_path / "plan.svg")
        picture = (tmp_path / "plan.svg").read_text(encoding="utf-8")
        assert {text for text in (second, later, weights) if text in picture} == said


def test_every_chunk_and_both_parts_of_a_backward_are_drawn(tmp_path: Path) -> None:
    for plan in (ZeroBubbleVPlan(2, 3), InterleavedPlan(2, 2, chunks=4)):
        timeline = replay(plan, 1)
        save(timeline, tmp_path / "plan.svg")
        svg = ElementTree.parse(tmp_path / "plan.svg").getroot()
        axis = {text for group in svg.iter() if "tick" in group.get("id", "") for text in group.iter()}
        labels = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text") if element not in axis]
        for number in range(plan.micro_batches):
            boxes = sum(op.micro_batch == number for op, _, _ in timeline if op.kind != "U")
            assert labels.count(str(number)) == boxes
    events = trace(replay(ZeroBubbleVPlan(2, 3), 1))["traceEvents"]
    assert {event["cat"] for event in events if event["name"] in ("W1", "W1'")} == {"weight gradients"}


def test_suffixes_may_be_in_capitals(tmp_path: Path) -> None:
    timeline = replay(DDGPlan(2), 2)
    for name in ("plan.SVG", "plan.PNG", "plan.JSON"):
        save(timeline, tmp_path / name)
    assert (tmp_path / "plan.SVG").read_text().startswith("<?xml")
    assert "<dc:date>" not in (tmp_path / "plan.SVG").read_text()
    assert (tmp_path / "plan.PNG").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "plan.JSON").read_text())["traceEvents"]


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.svg, \.png or \.json"):
        save([], tmp_path / "plan.gif")
    assert list(tmp_path.iterdir()) == []


def test_text_needs_neither_torch_nor_matplotlib() -> None:
    modules = "ds_ddg.analysis.timeline_plot, ds_ddg.schedules.simulator"
    code = f"import sys, {modules}; sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
