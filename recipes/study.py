"""The recipes with their own data and configs, for ``ds-ddg study``: what delay does to them, in one process.

    ds-ddg study recipes/study.py:resnet recipes/study.py:gpt --stages 1,2,4 --micro-batches 1,4 --results study.jsonl

Each function takes a seed. The batch is that of the config, in as many micro-batches as a run asks for. Stages have
about equally many parameters here, where a recipe gives them equally many blocks. A recipe's own `--as-if-stages` is
one such run, with all of its options.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from deepspeed.runtime import lr_schedules
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any folder, installed or not

from ds_ddg.study.problem import Problem
from recipes import common

ROOT = Path(__file__).resolve().parents[1]
_TORCHS = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}


def resnet(seed: int) -> Problem:
    """ResNet-20 on scikit-learn's digits, as in configs/resnet20_digits.json."""
    from recipes.resnet import data, model, train

    args = train.parse_arguments(_arguments("resnet20_digits"))
    train_split, test_split = data.load(args.dataset)

    def batches(size: int, micro_batches: int) -> data.TrainBatches:
        return data.TrainBatches(train_split, data.Share(size), micro_batches, seed)

    def evaluate(net: nn.Module) -> dict[str, float]:
        held_out = data.HeldOutBatches(test_split, data.Share(100))
        loss, top1, _, images = _sums(net, held_out, train.measure)
        return {"test_loss": loss / images, "test_accuracy": top1 / images}

    specs = model.layer_specs(args.model, train_split.num_classes)
    return _problem(args, seed, specs, cross_entropy, nn.Module.parameters, batches, evaluate)


def bert(seed: int) -> Problem:
    """BERT as a masked language model on docstrings, as in configs/bert_pretrain.json."""
    from ds_ddg.models import masked_lm, masked_lm_loss
    from recipes.bert import pretrain, text

    def split_of(tokenizer: Any) -> Callable[[Any], Any]:
        return partial(pretrain.masked, masking=text.Masking.of(tokenizer))

    return _language(seed, "bert_pretrain", pretrain, masked_lm, masked_lm_loss, split_of)


def gpt(seed: int) -> Problem:
    """GPT-2's architecture on docstrings, as in configs/gpt_pretrain.json."""
    from ds_ddg.models import causal_lm, next_token_loss
    from recipes.gpt import pretrain

    return _language(seed, "gpt_pretrain", pretrain, causal_lm, next_token_loss, lambda _: pretrain.sequences)


def _language(
    seed: int,
    config: str,
    pretrain: Any,
    specs: Callable[..., Sequence[LayerSpec]],
    loss_fn: Callable[[Any, Any], Tensor],
    split_of: Callable[[Any], Callable[[Any], Any]],
) -> Problem:
    """Return the problem of a language model.

    Args:
        seed: of weights and data.
        config: the name of the recipe's DeepSpeed config.
        pretrain: the module of the recipe.
        specs: makes the layers from a config of transformers.
        loss_fn: the loss of a micro-batch.
        split_of: ``split_of(tokenizer)`` makes a `Split` of a packed text.
    """
    from recipes.language import batches, model

    args = pretrain.parse_arguments(_arguments(config))
    tokenizer, *packed = pretrain.prepare(args)
    train_split, held_out = map(split_of(tokenizer), packed)

    def evaluate(net: nn.Module) -> dict[str, float]:
        losses, tokens = _sums(net, batches.held_out_batches(*held_out, 64), pretrain.measure)
        return {"perplexity": math.exp(losses / tokens)}

    return _problem(
        args,
        seed,
        specs(pretrain.new_config(args, tokenizer), inputs=("input_ids",)),
        loss_fn,
        model.parameter_groups,
        lambda size, micro_batches: batches.TrainBatches(*train_split, size, micro_batches, seed),
        evaluate,
    )


class _Tied(nn.Module):
    """A layer that has its weights from another.

    Args:
        layer: the other.
        forward_fn: what is to be done with it and the inputs.
    """

    def __init__(self, layer: nn.Module, forward_fn: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.layer, self._forward_fn = layer, forward_fn

    def forward(self, inputs: Any) -> Any:
        return self._forward_fn(self.layer, inputs)


def _layers(specs: Iterable[LayerSpec], seed: int) -> list[nn.Module]:
    """Return the layers with the weights that ``steps.pipeline`` gives them."""
    layers: list[nn.Module] = []
    tied: dict[str, nn.Module] = {}
    for i, spec in enumerate(specs):
        torch.manual_seed(1000 * seed + i)
        if not isinstance(spec, TiedLayerSpec):
            layers.append(spec.build())
            continue
        if spec.key not in tied:
            tied[spec.key] = spec.build()
        layer = tied[spec.key]
        layers.append(layer if spec.forward_fn is None else _Tied(layer, spec.forward_fn))
    return layers


def _arguments(name: str) -> list[str]:
    return ["--deepspeed_config", str(ROOT / "configs" / f"{name}.json")]


def _sums(net: nn.Module, batches: Iterable[Any], measure: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
    totals: Tensor = sum(measure(net(inputs), labels).double() for inputs, labels in batches)  # type: ignore[assignment]
    return totals.tolist()


def _problem(
    args: Any,
    seed: int,
    specs: Sequence[LayerSpec],
    loss_fn: Callable[[Any, Any], Tensor],
    parameters: Callable[[nn.Module], Iterable[Any]],
    batches: Callable[[int, int], Any],
    evaluate: Callable[[nn.Module], Mapping[str, float]],
) -> Problem:
    """Return the problem of a recipe.

    Args:
        args: the recipe's arguments.
        seed: of weights and data.
        specs: the layers.
        loss_fn: the loss of a micro-batch.
        parameters: returns the parameters of the model, or groups of them.
        batches: ``batches(size, micro_batches)`` returns the recipe's batches to train on.
        evaluate: measures the trained model.
    """
    config = common.read_config(args.deepspeed_config, None)
    batch = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    calls = args.epochs * len(batches(batch, 1))
    common.fill_scheduler(config, calls)
    given, planned = config["optimizer"], config["scheduler"]
    values = {name: value for name, value in given["params"].items() if name != "torch_adam"}

    def micro_batches(number: int) -> Iterator[Any]:
        if batch % number:
            raise ValueError(f"a batch of {batch} cannot be divided into {number} micro-batches of one size")
        yield from batches(batch // number, number).from_call(0)

    return Problem(
        _layers(specs, seed),
        loss_fn,
        micro_batches,
        lambda net: _TORCHS[given["type"]](parameters(net), **copy.deepcopy(values)),
        calls,
        lambda optimizer: getattr(lr_schedules, planned["type"])(optimizer, **planned["params"]),
        evaluate,
        config.get("gradient_clipping", 0.0),
    )
