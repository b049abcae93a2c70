"""A bounded file of records that keeps what was flushed if its process is killed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

__all__ = ["Log"]

_PATIENCE = 1.0
"""The seconds for which lines may stay in memory."""


class Log:
    """A file of JSON lines, written at most about a second late; of a long run it keeps the end.

    A file that has reached its limit becomes ``NAME.older.jsonl``, which replaces the last one of that name.

    Args:
        path: the path without suffix; its folder is made if it is missing.
        limit: bytes of one file; two files are kept.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, limit: int = 8 * 2**20) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._older = path.with_suffix(".jsonl"), path.with_suffix(".older.jsonl")
        self._older.unlink(missing_ok=True)  # left by another run
        self._limit = limit
        self._lines: list[str] = []
        self._file = self._path.open("w", encoding="utf-8")
        self._flushed = time.perf_counter()
        self.head: dict[str, dict[str, Any]] = {}
        """The records that are repeated at the top of every file, as each file must make sense alone."""

    def begin(self, key: str, value: dict[str, Any]) -> None:
        """Set `key` of the head to `value`, and write it as a record."""
        self.head[key] = value
        self._lines.append(json.dumps({key: value}))

    def add(self, line: str) -> None:
        """Add a `line`, which is JSON already; the next `flush` writes it."""
        self._lines.append(line)

    def flush_if_due(self) -> None:
        """Flush if the last flush was more than a second ago."""
        if time.perf_counter() - self._flushed > _PATIENCE:
            self.flush()

    def flush(self) -> None:
        """Hand all lines to the operating system, which keeps them even if this process is killed."""
        lines, self._lines = self._lines, []
        self._file.write("".join(line + "\n" for line in lines))
        self._file.flush()
        self._flushed = time.perf_counter()
        if self._file.tell() > self._limit:
            self._file.close()
            self._path.replace(self._older)
            self._file = self._path.open("w", encoding="utf-8")
            self._lines = [json.dumps({key: value}) for key, value in self.head.items()]

    def close(self) -> None:
        """Flush and close the file; a second call does nothing."""
        if not self._file.closed:
            self.flush()
            self._file.close()
