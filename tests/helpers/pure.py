"""The tests that run in the process of pytest alone: the daily loop of `make test-fast`.

One rule: a test starts processes if it, a fixture it asks for, or a function of the tests that either calls or is
given, uses the ranks, `subprocess` or `multiprocessing`. All others are pure, but for those marked as slow.
"""

from __future__ import annotations

import functools
import multiprocessing
import subprocess
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import pytest

from helpers.distributed import Ranks, spawn
from helpers.paths import TESTS


def is_pure(item: pytest.Function) -> bool:
    """Return whether a test starts no process and is quick."""
    if any(item.get_closest_marker(name) for name in ("gpu", "slow")):
        return False
    fixtures = [fixture.func for found in item._fixtureinfo.name2fixturedefs.values() for fixture in found]
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return not any(starts_processes(used, set()) for used in (item.function, *fixtures, *parameters))


def starts_processes(used: Any, seen: set[int]) -> bool:
    """Return whether an object is, or comes in the tests' own code to, something that starts processes."""
    if isinstance(used, functools.partial):
        return any(starts_processes(part, seen) for part in (used.func, *used.args))
    used = getattr(used, "__wrapped__", used)
    if any(used is starter for starter in (Ranks, spawn, subprocess, multiprocessing)):
        return True
    if not isinstance(used, FunctionType) or not used.__code__.co_filename.startswith(str(TESTS)) or id(used) in seen:
        return False
    seen.add(id(used))
    names = set(names_in(used.__code__))
    if names & {"subprocess", "multiprocessing"}:  # imported inside
        return True
    return any(starts_processes(used.__globals__[name], seen) for name in names & used.__globals__.keys())


def names_in(code: CodeType) -> Iterator[str]:
    """Yield the global names and attributes that a function and those defined inside it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)
