"""Language models and encoders of transformers as layer specs: one spec is one transformer layer.

    WordEmbedding        only where it is tied: the input embedding, which the last spec uses again
    Embeddings           all that comes before the layers
    TransformerLayer     x N
    Head                 all that comes after them: norm, pooler, classifier, language model head
    WordEmbedding        only where it is tied: multiplies by the transposed weight

The first spec takes the model's inputs, one tensor or a tuple in the order of `inputs`; the last one returns the
logits. In between travel the hidden states (B, S, width) and, with them, the model's inputs: small integer tensors
from which each stage makes masks and rotary embeddings anew, as the model's own ``forward`` does. In evaluation mode
the logits equal those of the model to the last bit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec

from ds_ddg.extras import extra
from ds_ddg.models.transformers.layers import Embeddings, Head, TransformerLayer, Unembed, WordEmbedding
from ds_ddg.models.transformers.model_parts import Blueprint

__all__ = ["causal_lm", "from_transformers", "masked_lm", "sequence_classification"]

Source = Any
"""A transformers config, or the name of a directory with a config.json."""


def from_transformers(
    source: Source,
    model_class: Any = None,
    *,
    inputs: Sequence[str] = ("input_ids", "attention_mask"),
    dtype: torch.dtype = torch.float32,
) -> list[LayerSpec]:
    """Build the layer specs of a transformers model that is one stack of layers; the weights are new.

    ``partition_method="type:TransformerLayer"`` gives each stage the same number of layers. `load_pretrained` reads
    weights from files.

    Args:
        source: a config, or a directory with a config.json. Its attention implementation counts.
        model_class: a model class or an ``AutoModelFor...``; without it the one that the config names.
        inputs: names of the model's inputs, in the order of the data's tuple, which may end early. Other arguments of
            the model's ``forward`` (``token_type_ids``, ``position_ids``) go here.
        dtype: type of the weights. DeepSpeed's ``bf16`` and ``fp16`` make their own copies: leave it at float32 for
            those.

    Raises:
        ValueError: the model is not one stack of layers in which each gets what the one before returned, the
            directory has no config.json, or the config names no model class.
        TypeError: `source` is neither a config nor a directory.
        MissingExtraError: transformers is not installed.
    """
    transformers = _library()
    config = source
    if isinstance(source, str | os.PathLike):
        if not os.path.isfile(os.path.join(source, "config.json")):
            raise ValueError(f"no config.json in {os.fspath(source)!r}; download the model there first")
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
    if not isinstance(config, transformers.PreTrainedConfig):
        raise TypeError(f"source must be a transformers config or a directory, got {type(source).__name__}")
    if model_class is None:
        names = config.architectures or ["none"]
        model_class = getattr(transformers, names[0], None)
        if model_class is None:
            raise ValueError(
                f"the config names no model class of transformers {transformers.__version__} "
                f"(architectures: {', '.join(names)}); pass model_class=transformers.AutoModelFor..."
            )
    blueprint = Blueprint(config, model_class, inputs, dtype)
    layers = [LayerSpec(TransformerLayer, blueprint, index) for index in range(len(blueprint.structure.layers))]
    specs = [LayerSpec(Embeddings, blueprint), *layers, LayerSpec(Head, blueprint)]
    if blueprint.structure.tie is None:
        return specs
    return [
        TiedLayerSpec("embed", WordEmbedding, blueprint),
        *specs,
        TiedLayerSpec("embed", WordEmbedding, blueprint, forward_fn=Unembed(blueprint)),
    ]


def causal_lm(source: Source, **options: Any) -> list[LayerSpec]:
    """Build the layer specs of a causal language model: GPT-2, Llama, Qwen, Mistral and others of their kind.

    Args:
        source: a transformers config, or a directory with a config.json.
        **options: ``inputs`` and ``dtype``, as for `from_transformers`.

    Returns:
        Specs for data ``(input_ids, input_ids)`` or ``((input_ids, attention_mask), labels)``, all (B, S) int64. The
        last one returns logits (B, S, vocabulary) for `next_token_loss`.

    Raises:
        ValueError: as `from_transformers`.
        TypeError: as `from_transformers`.
        MissingExtraError: as `from_transformers`.
    """
    return from_transformers(source, _library().AutoModelForCausalLM, **options)


_BERT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def masked_lm(source: Source, inputs: Sequence[str] = _BERT_INPUTS, **options: Any) -> list[LayerSpec]:
    """Build the layer specs of a masked language model: BERT, RoBERTa.

    Args:
        source: a transformers config, or a directory with a config.json.
        inputs: names of the model's inputs, in the order of the data's tuple, which may end early.
        **options: ``dtype``, as for `from_transformers`.

    Returns:
        Specs for data ``((input_ids, attention_mask, ...), labels)``, all (B, S) int64. The last one returns logits
        (B, S, vocabulary) for `masked_lm_loss`.

    Raises:
        ValueError: as `from_transformers`.
        TypeError: as `from_transformers`.
        MissingExtraError: as `from_transformers`.
    """
    return from_transformers(source, _library().AutoModelForMaskedLM, inputs=inputs, **options)


def sequence_classification(source: Source, inputs: Sequence[str] = _BERT_INPUTS, **options: Any) -> list[LayerSpec]:
    """Build the layer specs of a classifier of texts; the config's ``num_labels`` says of how many classes.

    Args:
        source: a transformers config, or a directory with a config.json.
        inputs: names of the model's inputs, in the order of the data's tuple, which may end early.
        **options: ``dtype``, as for `from_transformers`.

    Returns:
        Specs for data ``((input_ids, attention_mask, ...), labels)``; inputs are (B, S) and labels (B,), all int64.
        The last one returns logits (B, classes) for `classification_loss`.

    Raises:
        ValueError: as `from_transformers`.
        TypeError: as `from_transformers`.
        MissingExtraError: as `from_transformers`.
    """
    return from_transformers(source, _library().AutoModelForSequenceClassification, inputs=inputs, **options)


def _library() -> Any:
    """Return transformers, which the rest of this folder imports without asking: nothing of it runs before this."""
    with extra("hf", "a model of transformers"):
        import transformers
    return transformers
