"""The form of the package: one engine class over collaborators, DeepSpeed's overrides in one file, small modules."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from deepspeed.runtime.pipe.engine import PipelineEngine

import ds_ddg
from ds_ddg.engine import DDGEngine
from ds_ddg.engine import engine as engine_module
from ds_ddg.entry import _seams
from ds_ddg.host import EngineHost, Host
from helpers import toy
from helpers.distributed import GetRanks

PACKAGE = Path(ds_ddg.__file__).parent
TESTS = PACKAGE.parent / "tests"
ACROSS = {
    "checkpoint": {"failures"},
    "cli": {"command_line"},
    "engine": {
        "around_training",
        "between_calls",
        "collaborators",
        "exact",
        "failures",
        "launched",
        "layers",
        "lost_ranks",
        "model_features",
        "resources",
        "staged",
        "topologies",
        "two_nodes",
        "walks",
        "wire_data",
    },
    "models": {"training"},
    "schedules": {"rivals"},
    "staleness": {"in_the_engine"},
    "study": {"in_other_loops"},
    "weights": {"clip", "deepspeed_optimizers", "fp16", "precision"},
}
"""Files of tests that span modules, by the folder that they are about; all others have the name of one module."""
LONG = {"engine/engine.py": 500, "reference.py": 265}
"""Modules that may be longer than the rest: all overrides with the documentation of what scripts call; the oracle."""


def modules() -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(ds_ddg.__path__, "ds_ddg."):
        if not found.name.endswith("__main__"):
            yield importlib.import_module(found.name)


def test_at_most_two_classes_of_ours_are_in_an_engine() -> None:
    ours = [cls for cls in DDGEngine.__mro__ if cls.__module__.startswith("ds_ddg")]
    assert 1 <= len(ours) <= 2


def test_only_one_file_derives_from_deepspeeds_engine() -> None:
    found = {
        cls.__module__
        for module in modules()
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, PipelineEngine) and cls is not PipelineEngine
    }
    assert found == {engine_module.__name__}


def test_every_override_is_marked_and_checked_at_initialize() -> None:
    """What is marked is what `initialize` compares with the DeepSpeed that is installed."""
    checked = {name for owner, name in _seams() if owner is PipelineEngine}
    own = {name for name in vars(DDGEngine) if hasattr(PipelineEngine, name) and not name.startswith("__")}
    overrides = own - {"_INSTRUCTION_MAP", "_abc_impl"}
    assert len(overrides) > 25
    assert overrides <= checked


def test_attributes_are_read_where_they_are_assigned() -> None:
    """Whatever the engine reads of itself, it declares itself, or DeepSpeed has it."""
    tree = ast.parse(inspect.getsource(DDGEngine).lstrip())
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    assert len(read) > 20
    declared = {*vars(DDGEngine), *DDGEngine.__annotations__}
    deepspeeds = {name for cls in PipelineEngine.__mro__ for name in vars(cls)} | set(Host.__annotations__)
    source = "".join(inspect.getsource(cls) for cls in PipelineEngine.__mro__[:2])
    unknown = {name for name in read - declared - deepspeeds if f"self.{name} = " not in source}
    assert not unknown


def missing_of_host(rank: int, world_size: int) -> list[str]:
    """What the protocol lists and a real engine has not, after a call."""
    engine = toy.engine(world_size, 1)
    engine.train_batch(toy.batches(1))
    names = [*Host.__annotations__, *(name for name, value in vars(Host).items() if callable(value))]
    own = vars(EngineHost)
    missing = [name for name in names if not name.startswith("__") and name not in own and not hasattr(engine, name)]
    engine.drain()
    return missing


def test_the_protocol_lists_what_deepspeeds_engine_has(ranks: GetRanks) -> None:
    assert ranks(2).run(missing_of_host) == [[], []]


@pytest.mark.parametrize("name", ["weights.stage_optimizer", "telemetry.reporter", "engine.micro_batch", "checkpoint"])
def test_collaborators_know_no_engine(name: str) -> None:
    """They get a `Host` handed in, which a test can replace."""
    module = importlib.import_module(f"ds_ddg.{name}")
    imported = {value for value in vars(module).values() if inspect.isclass(value)}
    assert not any(issubclass(cls, PipelineEngine) for cls in imported)


def test_modules_and_folders_are_small() -> None:
    long = {}
    for path in PACKAGE.rglob("*.py"):
        name, lines = path.relative_to(PACKAGE).as_posix(), len(path.read_text().splitlines())
        if lines > LONG.get(name, 255):
            long[name] = lines
    assert not long
    folders: dict[Path, int] = {}
    for path in PACKAGE.rglob("*.py"):
        folders[path.parent] = folders.get(path.parent, 0) + 1
    crowded = {folder.relative_to(PACKAGE).as_posix(): n for folder, n in folders.items() if n > 17}
    assert not crowded


def test_importing_the_package_has_no_effect_of_its_own() -> None:
    """Neither registries of a whole process nor hooks: an object that an engine makes has them."""
    calls: list[Any] = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                calls.append((path.name, ast.unparse(node)))
    assert calls == []


def test_test_files_are_named_after_what_they_test() -> None:
    folders = {path.parent for path in PACKAGE.glob("*/__init__.py")}
    assert len(folders) > 8
    for folder in folders:
        names = {path.stem for path in folder.iterdir()}
        tests = {path.stem.removeprefix("test_") for path in (TESTS / folder.name).glob("test_*.py")}
        assert tests, f"no tests for {folder.name}"
        assert tests - names == ACROSS.get(folder.name, set()), folder.name


def test_names_of_tests_are_short() -> None:
    names = {
        node.name
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert len(names) > 500
    assert not {name for name in names if len(name) > 55}
