"""The documentation: links lead somewhere, generated pages are fresh, the site builds without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PAGES = sorted([*PROJECT.glob("*.md"), *(PROJECT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of `page`, as both GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {re.sub(r"\s+", "-", heading.strip()) for heading in plain}


def broken_links(page: Path, text: str) -> list[str]:
    """Return the relative links of `page` that lead nowhere, given its `text`."""
    broken = []
    for link in LINK.findall(FENCED.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_would_be_seen() -> None:
    page = PROJECT / "README.md"
    assert broken_links(page, "[a](nothing.py) [b](docs/choosing.md#nothing) [c](README.md#install)") == [
        "nothing.py",
        "docs/choosing.md#nothing",
    ]


def test_the_first_page_is_short() -> None:
    assert len((PROJECT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_readme_lists_every_setting_with_its_default() -> None:
    import json

    from ds_ddg.config import DDGConfig

    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", (PROJECT / "README.md").read_text(encoding="utf-8"), re.M))
    assert rows == {key: json.dumps(value) for key, value in DDGConfig().model_dump().items()}


@pytest.mark.parametrize(
    "command",
    [["docs/site/configuration.py", "--check"], ["-m", "mkdocs", "build", "--strict", "--site-dir", "{tmp}"]],
    ids=["the page of settings is what the model says", "the site builds without a warning"],
)
def test_site(command: list[str], tmp_path: Path) -> None:
    command = [part.format(tmp=tmp_path / "site") for part in command]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=PROJECT, capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
