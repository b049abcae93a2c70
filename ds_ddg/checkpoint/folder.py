"""A folder of checkpoints: which of them is the latest, and whether its files are whole.

DeepSpeed names the newest checkpoint in a file, ``latest``, which readers take for whole.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

__all__ = ["LATEST", "damage", "flush", "latest", "tag_to_load", "write_latest", "write_whole"]

LATEST = "latest"
"""The name of the file with the tag of the newest checkpoint."""


def latest(directory: str | Path) -> str | None:
    """Return the tag of the newest checkpoint in `directory`; None if there is none."""
    path = Path(directory) / LATEST
    return path.read_text().strip() if path.is_file() else None


def write_latest(directory: str | Path, tag: str) -> None:
    """Make `tag` the newest checkpoint in `directory`."""
    write_whole(Path(directory) / LATEST, tag)


def write_whole(path: Path, text: str) -> None:
    """Put a file in the place of the one that was there: at once, or if this is interrupted not at all."""
    written = path.with_name(f"{path.name}.new")
    with written.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    written.replace(path)


def flush(paths: Iterable[str | Path]) -> None:
    """Wait until files are on the disk. OSError if they cannot be: a full disk may only be noticed then."""
    for path in paths:
        with Path(path).open("rb") as file:
            os.fsync(file.fileno())


def tag_to_load(directory: str | Path, tag: str | None) -> str | None:
    """Return `tag`, or else the latest; None if nothing says so.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    named = latest(directory) if tag is None else tag
    if named is not None and not (named and (Path(directory) / named).is_dir()):
        who = "" if tag is not None else f"{Path(directory) / LATEST} names {named!r}: "
        raise FileNotFoundError(f"{who}there is no checkpoint {named!r} in {directory}; name another by its tag")
    return named


def damage(path: Path) -> str | None:
    """Return what is wrong with a file of tensors, as far as it shows without reading all of it; None if nothing."""
    if not path.is_file():
        return f"{path.name} is missing"
    with path.open("rb") as file:
        start = file.read(2)
    # PyTorch's files are ZIP archives, whose contents are listed at the end; its old ones, an option of DeepSpeed's,
    # are pickles.
    if zipfile.is_zipfile(path) or start[:1] == b"\x80":
        return None
    return f"{path.name} is damaged ({path.stat().st_size} bytes, cut off or never written)"
