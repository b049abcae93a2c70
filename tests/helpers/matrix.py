"""The support matrix of docs/support.md, written from the tests that passed: ``make matrix``.

A test says with a marker what it proves, and in which settings of the schedule:

    @pytest.mark.proves("bf16", modes="ddg")              the engine equals the oracle with it
    @pytest.mark.proves("bf16", modes=..., exact=False)   to a tolerance that the test names
    @pytest.mark.refuses("fp16 on CPU", "use bf16")       the engine refuses it, on every rank, with that remedy

    modes=[("current", "keep")]         these pairs of `weights` and `activations`; often `helpers.modes.DEFAULT`
    modes="ddg"                         the parameter of that name holds the pair, or a `ddg` block
    modes="case.ddg"                    the parameter `case` has one, as a key or an attribute
    modes=("weights", "activations")    parameters that are keys of a block; keys left out have their default

A marker that gives none, or names what the test does not have, ends the collection with an error.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from helpers.modes import DEFAULT, MODES

_SAID = "matrix"

HEADER = """\
# What works

Written by `make matrix` from the tests that passed; change the tests, not this page. "=": parameters, buffers and
losses equal the one-process oracle (`ds_ddg.reference`, or DeepSpeed's own engine where it does the same) to the last
bit. "~": to a tolerance that the tests name. The number is that of the tests behind it; "-": no test covers this.

| feature | stash, keep | stash, recompute | current, keep | current, recompute | tests |
|---|---|---|---|---|---|
"""


@dataclass
class Matrix:
    """The tests that passed, by feature and mode."""

    proofs: dict[str, dict[tuple[str, ...], list[bool]]] = field(default_factory=lambda: defaultdict(dict))
    """Whether each test that passed is exact, by feature and file."""
    files: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    refusals: dict[str, str] = field(default_factory=dict)
    failed: int = 0

    def note(self, file: str, proves: Iterable[tuple[str, tuple[str, str], bool]], refuses: Iterable[Any]) -> None:
        """Note that a test of `file` passed, with what `said_by` says of it."""
        for feature, mode, exact in proves:
            self.proofs[feature].setdefault(tuple(mode), []).append(exact)
            self.files[feature].add(file)
        self.refusals.update(refuses)

    def __str__(self) -> str:
        rows = [
            f"| {feature} | {' | '.join(map(cell, (modes.get(mode, []) for mode in MODES)))} | "
            f"{', '.join(f'`{name}`' for name in sorted(self.files[feature]))} |\n"
            for feature, modes in sorted(self.proofs.items(), key=lambda row: row[0].lower())
        ]
        refused = [f"| {what} | {remedy} |\n" for what, remedy in sorted(self.refusals.items(), key=str)]
        tail = ["\n## What is refused, by name, on every rank\n\n| what | instead |\n|---|---|\n", *refused]
        return HEADER + "".join(rows + tail)


def cell(proofs: list[bool]) -> str:
    """Return a field of the table."""
    return f"{'=' if all(proofs) else '~'} {len(proofs)}" if proofs else "-"


def modes_of(item: pytest.Item, marker: pytest.Mark) -> list[tuple[str, str]]:
    """Return the settings of the schedule that a marker of a test names."""
    modes = marker.kwargs.get("modes")
    parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    if isinstance(modes, list) and modes and all(mode in MODES for mode in modes):
        return modes
    try:
        if isinstance(modes, tuple) and modes:
            return [mode_of({name: parameters[name] for name in modes})]
        if isinstance(modes, str):
            name, _, key = modes.partition(".")
            value = parameters[name]
            return [mode_of((value[key] if isinstance(value, dict) else getattr(value, key)) if key else value)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise NoModesError(item, marker, f"{type(error).__name__}: {error}") from error
    raise NoModesError(item, marker, "it names none")


def mode_of(value: Any) -> tuple[str, str]:
    """Return the mode of a pair or of a `ddg` block."""
    if isinstance(value, dict):
        value = (value.get("weights", DEFAULT[0][0]), value.get("activations", DEFAULT[0][1]))
    if value not in MODES:
        raise ValueError(f"{value!r} is neither one of {MODES} nor a block of one")
    return value


class NoModesError(pytest.UsageError):
    """A marker does not say in which settings of the schedule its test proves what it proves."""

    def __init__(self, item: pytest.Item, marker: pytest.Mark, why: str) -> None:
        what = ", ".join(map(repr, marker.args))
        super().__init__(f"{item.nodeid}: proves({what}) needs its modes ({why}); see helpers/matrix.py")


def said_by(item: pytest.Item) -> tuple[str, list[Any], list[Any]]:
    """Return a test's file, what it proves as (feature, mode, exact), and what it refuses as (what, remedy)."""
    proves = [
        (feature, mode, marker.kwargs.get("exact", True))
        for marker in item.iter_markers("proves")
        for feature in marker.args
        for mode in modes_of(item, marker)
    ]
    file = item.nodeid.partition("::")[0].removeprefix("tests/").removesuffix(".py")
    return file, proves, [marker.args for marker in item.iter_markers("refuses")]


class Plugin:
    """Collects the tests that passed and writes the page; reports bring them from the processes that run tests.

    Args:
        path: path of the page; None in a process that only runs tests.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.matrix = path, Matrix()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        report.user_properties.append((_SAID, said_by(item)))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.matrix.failed += 1
        elif report.when == "call" and report.passed:
            self.matrix.note(*dict(report.user_properties)[_SAID])

    def pytest_sessionfinish(self) -> None:
        if self.path is None:
            return
        if self.matrix.failed:
            print(f"\n{self.path} is left as it is: {self.matrix.failed} tests failed")
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(str(self.matrix))
            print(f"\nwrote {self.path}")


def claimed(items: Iterable[pytest.Item]) -> Matrix:
    """Return what the tests claim, as if all passed but those that need a GPU, which the page leaves to README."""
    matrix = Matrix()
    for item in items:
        if item.get_closest_marker("gpu") is None:
            matrix.note(*said_by(item))
    return matrix


def without_counts(page: str) -> list[str]:
    """Return the lines of the page: its rows, which cells are filled, and with what."""
    return re.sub(r"(?<=\| [=~]) \d+(?= \|)", "", page).splitlines()


class StaleCheck:
    """Ends a collection with an error if a page is not what the collected tests claim.

    Args:
        path: path of the page.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        page, claims = without_counts(self.path.read_text()), without_counts(str(claimed(session.items)))
        lines = list(difflib.unified_diff(page, claims, str(self.path), "what the tests claim", lineterm="", n=0))
        if lines:
            raise StalePageError(self.path, lines)


class StalePageError(pytest.UsageError):
    """The page claims something else than the tests."""

    def __init__(self, path: Path, lines: list[str]) -> None:
        super().__init__("\n".join([f"{path} is stale: `make matrix` writes it anew", *lines]))
