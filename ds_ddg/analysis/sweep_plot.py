"""Pictures of efficiency over what was varied: a line for each schedule of a sweep, or predicted beside measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_ddg.extras import extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["save_curves"]

_AXES = {"micro_batches": "micro-batches per call, M", "link": "latency of a hop", "stages": "stages, K"}
_LABELS = {"micro_batches": "M", "link": "link", "stages": "K"}
# Told apart in grey too: by line and marker.
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 3)), (0, (7, 2, 1, 2, 1, 2)), (0, (3, 3)), (0, (9, 4)))
_MARKERS = "osD^vXP*h"
_COLOURS = ("#14507a", "#d17a00", "#6b8f3c", "#8c5aa8", "#b03a3a", "#5a5a5a", "#1f9e9e", "#a67c52", "#c2569b")


def save_curves(rows: Sequence[Mapping[str, Any]], path: str | Path, value: str = "efficiency") -> None:
    """Draw `value` of every row over M, latency or K, whichever has most values; a panel for each pair of the others.

    Args:
        rows: each with ``stages``, ``micro_batches``, ``link``, ``schedule``, ``slack`` and `value`; with
            ``measured`` too, that is drawn as dots on the lines. ``in_deepspeed``, if false, is named in the legend.
        path: ends in .svg or .png.
        value: a share between 0 and 1.

    Raises:
        ValueError: another suffix.
        MissingExtraError: matplotlib is not installed.
    """
    with extra("plot", "a picture"):
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix.lower() not in (".svg", ".png"):
        raise ValueError(f"cannot draw to {str(path)!r}: the file name must end in .svg or .png")
    rows = [row for row in rows if row["schedule"] != "one device"]
    values = {name: sorted({row[name] for row in rows}) for name in _AXES}
    over, down, across = sorted(_AXES, key=lambda name: -len(values[name]))
    num_rows, num_columns = len(values[down]), len(values[across])
    figure = Figure(figsize=(3.4 * num_columns + 1.8, 2.3 * num_rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    lines = list(dict.fromkeys(map(_line, rows)))
    for (i, a), (j, b) in product(enumerate(values[down]), enumerate(values[across])):
        ax = panels[i, j]
        here = [row for row in rows if row[down] == a and row[across] == b]
        _draw_panel(ax, here, lines, over, value)
        ax.set_title(f"{_LABELS[down]} = {a:g}, {_LABELS[across]} = {b:g}", fontsize=9, loc="left")
        if over == "micro_batches" and len(values[over]) > 1:
            ax.set_xscale("log", base=2)
        ax.set_xticks(values[over], [f"{x:g}" for x in values[over]], fontsize=8, minor=False)
        ax.set_ylim(0, 1.05)
    figure.supxlabel(_AXES[over], fontsize=9)
    figure.supylabel(value, fontsize=9)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    for ax in panels.flat[1:]:  # a schedule may be missing in the first
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ds_ddg"}):
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _line(row: Mapping[str, Any]) -> str:
    where = "" if row.get("in_deepspeed", True) else ", not in DeepSpeed"
    slack = "" if row["slack"] is None else f", slack {row['slack']}"
    return f"{row['schedule']}{slack}{where}"


def _draw_panel(ax: Axes, rows: Sequence[Mapping[str, Any]], lines: Sequence[str], over: str, value: str) -> None:
    for index, name in enumerate(lines):
        mine = sorted((row for row in rows if _line(row) == name), key=lambda row: row[over])
        if not mine:
            continue
        style, colour = index % len(_LINES), _COLOURS[index % len(_COLOURS)]
        xs = [row[over] for row in mine]
        measured = [(row[over], row["measured"]) for row in mine if row.get("measured") is not None]
        marker = "" if measured else _MARKERS[style]
        ax.plot(xs, [row[value] for row in mine], linestyle=_LINES[style], marker=marker, markersize=4,
                color=colour, linewidth=1.4, label=name)  # fmt: skip
        if measured:
            ax.plot(*zip(*measured, strict=True), linestyle="", marker=_MARKERS[style], markersize=5,
                    markerfacecolor="white", color=colour, label=f"{name}, measured")  # fmt: skip
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
