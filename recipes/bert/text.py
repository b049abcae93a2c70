"""Masked sequences from documents: a WordPiece vocabulary, packing and dynamic masking (Devlin et al., 2019)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import trainers
from torch import Tensor
from transformers import BertTokenizer, PreTrainedTokenizerBase

from recipes.common import IGNORED
from recipes.language.packing import joined, too_short

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NUM_LETTERS = 1000
"""The most frequent letters enter the vocabulary; a word with another one is unknown."""

MASKED = 0.15
"""Share of a sequence that is to be predicted."""


def train_tokenizer(documents: Sequence[str], vocabulary: int, max_length: int) -> BertTokenizer:
    """Make a WordPiece tokenizer of at most `vocabulary` entries, lower case, the same for the same documents.

    Raises:
        ValueError: `vocabulary` is too small for the letters.
    """
    plain = BertTokenizer().backend_tokenizer
    letters = _letters(documents, plain)
    if len(SPECIAL) + len(letters) > vocabulary:
        raise ValueError(
            f"--vocabulary {vocabulary} is too small for this text: its letters and the special tokens alone are "
            f"{len(SPECIAL) + len(letters)}"
        )
    # Left to itself the trainer numbers "##a", "##b", ... in the order of a randomised hash table, and breaks ties by
    # these numbers: another vocabulary in every process.
    plain.train_from_iterator(
        documents,
        trainers.WordPieceTrainer(
            vocab_size=vocabulary,
            special_tokens=[*SPECIAL, *letters],
            limit_alphabet=0,
            show_progress=False,
        ),
    )
    by_number = sorted(plain.get_vocab(with_added_tokens=False).items(), key=lambda entry: entry[1])
    return BertTokenizer(vocab=dict(by_number), model_max_length=max_length)


def _letters(documents: Iterable[str], tokenizer: Any) -> list[str]:
    """Return each letter as it starts a word, then as it continues one ("##a"); sorted."""
    words: Counter[str] = Counter()
    for document in documents:
        text = tokenizer.normalizer.normalize_str(document)
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    counts: Counter[str] = Counter()
    continuing: set[str] = set()
    for word, count in words.items():
        continuing.update(word[1:])
        for letter in word:
            counts[letter] += count
    frequent = sorted(counts, key=lambda letter: (-counts[letter], letter))[:NUM_LETTERS]
    return [*sorted(frequent), *sorted(f"##{letter}" for letter in frequent if letter in continuing)]


def pack(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """Join documents, each ended by a separator, and cut them into full sequences that start with [CLS].

    Returns:
        (N, length) int32. The last documents, too short to fill a sequence, are left out.

    Raises:
        ValueError: the documents do not fill a single sequence.
    """
    stream = joined(documents, tokenizer, tokenizer.sep_token_id)
    count = len(stream) // (length - 1)
    if count == 0:
        raise too_short(len(documents), len(stream), length)
    body = stream[: count * (length - 1)].view(count, length - 1)
    return torch.cat([torch.full((count, 1), tokenizer.cls_token_id, dtype=torch.int32), body], dim=1)


@dataclass(frozen=True)
class Masking:
    """Hides tokens at random: of the tokens to predict 80% become [MASK], 10% another token, 10% stay."""

    mask: int
    """The number of the token [MASK]."""
    special: Tensor
    """Numbers of the special tokens, which are never to be predicted."""
    ordinary: Tensor
    """Numbers of all other tokens."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Masking:
        """Make the masking for a tokenizer's vocabulary; ValueError if that has no mask."""
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no mask token: no masked language model"
            )
        special = set(tokenizer.all_special_ids)
        ordinary = sorted(set(tokenizer.get_vocab().values()) - special)
        return cls(tokenizer.mask_token_id, torch.tensor(sorted(special)), torch.tensor(ordinary))

    def __call__(self, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Make inputs and labels of `tokens`, all (B, S) int64; a label is `IGNORED` if there is nothing to predict.

        Each sequence has the same number to predict, so that the losses of all micro-batches count alike.
        """
        tokens = tokens.long()
        order = torch.rand(tokens.shape, generator=generator)
        order[torch.isin(tokens, self.special)] = 2.0
        first = order.topk(max(1, round(MASKED * tokens.shape[1])), dim=1, largest=False).indices
        hidden = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, first, True) & (order < 2.0)
        fate = torch.rand(tokens.shape, generator=generator)
        others = self.ordinary[torch.randint(len(self.ordinary), tokens.shape, generator=generator)]
        inputs = tokens.masked_fill(hidden & (fate < 0.8), self.mask)
        inputs = torch.where(hidden & (fate >= 0.9), others, inputs)
        return inputs, tokens.masked_fill(~hidden, IGNORED)
