"""Loss functions for a ``PipelineModule``: ``loss_fn(outputs, labels)``, equal to those of transformers to the bit.

Each is the mean over the labelled tokens of *one micro-batch*, and NaN where a micro-batch has none. With several
micro-batches per call their means count alike, however many tokens each has.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["classification_loss", "masked_lm_loss", "next_token_loss"]

IGNORED = -100


def masked_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy over the labelled positions.

    Args:
        logits: (B, S, vocabulary), any floating type; the loss is computed in float32.
        labels: (B, S), -100 where there is nothing to predict.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of each token given the tokens before it.

    Args:
        logits: (B, S, vocabulary).
        labels: (B, S), the input tokens themselves, *not* shifted; -100 for those not to predict (padding, a prompt).
    """
    shifted = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    return masked_lm_loss(logits, shifted)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of (B, classes) logits and (B,) labels."""
    return F.cross_entropy(logits, labels)
