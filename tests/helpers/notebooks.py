"""Notebooks of scripts with cells: ``# %%`` begins one with code, ``# %% [markdown]`` one with comments for text.

    python tests/helpers/notebooks.py examples/what_would_delay_do.py

writes the notebook beside the script, so that the two cannot drift apart. What stands before the first cell is the
script's docstring, which becomes text too.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any


def notebook(script: str) -> dict[str, Any]:
    """Return the notebook of a script's text in Jupyter's format, without outputs."""
    head, *marked = re.split(r"^# %%(.*)\n", script, flags=re.M)
    cells = [_cell("markdown", ast.get_docstring(ast.parse(head)) or "", 0)]
    for number, (mark, text) in enumerate(zip(marked[::2], marked[1::2], strict=True), 1):
        if mark.strip() == "[markdown]":
            cells.append(_cell("markdown", re.sub(r"^# ?", "", text, flags=re.M), number))
        else:
            cells.append(_cell("code", text, number))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _cell(kind: str, text: str, number: int) -> dict[str, Any]:
    lines = text.strip().splitlines(keepends=True)
    cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": lines}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def written(script: str) -> str:
    """Return what the notebook's file holds."""
    return json.dumps(notebook(script), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.with_suffix(".ipynb").write_text(written(path.read_text()))
