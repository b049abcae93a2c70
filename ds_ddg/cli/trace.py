"""``ds-ddg trace``: what each stage of a run really did, beside what the plan says."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ds_ddg.analysis.format import table
from ds_ddg.analysis.recommend import title
from ds_ddg.analysis.timeline_plot import clock, save
from ds_ddg.analysis.trace_reader import REASONS, Run, Share, read
from ds_ddg.schedules.plan import BACKWARD, FORWARD, UPDATE

from .options import add_output, check_output

__all__ = ["HELP", "add_arguments"]

_MICROSECOND = 1e-6
"""Times below this are rounding: wall clocks count seconds since 1970 in 53 bits."""

HELP = "what each stage of a run really did, and what its gaps waited for"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ds-ddg trace`` to `parser`."""
    parser.set_defaults(run=_run)
    parser.add_argument("run_dir", metavar="RUN_DIR", help='the folder of "ddg": {"trace": RUN_DIR}')
    parser.add_argument("--ticks", type=int, default=8, metavar="N", help="show the last N micro-batches (default 8)")
    parser.add_argument("--replica", type=int, default=0, metavar="R", help="data-parallel replica (default 0)")
    add_output(parser)


def _run(options: argparse.Namespace) -> str:
    if options.ticks < 1:
        raise ValueError(f"--ticks must be 1 or more, got {options.ticks}")
    check_output(options.out)
    run = read(options.run_dir, options.replica)
    measured, planned = run.last(options.ticks)
    if options.out:
        save({f"measured: {title(run.plan)}": measured, "planned, with the times measured": planned}, options.out)
    rows = [_row(share) for share in run.shares()]
    begin, end = run.steady
    if options.json:
        record = {"schedule": run.plan.name, "stages": run.plan.num_stages, "micro_batches": run.plan.micro_batches}
        return json.dumps({**record, "seconds": round(end - begin, 6), "disorder": run.disorder, "per_stage": rows})
    unit = run.cost().forward or None
    return "\n".join(
        [
            f"{title(run.plan)}: {len(run.stages[0])} operations of stage 0, steady for {end - begin:.3f} s",
            "",
            f"measured, the last {min(options.ticks, len(run.recorded))} micro-batch(es) of stage 0, numbered from "
            "where the recording began, a column per forward time",
            clock(measured, unit),
            "",
            "planned, with the times measured and links without latency",
            clock(planned, unit),
            "",
            table([_cells(row) for row in rows]),
            "",
            "shares of the time in steady state; behind busy: what the gaps went to",
            *_warnings(run),
        ]
    )


def _row(share: Share) -> dict[str, Any]:
    names = {FORWARD: "forward_ms", BACKWARD: "backward_ms", UPDATE: "update_ms"}
    times = {name: round(share.milliseconds[kind], 4) for kind, name in names.items() if kind in share.milliseconds}
    return {
        "stage": share.stage,
        **{name: times.get(name) for name in names.values()},
        "busy": round(share.busy, 4),
        **{reason: round(share.gaps[reason], 4) for reason in REASONS},
    }


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    return {key: f"{value:.1%}" if key in ("busy", *REASONS) else value for key, value in row.items()}


def _warnings(run: Run) -> list[str]:
    if run.disorder < _MICROSECOND:
        return []
    return [
        f"operations seem to start up to {1e3 * run.disorder:.3f} ms before what they need has ended: the clocks of "
        "the machines, or of their GPUs, disagree by so much, and times of different stages compare no better"
    ]
