"""The values that DeepSpeed's monitors are told."""

from __future__ import annotations

import csv
from pathlib import Path


def recorded(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Return name -> (samples, value), in the order of writing."""
    found = {}
    for path in directory.glob("job/*.csv"):
        _, *rows = csv.reader(path.open())
        found[path.stem] = [(int(step), float(value)) for step, value in rows]
    return found
