"""Results of `off_cpu.py` as a page: tables, pictures, and what they were measured on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ds_ddg.analysis.sweep_plot import save_curves

Row = dict[str, Any]

_NUMBERS = "efficiency", "lowest, highest", "predicted", "error", "no core"
"""Columns that every table has."""


def machine() -> dict[str, Any]:
    """Return the facts of this machine on which a result depends."""
    packages = {name: version(name) for name in ("torch", "deepspeed")}
    return {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version(), **packages}


def write(results: dict[str, Any], folder: Path) -> str:
    """Write ``FOLDER/off_cpu.json``, the pictures there, and the page ``FOLDER.md``; returns its text."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "off_cpu_bf16_zero1" if results["bf16_zero1"] else "off_cpu"
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = folder.with_name(f"{folder.name}.md") if name == "off_cpu" else folder / f"{name}.md"
    even = [row for row in results["rows"] if not row["uneven"]]
    pictures = []
    for title, rows in (("micro_batches", _without_latency(even)), ("latency", _with_latency(even))):
        if rows:
            picture = folder / f"{name}_{title}.png"
            save_curves(rows, picture)
            pictures.append(f"![efficiency over {title.replace('_', '-')}]({picture.relative_to(page.parent)})")
    text = "\n\n".join([*_head(results), *_tables(results), *pictures]) + "\n"
    page.write_text(text, encoding="utf-8")
    return text


def _without_latency(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["link"] == 0 and row["slack"] in (0, None)]


def _with_latency(rows: Sequence[Row]) -> list[Row]:
    """Return DDG over latency, for every M that was measured with one."""
    late = {row["micro_batches"] for row in rows if row["link"] > 0}
    return [row for row in rows if row["schedule"] == "ddg" and row["micro_batches"] in late]


def _head(results: dict[str, Any]) -> Iterable[str]:
    about, alone = results["about"], results["alone"]
    yield "# Benchmarks"
    yield (
        f"Written by `{about['command']}`, on {about['cores']} cores, {about['platform']}, Python "
        f"{about['python']}, torch {about['torch']}, DeepSpeed {about['deepspeed']}"
        + (", in bf16 with ZeRO-1." if results["bf16_zero1"] else ", in fp32.")
    )
    yield (
        f"A stage sleeps {about['forward_ms']:.0f} ms for a forward and {about['backward_ms']:.0f} ms for a backward, "
        "so all stages fit on these cores and all else is overhead. Efficiency is the share of the devices' time that "
        f"goes into them; medians of {about['turns']} turns that the schedules took in the same processes, with the "
        "lowest and the highest. Predictions are those of `ds-ddg simulate`, given what one stage alone takes here: "
        f"{1e3 * alone['tick']:.2f} ms for a micro-batch and {1e3 * alone['update']:.2f} ms once a call. *No core*: "
        "time per micro-batch in which a stage could have run and no core was free; the mean over stages."
    )


def _tables(results: dict[str, Any]) -> Iterable[str]:
    rows = results["rows"]
    even = [row for row in rows if not row["uneven"]]
    plain = _without_latency(even)
    if plain:
        yield "## DDG, DeepSpeed's schedules and M"
        yield table(
            ["K", "M", "schedule", *_NUMBERS, "1F1B / this", "(M+K-1)/M"],
            [[*_start(row), *_compared(row, plain)] for row in plain],
        )
    late = [row for row in even if row["link"] > 0 or row["slack"] not in (0, None)]
    if late:
        yield "## Latency of the links"
        yield "Added to every hop, in ticks; `auto` chose the slack in brackets."
        yield table(
            ["K", "M", "latency", "slack", *_NUMBERS],
            [[row["stages"], row["micro_batches"], f"{row['link']:g}", _slack(row), *_numbers(row)] for row in late],
        )
    uneven = [row for row in rows if row["uneven"]]
    if uneven:
        yield "## Uneven stages"
        yield "One stage takes half as long again as the others."
        yield table(
            ["K", "M", "schedule", *_NUMBERS],
            [[*_start(row), *_numbers(row)] for row in uneven],
        )
    errors = sorted(abs(_error(row)) for row in rows)
    yield (
        f"Prediction against measurement, {len(errors)} rows: median error {errors[len(errors) // 2]:.1%}, largest "
        f"{errors[-1]:.1%}; within 5% in {sum(error <= 0.05 for error in errors)} of them."
    )


def _start(row: Row) -> list[Any]:
    return [row["stages"], row["micro_batches"], row["schedule"]]


def _slack(row: Row) -> str:
    return f"auto ({row['chosen']})" if row["slack"] == "auto" else str(row["slack"])


def _numbers(row: Row) -> list[str]:
    spread = sorted(row["measured"] * row["seconds_per_call"] / seconds for seconds in row["turns"])
    found = f"{row['measured']:.3f}", f"{spread[0]:.3f}, {spread[-1]:.3f}", f"{row['efficiency']:.3f}"
    queued = "" if row.get("queued_ms") is None else f"{row['queued_ms']:.2f} ms"  # older results have none
    return [*found, f"{_error(row):+.1%}", queued]


def _compared(row: Row, rows: Sequence[Row]) -> list[str]:
    """Return a row with the ratio to DeepSpeed's 1F1B, and the ratio that theory gives DDG."""
    same = [r for r in rows if (r["stages"], r["micro_batches"]) == (row["stages"], row["micro_batches"])]
    theirs = next(r["seconds_per_call"] for r in same if r["schedule"] == "1f1b")
    bound = f"{1 + (row['stages'] - 1) / row['micro_batches']:.2f}" if row["schedule"] == "ddg" else ""
    return [*_numbers(row), f"{theirs / row['seconds_per_call']:.2f}", bound]


def _error(row: Row) -> float:
    """Return the error of the predicted time per call."""
    return float(row["predicted_seconds"] / row["seconds_per_call"] - 1)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return the records as a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
