"""Which tests `make test-fast` takes for pure."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any

import pytest

from helpers.distributed import spawn
from helpers.pure import starts_processes
from helpers.script_runs import launch


def by_a_module() -> Any:
    return subprocess.run([sys.executable, "-V"], check=True)


def by_an_import() -> Any:
    import multiprocessing

    return multiprocessing.Pool()


def by_a_helper() -> Any:
    return spawn(len, 2)


def by_one_that_calls_it() -> Any:
    return [by_a_helper() for _ in range(2)]


def computes(x: float) -> float:
    return max(x, 1.0)


@pytest.mark.parametrize(
    "function", [by_a_module, by_an_import, by_a_helper, by_one_that_calls_it, launch, partial(max, by_a_module)]
)
def test_what_starts_processes_is_seen(function: Any) -> None:
    assert starts_processes(function, set())


@pytest.mark.parametrize("function", [computes, partial(computes, 2.0), 3, "subprocess"])
def test_what_computes_is_pure(function: Any) -> None:
    assert not starts_processes(function, set())


def test_a_test_is_marked_by_the_rule(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("pure") is not None


def test_a_test_on_ranks_is_not(request: pytest.FixtureRequest, ranks: Any) -> None:
    assert request.node.get_closest_marker("pure") is None
