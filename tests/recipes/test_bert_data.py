"""The BERT recipes' data: tokens, masks and labelled files, which are checked."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from recipes.bert import glue, text
from recipes.common import IGNORED
from recipes.language import corpus

SENTENCES = [f"Document {n} speaks of subject number {n * 7 % 13}, at some length." for n in range(200)]


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_the_same_text_gives_the_same_vocabulary() -> None:
    """The trainer of the tokenizers library gives another one each time: its hash tables are seeded at random."""
    documents = list(corpus.docstrings("json"))
    vocabularies = [text.train_tokenizer(documents, 600, 32).get_vocab() for _ in range(4)]
    assert len(vocabularies[0]) == 600
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def test_the_vocabulary_covers_the_text_for_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = text.train_tokenizer(SENTENCES, vocabulary=150, max_length=16)
    assert len(tokenizer) <= 150
    assert [tokenizer.convert_tokens_to_ids(token) for token in text.SPECIAL] == [0, 1, 2, 3, 4]
    assert {"speaks", "number"} <= set(tokenizer.get_vocab())
    ids = tokenizer(SENTENCES)["input_ids"]
    assert tokenizer.unk_token_id not in itertools.chain.from_iterable(ids)
    assert tokenizer.decode(ids[3], skip_special_tokens=True).startswith("document 3 speaks of")
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(SENTENCES)["input_ids"] == ids
    assert again.model_max_length == 16
    with pytest.raises(ValueError, match=r"--vocabulary 20 is too small .* alone are \d\d"):
        text.train_tokenizer(SENTENCES, vocabulary=20, max_length=16)


def test_packing_keeps_every_token_in_order() -> None:
    tokenizer = text.train_tokenizer(SENTENCES, 150, 16)
    packed = text.pack(SENTENCES, tokenizer, 16)
    assert packed.dtype == torch.int32
    assert packed.shape[1] == 16
    assert set(packed[:, 0].tolist()) == {tokenizer.cls_token_id}
    stream = list(
        itertools.chain.from_iterable(
            [*tokens, tokenizer.sep_token_id] for tokens in tokenizer(SENTENCES, add_special_tokens=False)["input_ids"]
        )
    )
    body = packed[:, 1:].flatten().tolist()
    assert body == stream[: len(body)]
    assert len(stream) - len(body) < 15
    with pytest.raises(ValueError, match=r"1 documents of \d+ tokens do not fill one sequence of 64"):
        text.pack(SENTENCES[:1], tokenizer, 64)


def test_masking_is_that_of_bert() -> None:
    tokenizer = text.train_tokenizer(SENTENCES, 150, 16)
    tokens = torch.randint(5, len(tokenizer), (400, 64), generator=torch.Generator().manual_seed(0))
    tokens[:, 0], tokens[:, 31] = tokenizer.cls_token_id, tokenizer.sep_token_id
    inputs, labels = text.Masking.of(tokenizer)(tokens, torch.Generator().manual_seed(1))
    chosen = labels != IGNORED
    assert set(chosen.sum(dim=1).tolist()) == {round(0.15 * 64)}
    assert not chosen[:, [0, 31]].any()
    assert torch.equal(labels[chosen], tokens[chosen])
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    masked = inputs[chosen] == tokenizer.mask_token_id
    kept = inputs[chosen] == tokens[chosen]
    replaced = ~masked & ~kept
    for share, expected in ((masked, 0.8), (kept, 0.1), (replaced, 0.1)):
        assert abs(float(share.float().mean()) - expected) < 0.03
    assert inputs[chosen][replaced].min() >= len(text.SPECIAL)  # never a special token


def test_a_short_sequence_is_masked_no_further_than_words() -> None:
    tokenizer = text.train_tokenizer(SENTENCES, 150, 16)
    tokens = torch.full((1, 32), tokenizer.sep_token_id)
    tokens[0, 5] = 9
    _, labels = text.Masking.of(tokenizer)(tokens, torch.Generator().manual_seed(1))
    assert (labels != IGNORED).nonzero().tolist() == [[0, 5]]


# --- GLUE in its true formats ----------------------------------------------------------------------------------------

SST2 = "sentence\tlabel\nhide new secretions from the parental units \t0\nit 's \"a charming journey \t1\n"
MNLI_COLUMNS = ["index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse"]
MNLI_COLUMNS += ["sentence1_parse", "sentence2_parse", "sentence1", "sentence2"]


def mnli(rows: list[tuple[str, str, str]], annotators: int = 1) -> str:
    """A file as GLUE has it: one annotator in train.tsv, five in dev_matched.tsv."""
    header = [*MNLI_COLUMNS, *(f"label{n + 1}" for n in range(annotators)), "gold_label"]
    lines = [
        [str(n), "31193", "31193n", "government", "( a )", "( b )", "(ROOT a)", "(ROOT b)", one, two]
        + ["neutral"] * annotators
        + [gold]
        for n, (one, two, gold) in enumerate(rows)
    ]
    return "".join("\t".join(line) + "\n" for line in [header, *lines])


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_sst2(tmp_path: Path) -> None:
    """With a quote that nothing closes, as the published file has some."""
    examples = glue.read_examples(write(tmp_path / "train.tsv", SST2))
    assert examples.texts == [("hide new secretions from the parental units ",), ("it 's \"a charming journey ",)]
    assert examples.labels == ["0", "1"]
    assert glue.label_names(examples, examples) == ["0", "1"]


def test_mnli(tmp_path: Path) -> None:
    rows = [('Conceptually "cream', "Product", "neutral"), ("a\x85b\u2028c", "d", "entailment"), ("e", "f", "-")]
    for name, annotators in (("train.tsv", 1), ("dev_matched.tsv", 5)):
        examples = glue.read_examples(write(tmp_path / name, mnli(rows, annotators).replace("\n", "\r\n")))
        assert examples.texts == [row[:2] for row in rows[:2]]
        assert examples.labels == ["neutral", "entailment"]


@pytest.mark.parametrize(
    ("header", "row", "texts", "label"),
    [
        ("index question sentence label", "0 q s entailment", ("q", "s"), "entailment"),
        ("id qid1 qid2 question1 question2 is_duplicate", "0 1 2 a b 1", ("a", "b"), "1"),
        ("\ufeffQuality,#1 ID,#2 ID,#1 String,#2 String", "1,7,8,x,y", ("x", "y"), "1"),
        ("index sentence1 sentence2 label", "0 a b not_entailment", ("a", "b"), "not_entailment"),
    ],
)
def test_other_tasks_of_glue(tmp_path: Path, header: str, row: str, texts: tuple[str, str], label: str) -> None:
    sep = "," if "," in header else " "
    content = f"{header}\n{row}\n".replace(sep, "\t")
    examples = glue.read_examples(write(tmp_path / "train.tsv", content))
    assert (examples.texts, examples.labels) == ([texts], [label])


def test_csv_has_quoted_fields(tmp_path: Path) -> None:
    content = 'label,text\nbad,"one, ""two""\nthree"\n\ngood,four\n'
    examples = glue.read_examples(write(tmp_path / "train.csv", content))
    assert examples.texts == [('one, "two"\nthree',), ("four",)]
    assert examples.labels == ["bad", "good"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        pytest.param("train.tsv", None, "does not exist; expected a file of GLUE's layouts", id="missing"),
        pytest.param("train.json", "{}", r"expected a .tsv file .*, or a .csv file, got .json", id="suffix"),
        pytest.param("train.tsv", "", "is empty; expected a header", id="empty"),
        pytest.param("train.tsv", "sentence\tlabel\n", "has a header but no examples", id="header only"),
        pytest.param(
            "train.tsv", "a film\t1\n", r"no column with text.*\['a film', '1'\].*sentence1 and", id="no text"
        ),
        pytest.param("test.tsv", "index\tsentence\n0\tx\n", r"no column with labels.*\(test files", id="no label"),
        pytest.param("train.tsv", SST2 + "cut off", "line 4: 1 fields, its header has 2", id="truncated"),
        pytest.param("train.tsv", SST2 + "x\t\n", "line 4: no label in the column 'label'", id="label missing"),
        pytest.param("train.tsv", b"sentence\tlabel\n\xff\xfe\t1\n", "is not UTF-8 text", id="not utf-8"),
        pytest.param("train.csv", 'text,label\n"a" b,1\n', "is not comma-separated text with quoted", id="bad quotes"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, name: str, content: Any, expected: str) -> None:
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises((ValueError, OSError), match=re.escape(str(path)) + ".*" + expected):
        glue.read_examples(path)


def test_training_and_held_out_examples_must_fit() -> None:
    train = glue.Examples([("a",), ("b",)], ["x", "y"])
    with pytest.raises(ValueError, match="labels that the training examples lack: 'z'; those have 'x', 'y'"):
        glue.label_names(train, glue.Examples([("a",)], ["z"]))
    with pytest.raises(ValueError, match="one label only, 'x'"):
        glue.label_names(glue.Examples([("a",)], ["x"]), train)
    with pytest.raises(ValueError, match="single texts, the held-out ones pairs of texts"):
        glue.label_names(train, glue.Examples([("a", "b")], ["x"]))


def test_embedded_examples_are_docstrings_of_their_package() -> None:
    train, held_out = glue.stdlib_packages()
    assert set(held_out.labels) == set(train.labels) == set(glue.PACKAGES)
    texts = [text for (text,) in train.texts + held_out.texts]
    assert len(set(texts)) == len(texts) > 1000
    assert all(corpus.is_held_out(text) for (text,) in held_out.texts)
    of_xml = set(corpus.docstrings("xml"))
    assert all(text in of_xml for (text,), label in zip(train.texts, train.labels, strict=True) if label == "xml")
