"""Numbers and records for people to read, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["size", "table"]


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Lay out records, which all have the same keys, as aligned columns under a line of keys."""
    rows = [list(records[0])] + [["-" if v is None else f"{v:g}" if isinstance(v, float) else str(v)
                                  for v in record.values()] for record in records]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def size(num_bytes: float) -> str:
    """Write a number of bytes for people, in powers of 1000: 1500 is ``1.5 kB``."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 999.95:
            return f"{num_bytes:.{1 if unit != 'B' else 0}f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
