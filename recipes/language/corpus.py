"""Documents for language models: text files, or the docstrings of the Python standard library (no download).

Whether a document is held out depends on its text alone. So it is held out of fine-tuning as well as of pretraining,
whatever other documents there are.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

HELD_OUT = 10
"""One document out of so many is held out."""

TESTS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
"""Folders of the standard library whose docstrings are not its documentation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which documents to train on and to measure."""
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        help="text files and folders with .txt files, documents separated by blank lines (default: the docstrings of "
        "the Python standard library)",
    )
    parser.add_argument("--held-out", type=Path, nargs="+", help="the same, to measure (default: a tenth of the text)")


def documents(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the training and the held-out documents that the arguments name; errors as of the functions below."""
    found = read_documents(args.text) if args.text else docstrings()
    return split(found, read_documents(args.held_out) if args.held_out else None)


def is_held_out(document: str) -> bool:
    return zlib.crc32(document.encode()) % HELD_OUT == 0


def split(documents: Iterable[str], held_out: Iterable[str] | None = None) -> tuple[list[str], list[str]]:
    """Return training and held-out documents, each once, in the order in which they come.

    Args:
        documents: all of them, or those to train on.
        held_out: documents of its own to measure; training documents that are among them are left out.

    Raises:
        ValueError: there is no training document, or none that is held out.
    """
    unique = dict.fromkeys(documents)
    apart = dict.fromkeys(filter(is_held_out, unique) if held_out is None else held_out)
    train = [document for document in unique if document not in apart]
    if not train or not apart:
        raise ValueError(
            f"{len(unique)} different documents give {len(train)} to train on and {len(apart)} to measure (one out of "
            f"{HELD_OUT}); give more text, documents separated by blank lines, or files of its own with --held-out"
        )
    return train, list(apart)


def read_documents(paths: Iterable[Path]) -> list[str]:
    """Read the documents in UTF-8 text files, and in all ``*.txt`` below folders; blank lines separate documents.

    FileNotFoundError or ValueError, with what was expected where, if a path is missing or is not such text.
    """
    documents: list[str] = []
    for path in paths:
        for file in _text_files(path):
            try:
                lines = file.read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file} is not UTF-8 text (byte {error.start}: {error.reason}); expected plain text, documents "
                    "separated by blank lines"
                ) from None
            documents.extend(_paragraphs(lines))
    if not documents:
        raise ValueError(f"no text in {', '.join(map(str, paths))}; expected documents separated by blank lines")
    return documents


def _text_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; expected a text file, or a folder with .txt files below it")
    files = sorted(path.rglob("*.txt"))
    if not files:
        raise FileNotFoundError(f"no .txt file below {path}; other names can be given one by one")
    return files


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []


def docstrings(package: str = "") -> Iterator[str]:
    """Yield the docstrings of all modules, classes and functions of this Python's standard library, or of one package.

    They come in the order of the files' names, each as ``inspect.cleandoc`` shows it. The files are parsed, not
    imported.

    Raises:
        ValueError: there is none.
    """
    library = Path(sysconfig.get_path("stdlib"))
    found = False
    for file in sorted((library / package).rglob("*.py")):
        if TESTS.isdisjoint(file.relative_to(library).parts):
            for docstring in _docstrings_of(file):
                found = True
                yield docstring
    if not found:
        raise ValueError(f"no docstrings below {library / package}; this Python has no source of its library there")


def _docstrings_of(file: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(file.read_bytes(), filename=str(file))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and docstring.strip():
                yield docstring.strip()
