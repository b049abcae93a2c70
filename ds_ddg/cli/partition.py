"""``ds-ddg partition``: layers measured, and split into stages of equal time."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ds_ddg.balance import LayerCost, balance, load
from ds_ddg.balance import save as save_profile

__all__ = ["HELP", "add_arguments"]

HELP = "split layers into stages of equal time, as measured"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
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
    if options.out and not options.out.endswith(".json"):
        raise ValueError(f"--out {options.out!r} must end in .json, to be read again")
    layers = load(options.source) if options.source.endswith(".json") else _measured(options.source)
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
        from ds_ddg.measure import profile

        answer = _function(path, name)()
        if not isinstance(answer, tuple) or len(answer) not in (2, 3):
            got = f"{len(answer)} values" if isinstance(answer, tuple) else type(answer).__name__
            raise ValueError(f"{source} must return (layers, sample) or (layers, sample, loss_fn), got {got}")
        return profile(*answer)


def _function(path: str, name: str) -> Callable[[], Any]:
    """`name` of the file `path`, which runs next to its own neighbours, as a script would."""
    # A name of our own: a file called queue.py must not take the place of the standard library's.
    spec = importlib.util.spec_from_file_location("__ds_ddg_partition__", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).resolve().parent))
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{path} has no function {name!r}; it has {', '.join(known) or 'none'}")
    function: Callable[[], Any] = getattr(module, name)
    return function
