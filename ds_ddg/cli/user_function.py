"""Functions in files of the user's, which commands call; and errors that say where such a file has failed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from errno import ENOENT
from pathlib import Path
from traceback import extract_tb
from typing import Any

__all__ = ["failed", "load_function", "place_in"]


def load_function(path: str, name: str) -> Callable[..., Any]:
    """Return the function `name` of the file `path`, which runs next to its own neighbours, as a script would.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file fails, or has no such function.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(ENOENT, "No such file or directory", path)
    # A name of our own: a file called queue.py must not take the place of the standard library's.
    spec = importlib.util.spec_from_file_location("__ds_ddg_user__", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).resolve().parent))
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise failed(path, error) from error
    if not callable(getattr(module, name, None)):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{path} has no function {name!r}; it has {', '.join(known) or 'none'}")
    function: Callable[..., Any] = getattr(module, name)
    return function


def failed(path: str, error: Exception) -> ValueError:
    """Return an error that says where the user's file has failed, and with what."""
    return ValueError(f"{path} failed with {type(error).__name__}: {error}{place_in(error, path)}")


def place_in(error: BaseException, path: str) -> str:
    """Return the line of the user's file, or of a file next to it, that `error` comes from, if there is one."""
    if isinstance(error, SyntaxError):
        return ""  # it says so itself
    folder = Path(path).resolve().parent
    frames = [frame for frame in extract_tb(error.__traceback__) if Path(frame.filename).resolve().parent == folder]
    return f" ({frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
