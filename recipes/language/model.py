"""The way of a model from a Hugging Face directory into a pipeline and back, for pretraining and fine-tuning."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from deepspeed import comm as dist
from deepspeed.pipe import PipelineModule
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ds_ddg.models import save_pretrained
from recipes import common

T = TypeVar("T")

PARTITION = "type:TransformerLayer"
"""The partition method: each stage gets the same number of transformer layers."""


def from_first_rank(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and return its result on every rank; if it fails, all ranks exit with the reason."""
    result: list[Any] = [None]
    with common.on_every_rank():
        if dist.get_rank() == 0:
            result[0] = work()
    dist.broadcast_object_list(result, src=0)
    return result[0]


def add_arguments(parser: argparse.ArgumentParser, kind: str) -> None:
    """Add the arguments that say what is pretrained: a new model of this `kind`, or one from a directory."""
    new = f"of a new {kind}"
    parser.add_argument("--model", type=Path, help=f"Hugging Face directory to go on from (default: a new {kind})")
    parser.add_argument("--vocabulary", type=common.at_least(1), default=1024, help=f"{new}, at most")
    parser.add_argument("--layers", type=common.at_least(1), default=4, help=new)
    parser.add_argument("--hidden", type=common.at_least(1), default=128, help=f"width {new}")
    parser.add_argument("--heads", type=common.at_least(1), default=2, help=new)
    parser.add_argument("--dropout", type=common.below_one, default=0.0, help=new)
    parser.add_argument("--length", type=common.at_least(4), default=64, help="tokens in a sequence")


def initializer_range(hidden: int) -> float:
    """Return the spread of new weights: the 0.02 of BERT-Base and GPT-2 small, which are 768 wide, at this width."""
    return 0.02 * (768 / hidden) ** 0.5


def load_config(directory: Path, **changes: Any) -> Any:
    """Read the config in a Hugging Face directory, with changes; FileNotFoundError if it is not such a directory."""
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"--model: no config.json in {directory}; expected a Hugging Face directory on this machine, with "
            "config.json, tokenizer.json and model.safetensors"
        )
    return AutoConfig.from_pretrained(directory, local_files_only=True, **changes)


def load_tokenizer(directory: Path, length: int) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a Hugging Face directory.

    Raises:
        FileNotFoundError: `directory` is no Hugging Face directory.
        ValueError: the model in it does not go with the tokenizer, or cannot take sequences of `length` tokens.
    """
    config = load_config(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"--model: the tokenizer in {directory} has {len(tokenizer)} tokens, the model {config.vocab_size}; "
            "expected the files of one model"
        )
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", length))
    if not 4 <= length <= longest:
        raise ValueError(f"--length must be from 4 to the model's {longest} tokens, got {length}")
    return tokenizer


def parameter_groups(net: nn.Module) -> list[dict[str, Any]]:
    """Return groups of parameters in which biases and norms do not decay, as BERT and GPT were trained."""
    parameters = list(net.parameters())
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1]},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


def not_in_weights(config: Any, *more: str) -> dict[str, Any]:
    """Return what decides about a model's training besides its size, by name; None for what its kind does not have.

    Args:
        config: of transformers.
        *more: names of `config` besides those that every recipe records.
    """
    names = ("model_type", "num_attention_heads", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob")
    return {name: getattr(config, name, None) for name in (*names, *more)}


def save(net: PipelineModule, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write model and tokenizer as plain transformers reads them; on all ranks, after a drain."""
    save_pretrained(net, directory)
    with common.on_every_rank():
        if dist.get_rank() == 0:
            tokenizer.save_pretrained(directory)
