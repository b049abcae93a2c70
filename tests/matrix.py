"""The support matrix of docs/support.md, written from the tests that passed: ``make matrix``.

A test says what it proves with a marker:

    @pytest.mark.proves("bf16")                       the engine equals the oracle with it
    @pytest.mark.proves("bf16", exact=False)          to a tolerance that the test names
    @pytest.mark.refuses("fp16 on CPU", "use bf16")   the engine refuses it, on every rank, with that remedy

Which settings of the schedule a test is about is read off its parameters: "weights" and "activations", a "mode" of
both, a "ddg" block, a "case" or "layout" that has one; or `modes=[("current", "keep")]` says it. A test without any
of them is about the default, "stash" and "keep".
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

MODES = [("stash", "keep"), ("stash", "recompute"), ("current", "keep"), ("current", "recompute")]

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
    """What passed, by feature and mode."""

    proofs: dict[str, dict[tuple[str, str], list[bool]]] = field(default_factory=lambda: defaultdict(dict))
    """Whether exact, for each test that passed."""
    files: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    refusals: dict[str, str] = field(default_factory=dict)
    failed: int = 0

    def note(self, item: pytest.Item) -> None:
        """A test passed."""
        for marker in item.iter_markers("proves"):
            exact = marker.kwargs.get("exact", True)
            for feature in marker.args:
                for mode in marker.kwargs.get("modes", [mode_of(item)]):
                    self.proofs[feature].setdefault(mode, []).append(exact)
                self.files[feature].add(item.path.stem)
        for marker in item.iter_markers("refuses"):
            what, remedy = marker.args
            self.refusals[what] = remedy

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
    """One field of the table."""
    return f"{'=' if all(proofs) else '~'} {len(proofs)}" if proofs else "-"


def mode_of(item: pytest.Item) -> tuple[str, str]:
    """The settings of the schedule that a test is about."""
    parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    for name in ("ddg", "mode", "case", "layout"):
        block = parameters.get(name)
        block = block.get("ddg", block) if isinstance(block, dict) else getattr(block, "ddg", block)
        if isinstance(block, tuple):
            return block[0], block[1]
        if isinstance(block, dict):
            return block.get("weights", "stash"), block.get("activations", "keep")
    return parameters.get("weights", "stash"), parameters.get("activations", "keep")


class Plugin:
    """Collects what passed and writes the page at the end."""

    def __init__(self, path: Path) -> None:
        self.path, self.matrix = path, Matrix()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        if report.failed:
            self.matrix.failed += 1
        elif report.when == "call" and report.passed:
            self.matrix.note(item)
        return report

    def pytest_sessionfinish(self) -> None:
        if self.matrix.failed:
            print(f"\n{self.path} is left as it is: {self.matrix.failed} tests failed")
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(str(self.matrix))
            print(f"\nwrote {self.path}")
