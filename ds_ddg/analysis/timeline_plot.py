"""Pictures of a timeline, planned or measured: text, SVG or PNG, and a trace for Chrome or Perfetto.

Everything here takes any iterable of ``(Op, start, end)``, such as `ds_ddg.schedules.timeline.Timeline` or the records
of a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ds_ddg.extras import extra
from ds_ddg.schedules.plan import BACKWARD, FORWARD, UPDATE, WEIGHT, Op

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["clock", "save", "text", "trace"]

Events = Iterable[tuple[Op, float, float]]
Row = list[tuple[Op, float, float]]
Rows = dict[int, Row]

# Light, dark and striped: told apart in grey as well. Face, edge and text colour, hatch, name.
STYLES: dict[str, tuple[str, str, str, str, str]] = {
    FORWARD: ("#d6e6f4", "#5b7f9f", "black", "", "forward"),
    BACKWARD: ("#2c5f8a", "#7fa8c9", "white", "////", "backward"),
    WEIGHT: ("#8fb98f", "#3f6b3f", "black", "....", "weight gradients"),
    UPDATE: ("#f4b942", "#8a5a00", "black", "xxxx", "update"),
}

_LAST_IN_A_CELL = {BACKWARD: {BACKWARD, WEIGHT}, WEIGHT: {WEIGHT}}
"""What must not be in a cell of `text` yet for an operation to join it."""


def text(timeline: Events, updates: bool = False) -> str:
    """Draw one line per stage, one cell per tick of the stage's own clock, as in the paper's figure.

    A cell holds a forward, the backward behind it and the W behind that, and with `updates` a ``*`` where an update
    follows::

        stage 0 | F0    F1    F2B0  F3B1  B2    B3
    """
    rows: dict[int, list[str]] = {}
    for stage, events in _by_stage(timeline).items():
        cells: list[str] = rows.setdefault(stage, [])
        for op, _, _ in events:
            label = op.label
            if op.kind == UPDATE:
                cells[-1:] = [cell + "*" * updates for cell in cells[-1:]]
            elif op.kind in _LAST_IN_A_CELL and cells and not _LAST_IN_A_CELL[op.kind] & set(cells[-1]):
                cells[-1] += label
            else:
                cells.append(label)
    width = 2 + max((len(cell) for cells in rows.values() for cell in cells), default=0)
    return _lines({stage: "".join(cell.ljust(width) for cell in cells) for stage, cells in rows.items()})


def clock(timeline: Events, unit: float | None = None) -> str:
    """Draw one line per stage on a common clock, one column per `unit` of time; dots are the bubble.

    ::

        stage 0 | F0 .  .  B0---
        stage 1 | .  F0 B0--- .

    `unit` defaults to the median time of a forward. An operation shows in the columns whose middle it covers, so
    one much shorter than `unit` (an update, mostly) may not show.
    """
    rows = _by_stage(timeline)
    begin, end, forward = _extent(rows)
    unit = forward if unit is None else unit
    if not unit > 0:
        raise ValueError(f"the unit of time of a picture must be above 0, got {unit}")
    width = 1 + max((len(op.label) for events in rows.values() for op, _, _ in events), default=0)
    num_columns = round((end - begin) / unit)
    lines = {}
    for stage, events in rows.items():
        line = ".".ljust(width) * num_columns
        for op, start, stop in events:
            # The first column whose middle is not before the start, and the same for the end.
            first, last = (_columns(time - begin, unit) * width for time in (start, stop))
            if first < last:
                box = op.label.ljust(last - first - 1, "-" if last - first > width else " ") + " "
                line = line[:first] + box + line[last:]
        lines[stage] = line
    return _lines(lines)


def save(timelines: Events | Mapping[str, Events], path: str | Path) -> None:
    """Write a picture (``.svg``, ``.png``) or a trace for Chrome or Perfetto (``.json``), by the suffix of `path`.

    A mapping of titles to timelines gives one panel each, on a common clock. ValueError for another suffix,
    MissingExtraError where a picture needs matplotlib and it is not installed.
    """
    path = Path(path)
    titled = timelines if isinstance(timelines, Mapping) else {"": timelines}
    suffix = path.suffix.lower()
    if suffix == ".json":
        path.write_text(json.dumps(trace(titled)) + "\n", encoding="utf-8")
    elif suffix in (".svg", ".png"):
        _save_picture({title: _by_stage(timeline) for title, timeline in titled.items()}, path)
    else:
        raise ValueError(f"cannot draw to {str(path)!r}: the file name must end in .svg, .png or .json")


def trace(timelines: Events | Mapping[str, Events]) -> dict[str, Any]:
    """Convert to Chrome's trace event format, one process per stage, in microseconds if the timeline is in seconds."""
    titled = timelines if isinstance(timelines, Mapping) else {"": timelines}
    events: list[dict[str, Any]] = []
    offset = 0
    for title, timeline in titled.items():
        rows = _by_stage(timeline)
        begin, _, _ = _extent(rows)
        for stage, row in rows.items():
            pid = offset + stage
            name = f"{title} stage {stage}".strip()
            events.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}})
            events.append({"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}})
            for op, start, end in row:
                events.append(
                    {
                        "ph": "X",
                        "name": op.label,
                        "cat": STYLES[op.kind][4],
                        "pid": pid,
                        "tid": 0,
                        "ts": (start - begin) * 1e6,
                        "dur": (end - start) * 1e6,
                        "args": {"micro_batch": op.micro_batch},
                    }
                )
        offset += 1 + max(rows, default=-1)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _by_stage(timeline: Events) -> Rows:
    """Return the events of each stage in order; the sort is stable, so events without duration keep their place."""
    ordered = sorted(timeline, key=lambda event: (event[0].stage, event[1]))
    rows: Rows = {stage: [] for stage in range(1 + max((op.stage for op, _, _ in ordered), default=-1))}
    for op, start, end in ordered:
        rows[op.stage].append((op, start, end))
    return rows


def _extent(rows: Rows) -> tuple[float, float, float]:
    """Return first start, last end, and the median time of a forward (if there is none, of anything; else 1)."""
    events = [event for row in rows.values() for event in row]
    lasting = [event for event in events if event[2] > event[1]]
    forwards = [event for event in lasting if event[0].kind == FORWARD] or lasting
    unit = median(end - start for _, start, end in forwards) if forwards else 1.0
    return min((event[1] for event in events), default=0.0), max((event[2] for event in events), default=0.0), unit


def _columns(time: float, unit: float) -> int:
    """Return the number of columns whose middle lies before `time`, forgiving rounding errors of sums."""
    return max(0, int(time / unit + 0.5 - 1e-9) if time > 0 else 0)


def _lines(rows: Mapping[int, str]) -> str:
    digits = len(str(max(rows, default=0)))
    return "\n".join(f"stage {stage:{digits}} | {row}".rstrip() for stage, row in rows.items())


def _save_picture(panels: Mapping[str, Rows], path: Path) -> None:
    with extra("plot", "a picture"):
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

    extents = [_extent(rows) for rows in panels.values()]
    span = max((end - begin for begin, end, _ in extents), default=0.0) or 1.0
    heights = [max(len(rows), 1) + 1.0 for rows in panels.values()]
    # A forward gets room for its number, up to a width at which viewers still open the file.
    inches = min(max(0.19 * span / min((unit for _, _, unit in extents), default=1.0), 5.0), 60.0)
    figure = Figure(figsize=(inches + 1.0, 0.34 * sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (title, rows), (begin, _, _) in zip(axes, panels.items(), extents, strict=True):
        for stage, row in rows.items():
            _draw_row(ax, stage, [(op, start - begin, end - begin) for op, start, end in row], inches / span)
        ax.set_title(title, loc="left", fontsize=9)
        ax.set_yticks(list(rows), [f"stage {stage}" for stage in rows], fontsize=8)
        ax.set_ylim(max(rows, default=0) + 0.6, -0.6)
        ax.set_xlim(0, span)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(axis="x", labelsize=8)
    axes[-1].set_xlabel("time", fontsize=8)
    drawn = [op for rows in panels.values() for row in rows.values() for op, _, _ in row]
    kinds = {FORWARD, BACKWARD, UPDATE} | {op.kind for op in drawn}
    legend = [
        Patch(fc=face, ec=edge, hatch=hatch, label=name)
        for kind, (face, edge, _, hatch, name) in STYLES.items()
        if kind in kinds
    ]
    if last := max((op.chunk for op in drawn), default=0):
        legend.append(
            Patch(fill=False, ec="none", label=f"less high: {'second chunk' if last == 1 else 'later chunks'}")
        )
    figure.legend(handles=legend, loc="outside upper right", ncols=4, fontsize=8, frameon=False)
    # Text that can be searched, and neither a date nor random names: the same plan gives the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ds_ddg"}):
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _draw_row(ax: Axes, stage: int, row: Row, inches: float) -> None:
    """Draw the operations of one stage, those of each further chunk less high.

    `inches` is the length of a unit of time, and a number that would not fit is left out.
    """
    chunks = sorted({op.chunk for op, _, _ in row})
    for (kind, (face, edge, ink, hatch, _)), chunk in product(STYLES.items(), chunks):
        of_kind = [(op, start, end) for op, start, end in row if (op.kind, op.chunk) == (kind, chunk)]
        boxes = [(start, end - start) for _, start, end in of_kind if end > start]
        height = 0.8 * 0.625**chunk
        ax.broken_barh(boxes, (stage - height / 2, height), fc=face, ec=edge, hatch=hatch, linewidth=0.6,
                       hatch_linewidth=0.4)  # fmt: skip
        # An operation without duration is a mark between the boxes.
        marks = [start for _, start, end in of_kind if end == start]
        ax.vlines(marks, stage - 0.48, stage + 0.48, color=edge, linewidth=1.6, clip_on=False)
        for op, start, end in of_kind:
            label = str(op.micro_batch)
            if kind != UPDATE and (end - start) * inches > 0.07 * len(label):
                middle = (start + end) / 2
                ax.text(middle, stage, label, ha="center", va="center_baseline", fontsize=7, color=ink, clip_on=True)
