"""Which parameters belong to which stage of a pipeline that a training only imagines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ds_ddg.analysis.balance import LayerCost, balance

__all__ = ["Stages", "parameters_by_stage"]

Stages = Sequence[nn.Module | Iterable[Tensor]] | Mapping[str, int] | int
"""The stages, each a module or its parameters; or, of a model, the stage of each layer by the beginning of its name,
or the number of stages."""


def parameters_by_stage(stages: Stages, model: Any = None) -> list[list[Tensor]]:
    """Return the parameters of each stage. One that several stages hold belongs to the first, as in the engine.

    Args:
        stages: modules or lists of parameters, in order; or ``{"model.layers.0.": 0, ...}``, of which the longest
            beginning of a parameter's name counts; or the number of stages, for a model that is a list of layers.
        model: the model, for the last two.

    Raises:
        TypeError, ValueError: this is no division of the parameters into stages.
    """
    if isinstance(stages, Mapping):
        found = _by_name(stages, _needed(model, "names"))
    elif isinstance(stages, int):
        found = [_parameters(part) for part in _balanced(_needed(model, "a number"), stages)]
    elif model is not None:
        raise TypeError("model goes with stages given as names or as a number; leave it out")
    else:
        found = [_parameters([stage]) if isinstance(stage, nn.Module) else list(stage) for stage in stages]
    seen: set[Tensor] = set()
    result = []
    for parameters in found:
        result.append([p for p in dict.fromkeys(parameters) if p not in seen])
        seen.update(parameters)
    empty = [k for k, parameters in enumerate(result) if not parameters]
    if not result or empty:
        raise ValueError(f"stages without a parameter of their own: {empty or 'all'}; every stage needs one")
    return result


def _needed(model: Any, what: str) -> Any:
    if model is None:
        raise TypeError(f"stages given as {what} need the model: delayed(optimizer, stages, model=...)")
    return model


def _by_name(stages: Mapping[str, int], model: nn.Module) -> list[list[Tensor]]:
    numbers = sorted(set(stages.values()))
    if numbers != list(range(len(numbers))):
        raise ValueError(f"stages are numbered from 0 without a gap, got {numbers}")
    unused = set(stages)
    found: list[list[Tensor]] = [[] for _ in numbers]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        beginnings = [beginning for beginning in stages if name.startswith(beginning)]
        if not beginnings:
            raise ValueError(f"no stage is named for the parameter {name!r}; the names are {', '.join(stages)}")
        beginning = max(beginnings, key=len)
        unused.discard(beginning)
        found[stages[beginning]].append(parameter)
    if unused:
        raise ValueError(f"no parameter's name begins with {', '.join(map(repr, sorted(unused)))}")
    return found


def _balanced(model: Any, num_stages: int) -> list[list[Any]]:
    """Contiguous stages of layers whose largest has the fewest parameters."""
    layers = getattr(model, "forward_funcs", model)  # those of a PipelineModule
    if isinstance(layers, nn.Module) and not isinstance(layers, nn.Sequential | nn.ModuleList):
        raise TypeError(
            f"only a list of layers can be divided by their number (nn.Sequential, nn.ModuleList, PipelineModule or a "
            f'list), got {type(model).__name__}; name the layers instead: stages={{"embed": 0, "layers.0.": 0, ...}}'
        )
    sizes = [sum(p.numel() for p in _parameters([layer])) for layer in layers]
    costs = [LayerCost(str(i), float(size), 0.0) for i, size in enumerate(sizes)]
    parts = balance(costs, num_stages).parts
    return [list(layers)[first:end] for first, end in pairwise(parts)]


def _parameters(layers: Iterable[Any]) -> list[Tensor]:
    return [p for layer in layers if isinstance(layer, nn.Module) for p in layer.parameters()]
