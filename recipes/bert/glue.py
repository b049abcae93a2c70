"""Labelled texts for fine-tuning: files of GLUE's layouts, or docstrings labelled by the package they document.

    SST-2   sentence, label                                    one text
    MNLI    sentence1, sentence2, ..., gold_label              two texts; label1 to label5 are single annotators'
    QNLI    question, sentence, label; QQP question1, question2, is_duplicate; MRPC #1 String, #2 String, Quality

``.tsv`` as GLUE has it: a header, fields between tabs, quotes mean nothing. ``.csv``: a header, commas, quoted fields.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.language import corpus

TEXTS = [
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("#1 String", "#2 String"),
    ("sentence",),
    ("text",),
]
"""Columns with the text or the pair of texts; the first line that a file's header has counts."""

LABELS = ["gold_label", "label", "is_duplicate", "Quality"]
"""Columns with the label; the first that a file's header has counts."""

NO_CONSENSUS = "-"
"""A value of `gold_label`: the annotators disagree. Such rows are left out."""

PACKAGES = ["asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib", "xml"]
MIN_WORDS = 4
"""Shorter docstrings say nothing of their package."""


@dataclass(frozen=True)
class Examples:
    """Texts with their labels."""

    texts: list[tuple[str, ...]]
    """One text or a pair, for all examples alike."""
    labels: list[str]

    def __len__(self) -> int:
        return len(self.labels)


def read_examples(path: Path) -> Examples:
    """Read the examples of one file; FileNotFoundError or ValueError says what was expected where."""
    if path.suffix not in (".tsv", ".csv"):
        raise ValueError(
            f"{path}: expected a .tsv file as GLUE has them, or a .csv file, got {path.suffix or 'neither'}"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected a file of GLUE's layouts with labels, like train.tsv"
        )
    try:
        rows = list(_tsv(path) if path.suffix == ".tsv" else _csv(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason})") from None
    except csv.Error as error:
        raise ValueError(f"{path} is not comma-separated text with quoted fields: {error}") from None
    if not rows:
        raise ValueError(f"{path} is empty; expected a header with the names of the columns")
    (_, header), *lines = rows
    texts, label = _columns(path, header)
    places, label_place = [header.index(name) for name in texts], header.index(label)
    examples = Examples([], [])
    for number, fields in lines:
        if len(fields) != len(header):
            raise ValueError(f"{path}, line {number}: {len(fields)} fields, its header has {len(header)}")
        if fields[label_place] == "":
            raise ValueError(f"{path}, line {number}: no label in the column {label!r}")
        if label != LABELS[0] or fields[label_place] != NO_CONSENSUS:
            examples.texts.append(tuple(fields[place] for place in places))
            examples.labels.append(fields[label_place])
    if not examples.labels:
        raise ValueError(f"{path} has a header but no examples")
    return examples


def _tsv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield line numbers and fields. Only a line feed ends a line: fields may hold Unicode's other separators."""
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            yield number, line.rstrip("\r\n").split("\t")


def _csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        for fields in reader:
            if fields:
                yield reader.line_num, fields


def _columns(path: Path, header: Sequence[str]) -> tuple[tuple[str, ...], str]:
    for texts in TEXTS:
        if set(texts) <= set(header):
            break
    else:
        wanted = "; ".join(" and ".join(names) for names in TEXTS)
        raise ValueError(f"{path}: no column with text. Its first line is {list(header)}; expected one of: {wanted}")
    for label in LABELS:
        if label in header:
            return texts, label
    raise ValueError(
        f"{path}: no column with labels. Its first line is {list(header)}; expected one of: {', '.join(LABELS)} "
        "(test files of GLUE have none)"
    )


def stdlib_packages() -> tuple[Examples, Examples]:
    """Return docstrings, labelled by the package of the standard library that they document, to train on and held out.

    Examples held out here are held out of the embedded text for pretraining, too.
    """
    package_of: dict[str, str] = {}
    for package in PACKAGES:
        for docstring in corpus.docstrings(package):
            if len(docstring.split()) >= MIN_WORDS:
                package_of.setdefault(docstring, package)
    train, held_out = corpus.split(package_of)
    return (
        Examples([(text,) for text in train], [package_of[text] for text in train]),
        Examples([(text,) for text in held_out], [package_of[text] for text in held_out]),
    )


def label_names(train: Examples, held_out: Examples) -> list[str]:
    """Return the sorted labels of the training examples; ValueError if there is only one, or held-out ones differ."""
    names = sorted(set(train.labels))
    if len(names) < 2:
        raise ValueError(f"the training examples have one label only, {names[0]!r}; expected two or more")
    if strange := sorted(set(held_out.labels) - set(names)):
        raise ValueError(
            f"the held-out examples have labels that the training examples lack: {', '.join(map(repr, strange[:5]))}; "
            f"those have {', '.join(map(repr, names[:20]))}"
        )
    if len(train.texts[0]) != len(held_out.texts[0]):
        raise ValueError(
            f"the training examples are {_kind(train)}, the held-out ones {_kind(held_out)}; expected the same layout"
        )
    return names


def _kind(examples: Examples) -> str:
    return "pairs of texts" if len(examples.texts[0]) == 2 else "single texts"
