"""Sequences of text for a causal language model: a byte-level BPE vocabulary and packing (Radford et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import GPT2Tokenizer, PreTrainedTokenizerBase

from recipes.language.packing import joined, too_short

SMALLEST = 257
"""A vocabulary of each byte and the token that ends a document."""


def train_tokenizer(documents: Sequence[str], vocabulary: int, max_length: int) -> GPT2Tokenizer:
    """Make a tokenizer of GPT-2's kind of at most `vocabulary` entries, the same for the same documents.

    Raises:
        ValueError: `vocabulary` is too small for the bytes.
    """
    if vocabulary < SMALLEST:
        raise ValueError(
            f"--vocabulary {vocabulary} is too small: the 256 bytes and <|endoftext|> alone are {SMALLEST}"
        )
    tokenizer = GPT2Tokenizer().train_new_from_iterator(documents, vocabulary, show_progress=False)
    tokenizer.model_max_length = max_length
    return tokenizer


@dataclass(frozen=True)
class Packed:
    """Documents as sequences that are full."""

    tokens: Tensor
    """(N, length) int32. Each sequence begins with the last token of the one before it, which is predicted there. So
    the N (length - 1) predictions are of different tokens; the last documents, too short to fill a sequence, are left
    out."""
    tokens_per_byte: float
    """The tokens of all documents, with one at the end of each, for a byte of their text in UTF-8."""


def pack(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Packed:
    """Join documents, each ended by the tokenizer's end of text, and cut them into full sequences.

    Raises:
        ValueError: the documents do not fill a single sequence, or the tokenizer has no end of text.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            f"--model: the tokenizer of {tokenizer.name_or_path!r} has no end of text, to stand between documents; "
            'name one of its tokens "eos_token" in tokenizer_config.json'
        )
    stream = joined(["", *documents], tokenizer, end)  # the first document comes after an end as well
    if len(stream) < length:
        raise too_short(len(documents), len(stream), length)
    bytes_ = sum(len(document.encode()) for document in documents)
    return Packed(stream.unfold(0, length, length - 1).contiguous(), (len(stream) - 1) / bytes_)
