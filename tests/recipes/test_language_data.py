"""Documents and batches of the language models: what is held out stays out, both ends of a pipeline see the same."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from recipes.language import corpus
from recipes.language.batches import IGNORED, Batch, TrainBatches, held_out_batches

SENTENCES = [f"Document {n} speaks of subject number {n * 7 % 13}, at some length." for n in range(200)]


# --- documents -------------------------------------------------------------------------------------------------------


def test_held_out_documents_are_no_training_documents() -> None:
    train, held_out = corpus.split([*SENTENCES, *SENTENCES[:20]])
    assert sorted(train + held_out) == sorted(SENTENCES)
    assert 5 < len(held_out) < 40
    # In other company the same documents are held out.
    _, fewer = corpus.split(reversed(SENTENCES[:150]))
    assert set(fewer) == set(held_out) & set(SENTENCES[:150])


def test_held_out_documents_of_their_own() -> None:
    train, held_out = corpus.split(["one", "two", "three", "one"], ["two", "four", "four"])
    assert (train, held_out) == (["one", "three"], ["two", "four"])


def test_too_few_documents() -> None:
    with pytest.raises(
        ValueError, match=r"1 different documents give [01] to train on and [01] to measure .*; give more"
    ):
        corpus.split(["one", "one"])
    with pytest.raises(ValueError, match=r"1 different documents give 0 to train on and 1 to measure .*; give more"):
        corpus.split(["one"], ["one"])


def test_text_files_and_folders_of_them(tmp_path: Path) -> None:
    (tmp_path / "below" / "deeper").mkdir(parents=True)
    (tmp_path / "below" / "b.txt").write_text("one\nline two\n\n  \n\ntwo\n")
    (tmp_path / "below" / "deeper" / "a.txt").write_bytes("\ufeffthree é\r\n\r\nfour".encode())
    (tmp_path / "below" / "ignored.md").write_text("five")
    (tmp_path / "six.md").write_text("six")
    read = corpus.read_documents([tmp_path / "below", tmp_path / "six.md"])
    assert read == ["one\nline two", "two", "three é", "four", "six"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(None, "data.txt does not exist; expected a text file, or a folder", id="missing"),
        pytest.param(
            b"caf\xe9 au lait", r"data.txt is not UTF-8 text \(byte 3: .*\); expected plain text", id="latin1"
        ),
        pytest.param(b" \n\n", "no text in .*data.txt; expected documents separated by blank lines", id="empty"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "data.txt").write_bytes(content)
    with pytest.raises((ValueError, OSError), match=expected):
        corpus.read_documents([tmp_path / "data.txt"])


def test_a_folder_without_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("a")
    with pytest.raises(FileNotFoundError, match=f"no .txt file below {re.escape(str(tmp_path))}"):
        corpus.read_documents([tmp_path])


def test_docstrings_are_of_modules_classes_and_functions() -> None:
    import json

    found = list(corpus.docstrings("json"))
    source = Path(json.__file__).read_text()
    assert ast.get_docstring(ast.parse(source)) in found
    for documented in (json.dumps, json.JSONDecoder, json.JSONEncoder.iterencode):
        assert (documented.__doc__ or "").strip().splitlines()[0] in {docstring.splitlines()[0] for docstring in found}
    assert found == list(corpus.docstrings("json"))
    with pytest.raises(ValueError, match=r"no docstrings below .*nothing_here"):
        list(corpus.docstrings("nothing_here"))


# --- batches ---------------------------------------------------------------------------------------------------------


def noisy(rows: Tensor, generator: torch.Generator) -> Batch:
    """Rows labelled by their number, with noise as inputs."""
    return torch.rand(len(rows), generator=generator), rows.clone()


def taken(batches: TrainBatches, call: int, calls: int) -> list[Batch]:
    return list(itertools.islice(batches.from_call(call), calls * batches.micro_batches))


def same(one: list[Batch], other: list[Batch]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def test_both_ends_and_a_resumed_run_see_the_same_batches() -> None:
    batches = TrainBatches(50, noisy, micro_batch_size=4, micro_batches=3, seed=5)
    assert len(batches) == 4
    torch.manual_seed(1)
    first = taken(batches, 0, 10)
    torch.manual_seed(2)
    torch.rand(7)
    assert same(first, taken(TrainBatches(50, noisy, 4, 3, seed=5), 0, 10))
    for call in (1, 4, 7):
        assert same(first[3 * call :], taken(batches, call, 10 - call))
    assert not same(first, taken(TrainBatches(50, noisy, 4, 3, seed=6), 0, 10))


def test_no_row_comes_twice_and_every_epoch_is_reordered() -> None:
    batches = TrainBatches(50, noisy, 4, 3, seed=0)
    epochs = [torch.cat([labels for _, labels in taken(batches, 4 * epoch, 4)]) for epoch in range(3)]
    assert all(len(epoch.unique()) == len(epoch) == 48 for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3
    noise = [torch.cat([inputs for inputs, _ in taken(batches, 4 * epoch, 4)]) for epoch in range(2)]
    assert len(torch.cat(noise).unique()) == 96  # each micro-batch draws anew


def test_data_parallel_ranks_share_an_epoch() -> None:
    ranks = [TrainBatches(50, noisy, 4, 2, 0, rank, 2) for rank in (0, 1)]
    labels = [torch.cat([labels for _, labels in taken(batches, 0, len(batches))]) for batches in ranks]
    assert len(ranks[0]) == 3
    assert len(torch.cat(labels).unique()) == 48


def test_too_few_rows_for_one_call_are_refused() -> None:
    with pytest.raises(ValueError, match=r"20 rows of training data are too few .* 1 \(data parallel\) x 4 .* x 8"):
        TrainBatches(20, noisy, micro_batch_size=8, micro_batches=4, seed=0)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_held_out_rows_are_measured_once_and_alike(size: int) -> None:
    shards = [held_out_batches(50, noisy, 8, rank, size) for rank in range(size)]
    assert len({len(shard) for shard in shards}) == 1
    assert all(len(labels) == 8 for shard in shards for _, labels in shard)
    labels = torch.cat([labels for shard in shards for _, labels in shard])
    assert torch.equal(labels[labels != IGNORED].sort().values, torch.arange(50))
    assert all(same(shards[rank], held_out_batches(50, noisy, 8, rank, size)) for rank in range(size))
