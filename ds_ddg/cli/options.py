"""Arguments that several commands share, and types that read their values."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ds_ddg.extras import require

__all__ = ["add_output", "check_output", "list_of", "num_bytes", "progress"]

_UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}

_PICTURES = (".svg", ".png", ".json")

_Item = TypeVar("_Item")


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add ``--json`` and ``--out`` to `parser`."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.add_argument("--out", metavar="FILE", help="also write a picture (.svg, .png) or a Perfetto trace (.json)")


def check_output(path: str | None, suffixes: Sequence[str] = _PICTURES) -> None:
    """Raise ValueError or MissingExtraError if ``--out`` cannot be written, before anything is computed for it."""
    if path is None:
        return
    if Path(path).suffix.lower() not in suffixes:
        *others, last = suffixes
        allowed = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"--out {path!r} must end in {allowed}")
    if not Path(path).parent.is_dir():
        raise ValueError(f"--out {path!r}: there is no folder {str(Path(path).parent)!r}; make it first")
    if Path(path).suffix.lower() != ".json":
        require("plot", f"--out {path!r}")


def list_of(number: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Return an argparse type that reads one number, or several with commas between them."""

    def parse(text: str) -> list[Any]:
        try:
            return [number(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number or a list such as 1,4,16") from None

    return parse


def num_bytes(text: str) -> float:
    """Read a size such as ``1.5G``, which is 1.5e9 bytes. Raises ArgumentTypeError if `text` is no such size."""
    unit = _UNITS.get(text[-1:].upper())
    try:
        return float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes such as 25M or 1.5G") from None


def progress(items: Sequence[_Item], what: str) -> Iterable[_Item]:
    """Return `items`; going through them shows a bar on a terminal's stderr after one second."""
    if not sys.stderr.isatty():
        return items
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(items, what, leave=False, delay=1)
