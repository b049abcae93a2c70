"""``ds-ddg partition``: measures layers, and splits them into stages of equal time."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from contextlib import redirect_stdout
from typing import Any

from ds_ddg.analysis.balance import LayerCost, balance, load
from ds_ddg.analysis.balance import save as save_profile

from .options import check_output
from .user_function import failed, load_function, place_in

__all__ = ["HELP", "add_arguments"]

HELP = "split layers into stages of equal time, as measured"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ds-ddg partition`` to `parser`."""
    parser.set_defaults(run=_run)
    parser.add_argument(
        "source",
        metavar="FILE.py:FUNCTION|PROFILE.json",
        help="a function that returns (layers, sample) or (layers, sample, loss_fn), where sample is a micro-batch "
        "(inputs, labels); or what --out has written, which needs no torch",
    )
    parser.add_argument("--stages", type=int, required=True, metavar="K", help="pipeline stages")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.add_argument("--out", metavar="FILE", help="also write what was measured (.json), to split it again")


def _run(options: argparse.Namespace) -> str:
    if options.stages < 1:
        raise ValueError(f"--stages must be 1 or more, got {options.stages}")
    check_output(options.out, (".json",))  # which can be split again
    layers = load(options.source) if options.source.lower().endswith(".json") else _measured(options.source)
    if options.out:
        save_profile(layers, options.out)
    found = balance(layers, options.stages)
    return json.dumps(found.record()) if options.json else str(found)


def _measured(source: str) -> list[LayerCost]:
    path, _, name = source.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"{source!r} is neither FILE.py:FUNCTION nor a saved profile, which ends in .json")
    # What DeepSpeed and the user's file print must not get between the lines of the answer.
    with redirect_stdout(sys.stderr):
        answer = _answer(source, path, name)
        # Now, as importing it takes seconds.
        from ds_ddg.profiling.layer_profiler import profile

        try:
            return profile(*answer)
        except RuntimeError as error:
            raise ValueError(f"{error}{place_in(error.__cause__ or error, path)}") from error


def _answer(source: str, path: str, name: str) -> tuple[Any, ...]:
    """Return the result of the function `name` of the file `path`: layers, a sample and perhaps a loss function."""
    function = load_function(path, name)
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(f"{source} is called without arguments: {error}; give each a default") from None
    try:
        answer = function()
    except Exception as error:
        raise failed(path, error) from error
    if not isinstance(answer, tuple) or len(answer) not in (2, 3):
        got = f"{len(answer)} values" if isinstance(answer, tuple) else type(answer).__name__
        raise ValueError(f"{source} must return (layers, sample) or (layers, sample, loss_fn), got {got}")
    return answer
