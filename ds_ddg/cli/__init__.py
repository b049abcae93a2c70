"""The command line: see what a schedule does to speed, memory and staleness, before renting the GPUs and after.

::

    python -m ds_ddg plan --stages 4 --micro-batches 6                         one schedule, as text or picture
    python -m ds_ddg simulate --stages 4,8 --micro-batches 1,4 --link 0,0.3    schedules compared under a cost model
    python -m ds_ddg partition model.py:layers --stages 4                      layers measured, and split into stages
    python -m ds_ddg check ds.json --stages 4                                  a config: is it right, what does it do
    python -m ds_ddg study mine.py:problem --results r.jsonl                   trained with delays, in one process
    python -m ds_ddg trace runs/trace                                          what each stage of a run really did

Each command is a module of its own here. None imports torch, so the answer comes at once, but `partition`, which
measures layers, `check`, which asks DeepSpeed itself, and `study`, which trains; these only when the files given are
there.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ds_ddg import __version__
from ds_ddg.extras import MissingExtraError

from . import check, partition, plan, simulate, study, trace

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Bad arguments end with status 2 and a message, as in argparse."""
    parser = argparse.ArgumentParser(
        prog="ds-ddg",
        description="Delayed gradients for DeepSpeed pipelines: what they cost, what they bring, what they did.",
    )
    parser.add_argument("--version", action="version", version=f"ds_ddg {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    for command in (plan, simulate, partition, check, study, trace):
        name = command.__name__.rpartition(".")[2]
        command.add_arguments(commands.add_parser(name, help=command.HELP, description=f"{command.HELP}."))
    options = parser.parse_args(arguments)
    try:
        answer: str = options.run(options)
    except (ValueError, OSError, MissingExtraError) as error:
        print(f"ds-ddg: error: {error}", file=sys.stderr)
        return 2
    try:
        print(answer, flush=True)
    except BrokenPipeError:  # the reader has seen enough ("| head"), which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
