"""Hooks of mkdocs: pages whose text stands elsewhere in the project, and links that lead out of docs/.

A link out of docs/ works where people read the files; the site has no such files, so there its target is named
instead. A target that does not exist is a warning, which a strict build turns into an error.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

PROJECT = Path(__file__).resolve().parents[2]
ELSEWHERE = {"contributing.md": "CONTRIBUTING.md", "changes.md": "CHANGELOG.md", "security.md": "SECURITY.md"}
"""Pages of the site, and the files of the project that hold their text."""

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
_log = logging.getLogger("mkdocs.hooks.links")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages whose text stands elsewhere."""
    for page, source in ELSEWHERE.items():
        text = (PROJECT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_within("", page, text)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Name the targets of links that lead out of docs/."""
    if page.file.src_uri in ELSEWHERE:
        return markdown
    return _within("docs", page.file.src_uri, markdown)


def _within(base: str, page: str, markdown: str) -> str:
    """Return `markdown`, a text whose links start in a folder of the project, as a page of the site.

    Args:
        base: the folder below which `page` lies; "" for a file that lies in the project's root.
        page: the path of the page below docs/.
        markdown: the text.
    """
    start = posixpath.dirname(posixpath.join(base, page)) if base else ""

    def replaced(match: re.Match[str]) -> str:
        text, link, anchor = match[1], match[2], match[3] or ""
        target = posixpath.normpath(posixpath.join(start, link))
        if not (PROJECT / target).exists():
            _log.warning("%s links to %s, which does not exist", page, target)
        if target.startswith("docs/"):
            inside = posixpath.relpath(target, posixpath.join("docs", posixpath.dirname(page)))
            return f"[{text}]({inside}{anchor})"
        return f"`{target}`" if text.strip("`") in target else f"{text} (`{target}`)"

    return _LINK.sub(replaced, markdown)
