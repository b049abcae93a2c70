"""What a recipe shows while it runs: a bar on a terminal, and a line now and then in a file."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 60.0
"""The time from one line to the next where a bar cannot move."""


class _Lines:
    """A file for ``tqdm`` in which each state of the bar is a line.

    Args:
        stream: where the lines go.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(total: int, shown: bool) -> tqdm[Any]:
    """Make a bar of `total` samples that moves on a terminal, and elsewhere writes a line once a minute.

    Args:
        total: samples in the whole run.
        shown: whether there is anything to see; on one rank alone.
    """
    usual: dict[str, Any] = {"total": total, "unit": " samples", "unit_scale": True, "disable": not shown}
    # One whose size is unknown, as in some containers, tqdm takes for too small for any bar.
    if sys.stderr.isatty() and all(os.get_terminal_size(sys.stderr.fileno())):
        return tqdm(**usual, mininterval=1.0)
    return tqdm(
        **usual,
        file=_Lines(sys.stderr),
        mininterval=SECONDS_BETWEEN_LINES,
        maxinterval=SECONDS_BETWEEN_LINES,
        miniters=1,  # else it is a guess from the speed so far, and a run that slows down falls silent
        bar_format="{desc}{n_fmt} of {total_fmt} samples [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
    )
