"""Checks that a pipeline has exactly the keys and shapes of its library's model, each on one layer.

Most readers take a file with other keys without an error: what they miss they initialise, what they do not know they
skip.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ds_ddg.models.library_layer import Origin, Piece
from ds_ddg.models.weight_files import WeightsError

__all__ = [
    "beside",
    "digest",
    "kind_of_number",
    "listed",
    "refuse_missing",
    "refuse_other_tensors",
    "refuse_unknown_keys",
    "tied_in",
]

# Traces that wrappers leave in the names of weights, and how to take them off again.
_WRAPPERS = {
    r"\.base_layer\.|\.lora_": "they are adapters of peft; merge them first: call merge() of each layer that peft put "
    "in, and put its get_base_layer() back in its place",
    r"\bparametrizations\.": "they are parametrized; call torch.nn.utils.parametrize.remove_parametrizations(module, "
    "name) first",
    r"\.\w+_(g|v)$": "they are those of torch.nn.utils.weight_norm; call remove_weight_norm(module) first",
    r"\.\w+_(orig|mask)$": "they are pruned or normalised by torch.nn.utils; call prune.remove(module, name) or "
    "remove_spectral_norm(module) first",
    r"\b_orig_mod\.": "they are in the wrapper of torch.compile(module); compile in place with module.compile()",
    r"absmax|\.quant_|\.SCB$|\.qweight|\.qzeros|weight_scale": "they are quantized; dequantize the layers first",
}
_OTHER_WRAPPER = "put the library's own modules back in their places first"


def listed(what: str, keys: Iterable[str]) -> str:
    """Return ``what 7 tensors (a, b, c, d, ...)``."""
    keys = list(keys)
    more = ", ..." if len(keys) > 4 else ""
    return f"{what} {len(keys)} tensors ({', '.join(keys[:4])}{more})"


def refuse_unknown_keys(origin: Origin, state: Mapping[str, Any]) -> None:
    """Raise `WeightsError` if a layer has weights under names that the library's model does not have."""
    unknown = sorted(state.keys() - origin.shapes().keys())
    if unknown:
        traced = (words for trace, words in _WRAPPERS.items() if any(re.search(trace, key) for key in unknown))
        raise WeightsError(
            f"{listed(f'the layers of {origin.name} have', unknown)} that the model itself lacks: "
            + next(traced, _OTHER_WRAPPER)
        )


def refuse_other_tensors(origin: Origin, state: Mapping[str, Tensor]) -> None:
    """Raise `WeightsError` for other shapes or kinds of numbers than the model's, or more than plain numbers."""
    shapes, dtypes = origin.shapes(), origin.dtypes()
    for key, tensor in state.items():
        if tuple(tensor.shape) != shapes[key]:
            raise WeightsError(
                f"{key!r} has the shape {tuple(tensor.shape)} here and {shapes[key]} in {origin.name}, whose config "
                "goes with the weights; build the specs from a config with the size that you want, and fill them with "
                "load_pretrained"
            )
        if type(tensor) not in (Tensor, nn.Parameter) or kind_of_number(tensor.dtype) != kind_of_number(dtypes[key]):
            raise WeightsError(
                f"{key!r} is a {type(tensor).__name__} of {tensor.dtype}, and plain numbers of {dtypes[key]} in "
                f"{origin.name}; dequantize or gather the layer first"
            )


def refuse_missing(origin: Origin, held: Iterable[str]) -> None:
    """Raise `WeightsError` if all stages lack something of the model, or its library would read a key as another."""
    missing = sorted(origin.shapes().keys() - set(held))
    if missing:
        raise WeightsError(
            f"{listed('all layers together lack', missing)} of {origin.name}; pass the whole PipelineModule, built "
            "from all the specs of one model: for fewer layers, build them from a config that says so"
        )
    aliases = origin.aliases()
    read = origin.rename(sorted(origin.shapes()))
    other = [key for key, name in read.items() if aliases.get(name, name) != key]
    if other:
        raise WeightsError(
            f"{listed('the library reads', other)} of {origin.name} under other names (as {read[other[0]]!r}, ...), "
            "so it cannot be written here; keep the weights with engine.save_checkpoint(...)"
        )


def beside(net: nn.Module, pieces: Iterable[Piece]) -> list[str]:
    """Return the names of weights in `net` that belong to none of the pieces, nor to the loss function."""
    known = {id(tensor) for piece in pieces for tensor in piece.state_dict(keep_vars=True).values()}
    state = net.state_dict(keep_vars=True)
    return [name for name, tensor in state.items() if id(tensor) not in known and not name.startswith("loss_fn.")]


def tied_in(net: Any, pieces: Iterable[Piece]) -> set[str]:
    """Return the keys of the weights that several stages hold by a ``TiedLayerSpec``."""
    tied = {id(module) for module in getattr(net, "tied_modules", nn.ModuleDict()).modules()}
    return {key for piece in pieces if id(piece) in tied for key in piece.original_state()}


def digest(tensor: Tensor) -> str:
    """Return a digest of the bits of `tensor`: equal digests mean equal bits."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


def kind_of_number(dtype: torch.dtype) -> str:
    """Return the kind of a type; types of one kind convert by rounding, but eight bits have a scale elsewhere."""
    return "floating" if dtype.is_floating_point and dtype.itemsize > 1 else str(dtype)
