"""Weights into a pipeline: every rank reads the tensors of its own stage, and no others.

    net = PipelineModule(causal_lm(directory), num_stages=4, loss_fn=next_token_loss)
    load_pretrained(net, directory)              # before ds_ddg.initialize, which copies weights
    engine, *_ = ds_ddg.initialize(model=net, ...)

The files are those of the library that the layers are from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ds_ddg.models.library_layer import Origin, pieces_of
from ds_ddg.models.ranks import all_or_none, gather
from ds_ddg.models.weight_checks import kind_of_number, listed, refuse_unknown_keys
from ds_ddg.models.weight_files import INDEX, Reader, WeightsError, index_of, opened

__all__ = ["Loaded", "load_pretrained", "read_state_dict"]


@dataclass(frozen=True)
class Loaded:
    """The result of `load_pretrained` on this rank; keys are those of the library's model."""

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
        WeightsError: a rank found something missing, damaged or of another shape; every rank raises it. Weights may
            have been overwritten in part.
    """
    origin, wanted = all_or_none(lambda: _wanted(net))
    held = {key for keys in gather(list(wanted)) for key in keys}
    return all_or_none(lambda: _load(origin, wanted, held, Path(path), strict))


def _wanted(net: nn.Module) -> tuple[Origin, dict[str, list[Tensor]]]:
    pieces = pieces_of(net)
    wanted: dict[str, list[Tensor]] = {}
    for piece in pieces:
        for key, tensor in piece.original_state().items():
            wanted.setdefault(key, []).append(tensor)
    # No file ever has these, strict or not.
    refuse_unknown_keys(pieces[0].origin, wanted)
    return pieces[0].origin, wanted


def _load(origin: Origin, wanted: dict[str, list[Tensor]], held: set[str], path: Path, strict: bool) -> Loaded:
    if path.is_dir():
        origin.check(path)
    files, unused = _matched(origin, path)
    missing = tuple(sorted(wanted.keys() - files.keys()))
    unheld = sorted(files.keys() - held)
    if strict and missing:
        raise WeightsError(listed(f"{path} lacks", missing) + "; strict=False leaves them as initialised")
    if strict and unused:
        raise WeightsError(
            listed(f"{path} has", unused)
            + " that the model has no use for; is it the same config? strict=False skips "
            "them"
        )
    if strict and unheld:
        raise WeightsError(
            listed(f"{path} has", unheld) + " that the model has and no layer of this pipeline; build it from all the "
            "specs of the model. strict=False skips them"
        )
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for key in sorted(wanted.keys() & files.keys()):
        for file, name in files[key]:
            by_file.setdefault(file, []).append((key, name))
    filled: dict[str, str] = {}
    for file, names in by_file.items():
        with opened(file) as reader:
            there = set(reader.keys())
            for key, name in names:
                if name not in there:
                    raise WeightsError(f"{file} lacks {name!r}, which {INDEX} says it has; fetch both again")
                _check_shape(reader, file, name, key, wanted[key][0])
                _fill(wanted[key], reader.tensor(name), name, filled.setdefault(key, name))
    return Loaded(tuple(filled), missing, tuple(sorted(unused + [name for key in unheld for _, name in files[key]])))


def _check_shape(reader: Reader, file: Path, name: str, key: str, target: Tensor) -> None:
    if reader.shape(name) != tuple(target.shape):
        raise WeightsError(
            f"{name!r} in {file} has the shape {reader.shape(name)}, the model's {key!r} has {tuple(target.shape)}; "
            "build the specs from the config.json beside the weights"
        )


@torch.no_grad()
def _fill(targets: list[Tensor], tensor: Tensor, name: str, first: str) -> None:
    """Copy `tensor` to `targets`, or see that it equals what `first`, another name of the same weight, has brought."""
    if kind_of_number(tensor.dtype) != kind_of_number(targets[0].dtype):
        raise WeightsError(
            f"{name!r} has numbers of {tensor.dtype} and the model has {targets[0].dtype}: weights that are quantized "
            "must be dequantized first; load the model once with transformers, dequantize it and write it anew"
        )
    for target in targets:
        if name == first:
            target.copy_(tensor)
        elif not torch.equal(target, tensor.to(target)):
            raise WeightsError(
                f"{first!r} and {name!r} differ, and are one weight of the model; build the specs from a config that "
                "does not tie them (tie_word_embeddings)"
            )


def _matched(origin: Origin, path: Path) -> tuple[dict[str, list[tuple[Path, str]]], list[str]]:
    """Return key of the model -> files and keys in them, its own first; and the keys that are of no use."""
    index = index_of(path)
    shapes, aliases = origin.shapes(), origin.aliases()
    files: dict[str, list[tuple[Path, str]]] = {}
    unused = []
    for name, key in origin.rename(list(index)).items():
        kept = aliases.get(key, key)
        if kept in shapes:  # files of tied weights may have any or all of their keys
            files.setdefault(kept, []).insert(0 if key == kept else len(files[kept]), (index[name], name))
        elif not origin.ignored(name) and not origin.ignored(key):
            unused.append(name)
    return files, unused


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a file or directory into this process, for ``model.load_state_dict``.

    Args:
        path: a file of weights, or a directory with one or several.

    Raises:
        WeightsError: the files are missing or damaged.
    """
    files = set(index_of(Path(path)).values())
    state: dict[str, Tensor] = {}
    for file in sorted(files):
        with opened(file) as reader:
            state.update({key: reader.tensor(key).clone() for key in reader.keys()})  # noqa: SIM118
    return state
