"""The places of the layers in a transformers model, and of all that comes before and after them.

The model runs once with stubs in place of all that has weights: what is called before the first layer, and what after
the last, is then known for every architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ds_ddg.models.transformers.stub_model import Skeleton, topmost

__all__ = ["Structure", "learn"]


@dataclass(frozen=True)
class Structure:
    """The places of a model's layers, as paths of modules."""

    layers: tuple[str, ...]
    """The transformer layers, in order."""
    before: tuple[str, ...]
    """Modules with weights or buffers that run before them."""
    after: tuple[str, ...]
    """Modules that run after them, or never."""
    tie: tuple[str, str] | None
    """Input and output embedding, if they share their weight."""
    wraps: bool
    """Whether a layer returns its hidden states in a tuple."""
    aliases: dict[str, str]
    """Other keys of tied weights -> the one that counts."""


def learn(model: Any) -> Structure:
    """Find the structure of a model on the meta device; ValueError if it is not one stack of equal layers."""
    stack = _stack(model)
    layers = tuple(f"{stack}.{i}" for i in range(len(model.get_submodule(stack))))
    aliases = _aliases(model)
    tie = _tie(model)
    tops = [path for path in topmost(model, layers) if model.get_submodule(path).state_dict()]
    _check_owners(model, layers, tops, aliases, tie)
    for wraps in (False, True):
        order = _trace(model, layers, tops, wraps)
        if order is not None:
            return Structure(layers, *_sides(model, order, layers, tops), tie, wraps, aliases)
    raise ValueError(
        f"{type(model).__name__} does more between its layers than hand hidden states from each to the next: "
        "it cannot be cut there"
    )


def _stack(model: nn.Module) -> str:
    from transformers.modeling_layers import GradientCheckpointingLayer

    stacks = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(isinstance(child, GradientCheckpointingLayer) for child in module)
    ]
    if len(stacks) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(stacks)} stacks of transformer layers ({', '.join(stacks) or 'none'}), "
            "a pipeline takes models with one (causal and masked language models, encoders with a classifier)"
        )
    return stacks[0]


def _aliases(model: Any) -> dict[str, str]:
    keys: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        keys.setdefault(id(parameter), []).append(key)
    # As in the files of transformers: the key that another one is tied to is the one that is written.
    declared = set(model.all_tied_weights_keys.values())
    aliases = {}
    for group in keys.values():
        kept = next((key for key in group if key in declared), group[0])
        aliases.update({key: kept for key in group if key != kept})
    return aliases


def _tie(model: Any) -> tuple[str, str] | None:
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    if last is None or getattr(last, "weight", None) is not first.weight:
        return None
    paths = {id(module): path for path, module in model.named_modules()}
    return paths[id(first)], paths[id(last)]


def _check_owners(
    model: nn.Module,
    layers: tuple[str, ...],
    tops: list[str],
    aliases: dict[str, str],
    tie: tuple[str, str] | None,
) -> None:
    """Raise ValueError if a weight belongs to no module that can be moved, or to two of them."""
    places = (*layers, *tops)

    def place(key: str) -> str:
        return next((path for path in places if key.startswith(f"{path}.")), "")

    for key in model.state_dict():
        if not place(key):
            raise ValueError(f"{type(model).__name__} has {key!r} beside its layers, in no module of its own")
    for key, kept in aliases.items():
        ends = tie is not None and {key, kept} == {f"{path}.weight" for path in tie}
        if place(key) != place(kept) and not ends:
            raise ValueError(
                f"{type(model).__name__} shares {kept!r} with {key!r}: only input and output embedding can be tied"
            )


def _trace(model: Any, layers: tuple[str, ...], tops: list[str], wraps: bool) -> list[str] | None:
    """Return paths in the order of their calls; None if a layer does not get what the one before it returned."""
    order: list[str] = []
    unread: list[Tensor] = []

    def note(path: str, *args: Any, **kwargs: Any) -> Any:
        order.append(path)
        if unread and any(value is unread[0] for value in (*args, *kwargs.values())):
            unread.clear()
        if path not in layers:
            return torch.empty_like(like)
        unread.append(torch.empty_like(like))
        return (unread[-1],) if wraps else unread[-1]

    words = torch.zeros(2, 4, dtype=torch.long)
    like = torch.zeros(2, 4, model.config.get_text_config().hidden_size)
    try:
        with torch.no_grad():
            Skeleton(model, layers, {}).run(
                {"input_ids": words}, like, {path: partial(note, path) for path in (*layers, *tops)}
            )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # what a wrong answer leads to
        return None
    return None if unread or [path for path in order if path in layers] != list(layers) else order


def _sides(
    model: nn.Module, order: list[str], layers: tuple[str, ...], tops: list[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    first, last = order.index(layers[0]), order.index(layers[-1])
    before, after = set(order[:first]), set(order[last + 1 :])
    between = set(order[first : last + 1]) - set(layers)
    if astray := between | (before & after):
        raise ValueError(f"{type(model).__name__} calls {sorted(astray)} more than once or between its layers")
    return tuple(path for path in tops if path in before), tuple(path for path in tops if path not in before)
