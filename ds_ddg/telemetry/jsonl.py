"""A bounded file of records, of which a killed process leaves what it had."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

__all__ = ["Log"]

_PATIENCE = 1.0
"""Seconds that lines may wait in memory."""


class Log:
    """Lines of JSON in a file, at most a second or so behind; of a long run the end is kept.

    A file that has reached its limit becomes ``NAME.older.jsonl``, in place of the one before it.

    Args:
        path: without suffix; its folder is made if it is not there.
        limit: bytes of a file; two are kept.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, limit: int = 8 * 2**20) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._older = path.with_suffix(".jsonl"), path.with_suffix(".older.jsonl")
        self._older.unlink(missing_ok=True)  # of another run
        self._limit = limit
        self._lines: list[str] = []
        self._file = self._path.open("w", encoding="utf-8")
        self._flushed = time.perf_counter()
        self.head: dict[str, dict[str, Any]] = {}
        """Repeated at the top of every file, as each must make sense alone."""

    def begin(self, key: str, value: dict[str, Any]) -> None:
        """From here on `key` is `value`."""
        self.head[key] = value
        self._lines.append(json.dumps({key: value}))

    def add(self, line: str) -> None:
        """One more, JSON already; written by the next `flush`."""
        self._lines.append(line)

    def flush_if_due(self) -> None:
        """Flush once a second."""
        if time.perf_counter() - self._flushed > _PATIENCE:
            self.flush()

    def flush(self) -> None:
        """Hand what there is to the operating system, which keeps it even if this process is killed."""
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
        """Flush, and write no more; twice does nothing."""
        if not self._file.closed:
            self.flush()
            self._file.close()
