"""DeepSpeed's Muon, adapted where a stage is not a whole model and where its arithmetic depends on what ran before."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.config import MUON_OPTIMIZER
from torch import Tensor

from ds_ddg.host import Host, replaced

__all__ = ["from_config", "is_muon", "stepping", "with_both_kinds", "written_out"]

_PLACE = "deepspeed.runtime.zero.muon"


def from_config(host: Host) -> bool:
    """Return whether the config asks for DeepSpeed's Muon."""
    return host.optimizer_name() == MUON_OPTIMIZER


def is_muon(optimizer: Any) -> bool:
    """Return whether `optimizer`, or what DeepSpeed has wrapped in it, is DeepSpeed's Muon."""
    there = sys.modules.get(f"{_PLACE}.muon_optimizer")  # importing it takes time, and is in vain for all others
    return there is not None and isinstance(getattr(optimizer, "optimizer", optimizer), there.MuonWithAuxAdam)


def with_both_kinds(model_parameters: Iterable[Any]) -> list[Any]:
    """Return `model_parameters` with an empty parameter for Muon or AdamW in each group that has none for it.

    So the optimizer has the same groups on every stage, Muon's and AdamW's by turns: schedulers count them, and
    callers that ask for the learning rate get one answer.
    """
    given = list(model_parameters)
    loose = [item for item in given if not isinstance(item, dict)]
    groups = [
        {**item, "params": _completed([item["params"]] if torch.is_tensor(item["params"]) else item["params"])}
        for item in given
        if isinstance(item, dict)
    ]
    return [*groups, *(_completed(loose) if loose or not groups else [])]


def _completed(parameters: Iterable[Any]) -> list[Any]:
    parameters = list(parameters)
    there = {getattr(parameter, "use_muon", None) for parameter in parameters if parameter.requires_grad}
    for muon in {True, False} - there:
        nothing = torch.nn.Parameter(torch.empty(0))
        nothing.use_muon = muon  # type: ignore[attr-defined]
        parameters.append(nothing)
    return parameters


def stepping(optimizer: Any) -> AbstractContextManager[None]:
    """Inside this block `optimizer` may step: Muon is `written_out`, and no other is touched."""
    return written_out() if is_muon(optimizer) else nullcontext()


@contextmanager
def written_out() -> Iterator[None]:
    """Inside this block DeepSpeed's Muon runs as it is written, and takes kernels of convolutions as matrices.

    DeepSpeed 0.19.8 compiles it, anew for shapes it has not seen: that takes half a minute and a C++ compiler, and
    the last bits depend on which shapes a process has seen before. With a 4-d kernel it fails.
    """
    from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

    with ExitStack() as until_the_end:
        update = partial(_on_matrices, original_muon.muon_update)
        for owner in (original_muon, muon_optimizer):
            until_the_end.enter_context(replaced(owner, "muon_update", update))
        until_the_end.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _on_matrices(update: Any, gradient: Tensor, momentum: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run DeepSpeed's `update`, on one matrix of shape (out, rest) for a 4-d kernel."""
    if gradient.dim() != 4:
        return update(gradient, momentum, *args, **kwargs)
    flat = momentum.flatten(1)
    result = update(gradient.flatten(1), flat, *args, **kwargs)
    momentum.copy_(flat.view(momentum.shape))  # the flat one is a copy in some memory formats
    return result
