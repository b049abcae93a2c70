from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

# Helpers assert as tests do.
pytest.register_assert_rewrite("helpers")
# Before anything imports DeepSpeed, which picks its accelerator once.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from helpers import matrix
from helpers.distributed import GetRanks, Ranks
from helpers.pure import is_pure


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", type=Path, help="write the support matrix of the tests that pass to this file")
    parser.addoption("--check-matrix", type=Path, help="fail if this file is not what the collected tests claim")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--matrix"):
        runs_tests_only = hasattr(config, "workerinput")
        config.pluginmanager.register(matrix.Plugin(None if runs_tests_only else path))
    if path := config.getoption("--check-matrix"):
        config.pluginmanager.register(matrix.StaleCheck(path))


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        matrix.said_by(item)  # refuses markers that do not say enough
        if isinstance(item, pytest.Function) and is_pure(item):
            item.add_marker("pure")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and os.environ.get("DS_DDG_TEST_DEVICE") != "cpu":
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seed() -> None:
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread, as on the ranks: their number decides in which order a matrix product adds up."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ranks() -> Iterator[GetRanks]:
    """Give processes that the whole session shares: `ranks(4).run(fn, *args)`, see `distributed.Ranks`."""
    pools: dict[int, Ranks] = {}

    def get(world_size: int) -> Ranks:
        return pools.setdefault(world_size, Ranks(world_size))

    yield get
    for pool in pools.values():
        pool.close()
