"""Small models of the transformers library, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES = {"vocab_size": 61, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32, "pad_token_id": 0}
GROUPED = {"num_key_value_heads": 2}


# name -> config class, auto class, settings. What each is here for:
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert_mlm": ("BertConfig", "MaskedLM", SIZES),  # tied, with a bias that is not
    "bert_mlm_untied": ("BertConfig", "MaskedLM", {**SIZES, "tie_word_embeddings": False}),
    "bert_classifier": ("BertConfig", "SequenceClassification", {**SIZES, "num_labels": 3}),  # a pooler
    "roberta_mlm": ("RobertaConfig", "MaskedLM", SIZES),  # positions from the words
    "gpt2": ("GPT2Config", "CausalLM", {**GPT2_SIZES, "bos_token_id": 1, "eos_token_id": 2}),  # dropout outside layers
    "gpt2_untied": (
        "GPT2Config",
        "CausalLM",
        {**GPT2_SIZES, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
    ),
    "llama": ("LlamaConfig", "CausalLM", {**SIZES, **GROUPED, "tie_word_embeddings": False}),
    "llama_tied": ("LlamaConfig", "CausalLM", {**SIZES, **GROUPED, "tie_word_embeddings": True}),
    "llama_classifier": ("LlamaConfig", "SequenceClassification", {**SIZES, **GROUPED}),  # a head that reads the words
    "qwen2": ("Qwen2Config", "CausalLM", {**SIZES, **GROUPED}),
    "gemma2": ("Gemma2Config", "CausalLM", {**SIZES, **GROUPED, "head_dim": 8, "sliding_window": 4}),  # masks by layer
    "bloom": ("BloomConfig", "CausalLM", {**SIZES, "n_head": 4, "n_layer": 4}),  # layers return tuples, alibi
}


def build_config(name: str) -> tuple[Any, Any]:
    config_class, auto_class, settings = MODELS[name]
    return getattr(transformers, config_class)(**settings), getattr(transformers, f"AutoModelFor{auto_class}")


def original(name: str, attention: str | None = None) -> Any:
    """Make the library's model in evaluation mode, no weight at a value like 0 or 1 that hides mistakes."""
    config, auto = build_config(name)
    torch.manual_seed(1)
    model = auto.from_config(config, **({"attn_implementation": attention} if attention else {})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 20)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Return words (3, 9) and their mask, one row padded at its end and one at its beginning."""
    generator = torch.Generator().manual_seed(5)
    words = torch.randint(3, 61, (3, 9), generator=generator)
    mask = torch.ones_like(words)
    mask[1, 6:] = 0
    mask[2, :2] = 0
    return words * mask, mask


def in_a_row(specs: list[LayerSpec]) -> tuple[nn.ModuleList, list[Callable[[Any], Any]]]:
    """Build the layers as a ``PipelineModule`` of one stage does."""
    functions: list[Callable[[Any], Any]] = []
    modules, tied = nn.ModuleList(), {}
    for spec in specs:
        if isinstance(spec, TiedLayerSpec) and spec.key in tied:
            functions.append(partial(spec.forward_fn, tied[spec.key]))
            continue
        module = spec.build()
        if isinstance(spec, TiedLayerSpec):
            tied[spec.key] = module
        modules.append(module)
        functions.append(module)
    return modules, functions
