"""Weights in and out of a pipeline: every rank reads and writes the tensors of its own stage, and no others.

    net = PipelineModule(causal_lm(directory), num_stages=4, loss_fn=next_token_loss)
    load_pretrained(net, directory)              # before ds_ddg.initialize, which copies weights
    engine, *_ = ds_ddg.initialize(model=net, ...)
    ...
    engine.drain()
    save_pretrained(net, "out")                  # AutoModelForCausalLM.from_pretrained("out") reads it

The files are those of the library that the layers are from. Between ranks travel names and sizes, never weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_ddg.models.piece import Origin, pieces_of
from ds_ddg.models.weights import INDEX, SINGLE, WeightsError, index_of, opened

__all__ = ["Loaded", "load_pretrained", "read_state_dict", "save_pretrained"]

T = TypeVar("T")


@dataclass(frozen=True)
class Loaded:
    """What `load_pretrained` did on this rank; keys are those of the library's model."""

    read: tuple[str, ...]
    """Tensors of this stage that were read."""
    missing: tuple[str, ...]
    """Tensors of this stage that the files do not have; they keep their initial values."""
    unused: tuple[str, ...]
    """Tensors in the files that no stage has a use for."""


def load_pretrained(net: nn.Module, path: str | Path, *, strict: bool = True) -> Loaded:
    """Fill the weights of this rank's stage, one tensor at a time, cast to the type that they have.

    Args:
        net: a ``PipelineModule`` of specs from this package, before it is given to ``ds_ddg.initialize``.
        path: a Hugging Face directory with safetensors, or a state dict (``.safetensors``, ``.pt``, ``.pth``).
        strict: refuse files that lack tensors or have more. False for a new head on a pretrained encoder.

    Raises:
        WeightsError: on every rank, if any of them finds something missing, damaged or of another shape. Weights may
            have been overwritten in part.
    """
    return _together(lambda: _load(net, Path(path), strict))


def _load(net: nn.Module, path: Path, strict: bool) -> Loaded:
    pieces = pieces_of(net)
    origin = pieces[0].origin
    wanted: dict[str, list[Tensor]] = {}
    for piece in pieces:
        for key, tensor in piece.original_state().items():
            wanted.setdefault(key, []).append(tensor)
    if path.is_dir():
        _as_weights_error(lambda: origin.check(path))
    files, unused = _matched(origin, path)
    missing = tuple(sorted(wanted.keys() - files.keys()))
    if strict and missing:
        raise WeightsError(_list(f"{path} lacks", missing) + "; strict=False leaves them as initialised")
    if strict and unused:
        raise WeightsError(
            _list(f"{path} has", unused) + " that the model has no use for; is it the same config? strict=False skips "
            "them"
        )
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for key in sorted(wanted.keys() & files.keys()):
        file, name = files[key]
        by_file.setdefault(file, []).append((key, name))
    for file, names in by_file.items():
        with opened(file) as reader:
            there = set(reader.keys())
            for key, name in names:
                if name not in there:
                    raise WeightsError(f"{file} lacks {name!r}, which {INDEX} says it has; fetch both again")
                if reader.shape(name) != tuple(wanted[key][0].shape):
                    raise WeightsError(
                        f"{name!r} in {file} has the shape {reader.shape(name)}, the model's {key!r} has "
                        f"{tuple(wanted[key][0].shape)}; build the specs from the config.json beside the weights"
                    )
                tensor = reader.tensor(name)
                with torch.no_grad():
                    for target in wanted[key]:
                        target.copy_(tensor)
    read = tuple(key for names in by_file.values() for key, _ in names)
    return Loaded(read, missing, tuple(sorted(unused)))


def _matched(origin: Origin, path: Path) -> tuple[dict[str, tuple[Path, str]], list[str]]:
    """Key of the model -> file and key in it; and the keys that are of no use."""
    index = index_of(path)
    shapes, aliases = origin.shapes(), origin.aliases()
    names = _as_weights_error(lambda: origin.rename(list(index)))
    files: dict[str, tuple[Path, str]] = {}
    unused = []
    for name, key in names.items():
        kept = aliases.get(key, key)
        if kept not in shapes:
            if not origin.ignored(name) and not origin.ignored(key):
                unused.append(name)
        elif key == kept or kept not in files:  # files of tied weights may have any or all of their keys
            files[kept] = (index[name], name)
    return files, unused


def save_pretrained(net: nn.Module, directory: str | Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write the model as its library does, each rank the tensors of its stage; call it on all ranks.

    Tied weights are written once, by the first stage that has them; of replicas the first one writes. Weights files of
    an earlier save in `directory` go. Call ``engine.drain()`` before it: gradients in flight are not in the files.

    Args:
        net: a ``PipelineModule`` of specs from this package.
        directory: on a file system that all ranks share.
        max_shard_bytes: a stage with more writes several files.

    Raises:
        WeightsError: on every rank, if any of them could not write.
    """
    path = Path(directory)
    stage, writes = _place(net)
    state: dict[str, Tensor] = {}

    def collect() -> Origin:
        for piece in pieces_of(net) if writes else []:
            for key, tensor in piece.original_state().items():
                state.setdefault(key, tensor)
        if _rank() == 0:
            path.mkdir(parents=True, exist_ok=True)
            for old in path.glob("model*.safetensors*"):
                # The name decides what a reader takes: what is left of an earlier save would win.
                if old.name in (SINGLE, INDEX) or old.name.startswith("model-"):
                    old.unlink()
        return pieces_of(net)[0].origin

    origin = _together(collect)
    taken = {key for other, keys in _gather((stage, list(state))) if other < stage for key in keys}
    shards = _shards({key: tensor for key, tensor in state.items() if key not in taken}, max_shard_bytes)
    counts = dict(sorted((other, count) for other, count in _gather((stage, len(shards))) if count))
    total, before = sum(counts.values()), sum(count for other, count in counts.items() if other < stage)
    names = [
        SINGLE if total == 1 else f"model-{before + i + 1:05}-of-{total:05}.safetensors" for i in range(len(shards))
    ]

    dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)

    def write() -> None:
        from safetensors.torch import save_file

        for name, shard in zip(names, shards, strict=True):
            save_file({key: _own(tensor) for key, tensor in shard}, path / name, metadata={"format": "pt"})
        if _rank() == 0:
            origin.save_config(path, dtype)

    _together(write)
    where = {key: name for name, shard in zip(names, shards, strict=True) for key, _ in shard}
    size = sum(tensor.nbytes for shard in shards for _, tensor in shard)
    everywhere = _gather((where, size))

    def finish() -> None:
        if _rank() == 0 and total > 1:
            weight_map = {key: name for part, _ in everywhere for key, name in part.items()}
            content = {"metadata": {"total_size": sum(n for _, n in everywhere)}, "weight_map": weight_map}
            (path / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

    _together(finish)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file or directory in this process, for ``model.load_state_dict``. `WeightsError` as above."""
    files = set(index_of(Path(path)).values())
    state: dict[str, Tensor] = {}
    for file in sorted(files):
        with opened(file) as reader:
            state.update({key: reader.tensor(key).clone() for key in reader.keys()})  # noqa: SIM118
    return state


def _own(tensor: Tensor) -> Tensor:
    """On the CPU and with memory of its own: engines keep weights as views into one buffer."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _shards(state: dict[str, Tensor], limit: int) -> list[list[tuple[str, Tensor]]]:
    shards: list[list[tuple[str, Tensor]]] = []
    room = -1
    for key, tensor in state.items():
        if tensor.nbytes > room or not shards:
            shards.append([])
            room = limit
        shards[-1].append((key, tensor))
        room -= tensor.nbytes
    return shards


def _place(net: Any) -> tuple[int, bool]:
    """This rank's stage, and whether it is the one of its replicas that writes."""
    if not hasattr(net, "topology"):
        return 0, _rank() == 0
    place = net.topology().get_coord(net.global_rank)
    return place.pipe, all(value == 0 for axis, value in place._asdict().items() if axis != "pipe")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gather(value: T) -> list[T]:
    """By rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _together(work: Callable[[], T]) -> T:
    """Do it on all ranks; if it fails on one, all of them raise, and none is left waiting for it."""
    result: Any = None
    error: Exception | None = None
    try:
        result = work()
    except (ValueError, OSError) as raised:
        error = raised
    for rank, text in enumerate(_gather(None if error is None else f"{error}")):
        if text is not None:
            where = "" if rank == _rank() else f"rank {rank}: "
            raise WeightsError(where + text) from error
    return result


def _as_weights_error(work: Callable[[], T]) -> T:
    try:
        return work()
    except ValueError as error:
        raise WeightsError(str(error)) from error


def _list(what: str, keys: list[str] | tuple[str, ...]) -> str:
    more = ", ..." if len(keys) > 4 else ""
    return f"{what} {len(keys)} tensors ({', '.join(keys[:4])}{more})"
