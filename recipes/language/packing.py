"""One stream of tokens from many documents, which the recipes cut into sequences that are full."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

ENCODED_TOGETHER = 4096
"""Documents of one call of the tokenizer, whose answer takes far more memory than the tokens."""


def joined(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, end: int) -> Tensor:
    """Return the tokens of all documents one after another, each document ended by the token `end`; (N,) int32."""
    stream = array("i")
    for start in range(0, len(documents), ENCODED_TOGETHER):
        some = list(documents[start : start + ENCODED_TOGETHER])
        for tokens in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            stream.extend(tokens)
            stream.append(end)
    return torch.frombuffer(stream, dtype=torch.int32).clone()


def too_short(documents: int, tokens: int, length: int) -> ValueError:
    """Return the error of documents whose tokens do not fill a single sequence."""
    return ValueError(f"{documents} documents of {tokens} tokens do not fill one sequence of {length}")
