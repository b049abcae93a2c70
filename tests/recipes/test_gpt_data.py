"""The GPT recipe's data: a byte-level vocabulary, and sequences in which each token is predicted once."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")

from recipes.common import IGNORED
from recipes.gpt import text
from recipes.gpt.pretrain import measure
from recipes.language import corpus, packing
from recipes.language.batches import held_out_batches

SENTENCES = [f"Document {n} speaks of subject number {n * 7 % 13}, at some length." for n in range(200)]


def test_the_same_text_gives_the_same_vocabulary() -> None:
    documents = list(corpus.docstrings("json"))
    tokenizers = [text.train_tokenizer(documents, 400, 32).backend_tokenizer.to_str() for _ in range(4)]
    assert len(set(tokenizers)) == 1


def test_the_vocabulary_covers_any_text_for_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = text.train_tokenizer(SENTENCES, 300, 16)
    assert len(tokenizer) == 300
    assert tokenizer.tokenize(" speaks of") == ["Ġspeaks", "Ġof"]
    strange = "\tNaïve,\n\n  日本 🙂 \x00"
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.decode(again(strange)["input_ids"], clean_up_tokenization_spaces=False) == strange
    assert again(SENTENCES)["input_ids"] == tokenizer(SENTENCES)["input_ids"]
    assert (again.model_max_length, again.eos_token) == (16, "<|endoftext|>")
    assert len(text.train_tokenizer(SENTENCES, 257, 16)) == 257
    with pytest.raises(ValueError, match=r"--vocabulary 256 is too small: the 256 bytes and .* alone are 257"):
        text.train_tokenizer(SENTENCES, 256, 16)


def test_every_token_is_predicted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = text.train_tokenizer(SENTENCES, 300, 16)
    end = tokenizer.eos_token_id
    stream = [end]
    for sentence in SENTENCES:
        stream += [*tokenizer(sentence)["input_ids"], end]
    monkeypatch.setattr(packing, "ENCODED_TOGETHER", 7)
    packed = text.pack(SENTENCES, tokenizer, 16)
    assert packed.tokens.dtype == torch.int32
    assert packed.tokens.shape[1] == 16
    predicted = packed.tokens[:, 1:].flatten().tolist()
    assert predicted == stream[1:][: len(predicted)]
    assert 0 <= len(stream) - 1 - len(predicted) < 15
    assert packed.tokens[0, 0] == end
    assert all(one[-1] == other[0] for one, other in pairwise(packed.tokens.tolist()))
    assert packed.tokens_per_byte == pytest.approx((len(stream) - 1) / sum(map(len, SENTENCES)))


def test_documents_that_fill_no_sequence_are_refused() -> None:
    tokenizer = text.train_tokenizer(SENTENCES, 300, 64)
    needed = 2 + len(tokenizer(SENTENCES[0])["input_ids"])
    assert text.pack(SENTENCES[:1], tokenizer, needed).tokens.shape == (1, needed)
    with pytest.raises(ValueError, match=rf"1 documents of {needed} tokens do not fill one sequence of {needed + 1}"):
        text.pack(SENTENCES[:1], tokenizer, needed + 1)


def test_rows_that_fill_up_a_batch_are_not_measured() -> None:
    """A whole micro-batch of them as well, as one replica may have."""
    rows = torch.randint(0, 11, (5, 6), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(11, 11, generator=torch.Generator().manual_seed(1))
    expected = F.cross_entropy(logits[rows[:, :-1].flatten()], rows[:, 1:].flatten(), reduction="sum")
    total = torch.zeros(2)
    batches = [
        batch
        for rank in range(3)
        for batch in held_out_batches(len(rows), lambda some, _: (rows[some], rows[some].clone()), 4, rank, 3)
    ]
    assert any((labels == IGNORED).all() for _, labels in batches)
    for inputs, labels in batches:
        total += measure(logits[inputs], labels)
    assert total.tolist() == pytest.approx([float(expected), 25.0])
    assert not math.isnan(total[0])
