"""Muon and AdamW share the parameters of a pipeline by the structure of its layers, the same for every split.

DeepSpeed's Muon orthogonalises the updates of matrices, and updates the rest by AdamW. DeepSpeed decides by the names
of parameters, and in a ``PipelineModule`` these are numbers: embeddings and the output layer would be orthogonalised
as well. Here Muon gets the matrices inside the model:

    Muon     weights of linear layers, projections of attention, kernels of 2-d convolutions (as matrices, out x rest)
    AdamW    embeddings, the output layer, fewer than 2 dimensions, whatever is of no known kind

The output layer is the last weight, in order of registration, of the last layer with weights; a weight with several
uses is one of Muon's if all of them are. A parameter's own ``use_muon``, set before ``ds_ddg.initialize``, wins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.config import MUON_OPTIMIZER
from deepspeed.utils import logger
from torch import Tensor, nn

__all__ = ["choose", "choose_for"]

_UNKNOWN, _MATRIX, _EMBEDDING = range(3)


def choose_for(config: Any, module: Any, client_optimizer: Any) -> None:
    """Do as `choose` where a parsed ``DeepSpeedConfig`` asks for Muon, and nothing where it does not."""
    if config.optimizer_name == MUON_OPTIMIZER and client_optimizer is None:
        choose(module, 2 if config.bfloat16_config.enabled else None)


def choose(module: Any, most_dimensions: int | None = None) -> None:
    """Set ``use_muon`` of every parameter of a ``PipelineModule``; collective over all ranks, before a run begins.

    Args:
        module: the ``PipelineModule``; each rank has the layers of its own stage alone.
        most_dimensions: the most that a parameter of Muon's can have, if there is a limit.

    Raises:
        ValueError: a parameter that Muon cannot take is to be its own, or shared weights are to be and not to be; on
            every rank.
    """
    uses: dict[nn.Parameter, set[int]] = {}
    for parameter, kind in _uses(module):
        uses.setdefault(parameter, set()).add(kind)
    asked = {parameter: bool(parameter.use_muon) for parameter in uses if hasattr(parameter, "use_muon")}
    wrong = [parameter for parameter, muon in asked.items() if muon and parameter.dim() < 2]
    tied = _tied(module)
    chosen = {parameter: kinds == {_MATRIX} for parameter, kinds in uses.items()} | asked
    last, bad, most, *said = _largest(
        module,
        [
            max((index for index, weights in _weights(module) if weights), default=-1),
            int(bool(wrong)),
            max((p.dim() for p, muon in chosen.items() if muon and p.requires_grad), default=0),
            *(vote for shared in tied.values() for vote in _votes(shared, uses, asked)),
        ],
    )
    if bad:
        shapes = ", ".join(str(tuple(parameter.shape)) for parameter in wrong) or "on another stage"
        raise ValueError(f"use_muon is True for a parameter that is no matrix ({shapes}): set it to False")
    if most_dimensions is not None and most > most_dimensions:
        raise ValueError(
            f"DeepSpeed 0.19.8 runs Muon in bf16 on weights of {most_dimensions} dimensions alone, and a weight here "
            f"has {most}: set its use_muon to False, which gives it to AdamW, or use fp32, with or without "
            '"torch_autocast"'
        )
    for index, weights in _weights(module):
        if index == last and weights[-1] not in asked:
            chosen[weights[-1]] = False
    output = getattr(module._layer_specs[last], "key", None) if last >= 0 else None
    for (name, shared), kind, *votes in zip(tied.items(), said[::3], said[1::3], said[2::3], strict=True):
        if all(votes):
            raise ValueError(f"use_muon is True and False for copies of the tied weight {name!r}: give them one value")
        if shared is not None:
            inside = name.rpartition(".")[0] != output and kind == _MATRIX
            chosen[shared] = votes[0] == 1 if any(votes) else inside
    for parameter, muon in chosen.items():
        parameter.use_muon = muon  # type: ignore[attr-defined]
        parameter.muon_num_heads = None  # type: ignore[attr-defined]  # as DeepSpeed marks whole matrices
    _log(module, chosen, uses, asked)


def _uses(module: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """Yield every parameter with the kind of each use of it."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield parameter, _kind(part, name, parameter)


def _kind(module: nn.Module, name: str, parameter: Tensor) -> int:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return _EMBEDDING
    shape = tuple(parameter.shape)
    if isinstance(module, nn.Conv2d):
        # The kernels of groups are matrices of their own.
        return _MATRIX if len(shape) == 4 and module.groups == 1 else _UNKNOWN
    if len(shape) != 2:
        return _UNKNOWN
    if isinstance(module, nn.MultiheadAttention):
        return _MATRIX if name.endswith("proj_weight") else _UNKNOWN
    # Linear layers of any library say so in these names; those of GPT-2 in transformers in the last two.
    for names in (("in_features", "out_features"), ("nx", "nf")):
        sizes = [getattr(module, size, None) for size in names]
        if sizes in (list(shape), list(reversed(shape))):
            return _MATRIX
    return _UNKNOWN


def _weights(module: Any) -> Iterator[tuple[int, list[nn.Parameter]]]:
    """Yield the number in the whole model of each layer of this stage, and its weights of two dimensions or more."""
    for place, layer in enumerate(module.forward_funcs):
        holder = layer.args[0] if isinstance(layer, partial) and layer.args else layer  # of a tied layer's forward_fn
        parameters = holder.parameters() if isinstance(holder, nn.Module) else ()
        yield module._local_start + place, [parameter for parameter in parameters if parameter.dim() >= 2]


def _tied(module: Any) -> dict[str, nn.Parameter | None]:
    """Return every weight that layers share by a spec, in the order of all ranks; None if this stage has it not."""
    from deepspeed.pipe import TiedLayerSpec

    names = {
        f"{spec.key}.{name}"
        for spec in module._layer_specs
        if isinstance(spec, TiedLayerSpec)
        for name in spec.tied_weight_attr
    }
    here = {
        f"{key}.{name}": module._recursive_getattr(holder, name)
        for key, holder in module.tied_modules.items()
        for name in module.tied_weight_attrs[key]
    }
    return {name: here.get(name) for name in sorted(names)}


def _votes(
    shared: nn.Parameter | None, uses: dict[nn.Parameter, set[int]], asked: dict[nn.Parameter, bool]
) -> Iterable[int]:
    """Return three numbers, of which the largest of all stages count: its kind, whether Muon or AdamW is asked for."""
    if shared is None:
        return 0, 0, 0
    kind = _MATRIX if uses[shared] == {_MATRIX} else _EMBEDDING  # what is unknown is not for Muon either
    return kind, int(asked.get(shared) is True), int(asked.get(shared) is False)


def _largest(module: Any, numbers: list[int]) -> list[int]:
    """Return the largest of each of the `numbers` over all ranks; collective."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator().device_name(module.local_rank)
    found = torch.tensor(numbers, dtype=torch.int32, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [int(number) for number in found]


def _log(module: Any, chosen: dict[nn.Parameter, bool], uses: dict[nn.Parameter, set[int]], asked: Any) -> None:
    """Say what Muon takes of this stage, and warn of matrices that it does not as their kind is unknown."""
    if module.mpu().get_data_parallel_rank() > 0:
        return
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    muon = [parameter for parameter in trained.values() if chosen[parameter]]
    adamw = [parameter for parameter in trained.values() if not chosen[parameter]]
    counts = [f"{len(kind)} parameters ({sum(p.numel() for p in kind):,} numbers)" for kind in (muon, adamw)]
    logger.info(f"stage {module.stage_id}: Muon updates {counts[0]}, AdamW {counts[1]}")
    unknown = [
        f"{name} {tuple(parameter.shape)}"
        for name, parameter in trained.items()
        if parameter.dim() >= 2 and uses[parameter] == {_UNKNOWN} and parameter not in asked
    ]
    if unknown:
        logger.warning(
            f"stage {module.stage_id}: AdamW updates {', '.join(unknown)}, of no kind that is known to be Muon's; set "
            "use_muon of each, True or False, before ds_ddg.initialize"
        )
