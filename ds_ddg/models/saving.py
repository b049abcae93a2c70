"""Weights out of a pipeline: every rank writes the tensors of its own stage, and no others.

    engine.drain()
    save_pretrained(net, "out")                  # AutoModelForCausalLM.from_pretrained("out") reads it

The files are those of the library that the layers are from, with exactly the keys and shapes of its model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_ddg.models.library_layer import Origin, pieces_of
from ds_ddg.models.ranks import all_or_none, gather, own_rank
from ds_ddg.models.weight_checks import (
    beside,
    digest,
    listed,
    refuse_missing,
    refuse_other_tensors,
    refuse_unknown_keys,
    tied_in,
)
from ds_ddg.models.weight_files import WeightsError
from ds_ddg.models.weight_writer import replace_weights

__all__ = ["save_pretrained"]


@dataclass(frozen=True)
class _Part:
    """The tensors that one rank has to write, and facts about them."""

    stage: int
    state: dict[str, Tensor]
    tied: set[str]
    """Keys that other stages may have as well."""


def save_pretrained(
    net: nn.Module, directory: str | Path, *, strict: bool = True, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write the model as its library does, each rank the tensors of its stage; call it on all ranks.

    Tied weights are written once, by the first stage that has them; of replicas the first one writes. Weights files of
    an earlier save in `directory` are replaced when all of the new ones are there, and stay if they cannot be. Call
    ``engine.drain()`` before it: gradients in flight are not in the files.

    Args:
        net: a ``PipelineModule`` of specs from this package, without wrappers around or inside their layers.
        directory: a folder on a file system that all ranks share.
        strict: refuse a pipeline with weights in layers of other origin, which no file of the library has a place for.
            False leaves those out.
        max_shard_bytes: size above which a stage writes several files.

    Raises:
        WeightsError: a rank could not write, or the weights are not those of the library's model: other keys or
            shapes, fewer or more layers, tied weights that differ. Every rank raises it.
    """
    part, origin = all_or_none(lambda: _collect(net, strict))
    parts = gather((part.stage, list(part.state), part.tied))
    held = Counter(key for _, keys, _ in parts for key in keys)
    all_or_none(lambda: _check_whole(origin, held, set().union(*(tied for *_, tied in parts))))
    digests = all_or_none(lambda: {key: digest(tensor) for key, tensor in part.state.items() if held[key] > 1})
    _check_equal(gather((part.stage, digests)))
    taken = {key for stage, keys, _ in parts if stage < part.stage for key in keys}
    mine = {key: tensor for key, tensor in part.state.items() if key not in taken}
    # Readers cast all weights to the type that the config names: to the widest, and no weight is rounded.
    types = {tensor.dtype for tensor in part.state.values() if isinstance(tensor, nn.Parameter)}
    dtypes = sorted({dtype for found in gather(types) for dtype in found}, key=str)
    dtype = reduce(torch.promote_types, dtypes)
    replace_weights(Path(directory), part.stage, mine, lambda to: origin.save_config(to, dtype), max_shard_bytes)


def _collect(net: Any, strict: bool) -> tuple[_Part, Origin]:
    stage, writes = _place(net)
    pieces = pieces_of(net)
    origin = pieces[0].origin
    others = beside(net, pieces)
    if strict and others:
        raise WeightsError(
            f"{listed('layers of other origin have', others)} that {origin.name} has no place for; strict=False "
            "leaves them out, engine.save_checkpoint(...) keeps all"
        )
    state: dict[str, Tensor] = {}
    for piece in pieces:
        for key, tensor in piece.original_state().items():
            if state.setdefault(key, tensor) is not tensor:
                raise WeightsError(f"two layers have a {key!r}, and {origin.name} has one; build each spec once")
    refuse_unknown_keys(origin, state)
    refuse_other_tensors(origin, state)
    return _Part(stage, state if writes else {}, tied_in(net, pieces)), origin


def _check_whole(origin: Origin, held: Counter[str], tied: set[str]) -> None:
    refuse_missing(origin, held)
    twice = sorted(key for key, count in held.items() if count > 1 and key not in tied)
    if twice:
        raise WeightsError(
            f"{listed('two stages have', twice)} that {origin.name} has once, and they are not tied; build each spec "
            "once"
        )


def _check_equal(digests: Sequence[tuple[int, dict[str, str]]]) -> None:
    """Raise `WeightsError` if copies of a tied weight differ; on every rank, as all have the same `digests`."""
    first: dict[str, tuple[int, str]] = {}
    for stage, own in digests:
        for key, value in own.items():
            other, expected = first.setdefault(key, (stage, value))
            if value != expected:
                raise WeightsError(
                    f"stages {other} and {stage} share {key!r}, and their copies differ: only one of them could be "
                    "written; call engine.drain() first, and change tied weights on all of their stages alike"
                )


def _place(net: Any) -> tuple[int, bool]:
    """Return this rank's stage, and whether it is the one of its replicas that writes."""
    if not hasattr(net, "topology"):
        return 0, own_rank() == 0
    place = net.topology().get_coord(net.global_rank)
    return place.pipe, all(value == 0 for axis, value in place._asdict().items() if axis != "pipe")
