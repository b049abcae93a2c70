"""Files of weights: the index of their tensors, and one tensor at a time."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_ddg.extras import extra

__all__ = ["INDEX", "SINGLE", "WeightsError", "index_of", "opened"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightsError(ValueError):
    """Files of weights are missing, damaged or another model's; the message says which and what to do."""


class Reader(Protocol):
    """An open file; nothing of a tensor is read before it is asked for."""

    def keys(self) -> list[str]: ...
    def shape(self, key: str) -> tuple[int, ...]: ...
    def tensor(self, key: str) -> Tensor: ...


class _Safetensors:
    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def keys(self) -> list[str]:
        return list(self._handle.keys())

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._handle.get_slice(key).get_shape())

    def tensor(self, key: str) -> Tensor:
        return self._handle.get_tensor(key)


class _StateDict:
    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def keys(self) -> list[str]:
        return list(self._state)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._state[key].shape)

    def tensor(self, key: str) -> Tensor:
        return self._state[key]


@contextmanager
def opened(path: Path) -> Iterator[Reader]:
    """Open a file of weights, ``.safetensors`` or what ``torch.save`` wrote; `WeightsError` if it is damaged."""
    with extra("hf", "reading weights"):
        from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as handle:
                yield _Safetensors(handle)
        else:
            # Mapped into memory: a tensor is read where it is copied from.
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
                raise WeightsError(f"{path} holds no state dict; write it with torch.save(model.state_dict(), ...)")
            yield _StateDict(state)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"cannot read {path} ({path.stat().st_size} bytes): {reason}; fetch it again") from error


def index_of(path: Path) -> dict[str, Path]:
    """Map keys to files, for a file of weights or a directory with some; `WeightsError` if there is none."""
    if path.is_file():
        return _keys(path)
    if not path.is_dir():
        raise WeightsError(f"{path} does not exist on this machine; every rank needs it, at the same path")
    if (path / SINGLE).is_file():  # before the index, as transformers does
        return _keys(path / SINGLE)
    if (path / INDEX).is_file():
        return _indexed(path)
    found = sorted(file.name for file in path.iterdir())
    raise WeightsError(
        f"{path} has neither {SINGLE} nor {INDEX} (it has {', '.join(found[:8]) or 'nothing'}); older formats: load "
        "the model once with transformers and write it with model.save_pretrained(...)"
    )


def _keys(path: Path) -> dict[str, Path]:
    with opened(path) as reader:
        return dict.fromkeys(reader.keys(), path)


def _indexed(path: Path) -> dict[str, Path]:
    try:
        names = json.loads((path / INDEX).read_text())["weight_map"]
        index = {key: path / name for key, name in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path / INDEX} is no index of weights ({error!r}); fetch it again") from error
    missing = sorted({file.name for file in index.values() if not file.is_file()})
    if missing:
        raise WeightsError(
            f"{path} lacks {len(missing)} of the files that {INDEX} names ({', '.join(missing[:4])}); fetch them"
        )
    return index
