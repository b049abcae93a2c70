"""Arguments that several commands share, and how their values are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

__all__ = ["add_output", "list_of", "num_bytes"]

_UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def add_output(parser: argparse.ArgumentParser) -> None:
    """``--json`` and ``--out``."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.add_argument("--out", metavar="FILE", help="also write a picture (.svg, .png) or a Perfetto trace (.json)")


def list_of(number: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A reader of one number or several with commas between them."""

    def parse(text: str) -> list[Any]:
        try:
            return [number(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number or a list such as 1,4,16") from None

    return parse


def num_bytes(text: str) -> float:
    """``1.5G`` is 1.5e9, as in powers of 1000; ArgumentTypeError if `text` is no such size."""
    unit = _UNITS.get(text[-1:].upper())
    try:
        return float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes such as 25M or 1.5G") from None
