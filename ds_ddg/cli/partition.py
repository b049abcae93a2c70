"""``ds-ddg partition``: measures layers, and splits them into stages of equal time."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from errno import ENOENT
from pathlib import Path
from traceback import extract_tb
from typing import Any

from ds_ddg.analysis.balance import LayerCost, balance, load
from ds_ddg.analysis.balance import save as save_profile

from .options import check_output

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
            raise ValueError(f"{error}{_place(error.__cause__ or error, path)}") from error


def _answer(source: str, path: str, name: str) -> tuple[Any, ...]:
    """Return the result of the function `name` of the file `path`: layers, a sample and perhaps a loss function."""
    function = _function(path, name)
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(f"{source} is called without arguments: {error}; give each a default") from None
    try:
        answer = function()
    except Exception as error:
        raise _failed(path, error) from error
    if not isinstance(answer, tuple) or len(answer) not in (2, 3):
        got = f"{len(answer)} values" if isinstance(answer, tuple) else type(answer).__name__
        raise ValueError(f"{source} must return (layers, sample) or (layers, sample, loss_fn), got {got}")
    return answer


def _function(path: str, name: str) -> Callable[[], Any]:
    """Return the function `name` of the file `path`, which runs next to its own neighbours, as a script would."""
    if not Path(path).is_file():
        raise FileNotFoundError(ENOENT, "No such file or directory", path)
    # A name of our own: a file called queue.py must not take the place of the standard library's.
    spec = importlib.util.spec_from_file_location("__ds_ddg_partition__", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).resolve().parent))
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _failed(path, error) from error
    if not callable(getattr(module, name, None)):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{path} has no function {name!r}; it has {', '.join(known) or 'none'}")
    function: Callable[[], Any] = getattr(module, name)
    return function


def _failed(path: str, error: Exception) -> ValueError:
    """Return an error that says where the user's file has failed, and with what."""
    return ValueError(f"{path} failed with {type(error).__name__}: {error}{_place(error, path)}")


def _place(error: BaseException, path: str) -> str:
    """Return the line of the user's file, or of a file next to it, that `error` comes from, if there is one."""
    if isinstance(error, SyntaxError):
        return ""  # it says so itself
    folder = Path(path).resolve().parent
    frames = [frame for frame in extract_tb(error.__traceback__) if Path(frame.filename).resolve().parent == folder]
    return f" ({frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
