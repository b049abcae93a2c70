"""A piece of a library's model, as one layer of a pipeline that knows what its weights are called in the library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["Origin", "Piece", "pieces_of"]


class Origin(Protocol):
    """The library's model as a whole, of which no rank has the weights."""

    name: str
    """The name that the library has for the model."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every key of the model's state dict with its shape, tied weights once."""

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return every key of `shapes` with the type that the model was built with."""

    def aliases(self) -> dict[str, str]:
        """Map other keys of tied weights to the one in `shapes`."""

    def rename(self, keys: list[str]) -> dict[str, str]:
        """Map keys in a file to keys of the model, for older versions' files; ValueError if renaming is not enough."""

    def ignored(self, key: str) -> bool:
        """Return whether a key of a file that the model has no use for is a known leftover."""

    def check(self, directory: Path) -> None:
        """Raise ValueError if what lies beside the weights in `directory` says that they are another model's."""

    def save_config(self, directory: Path, dtype: torch.dtype) -> None:
        """Write what describes the model, beside its weights of type `dtype`."""


class Piece(nn.Module):
    """Some modules of a library's model.

    Args:
        origin: the model.
        parts: the modules by their path in it.
    """

    def __init__(self, origin: Origin, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.origin = origin
        self._paths = {path.replace(".", "__"): path for path in parts}  # the name of a child has no dots
        for name, path in self._paths.items():
            self.add_module(name, parts[path])

    def part(self, path: str) -> nn.Module:
        """Return the module at `path` in the library's model."""
        return self.get_submodule(path.replace(".", "__"))

    def original_state(self) -> dict[str, Tensor]:
        """Return this piece's parameters and buffers by their keys in the model's state dict, tied weights once.

        This is the one place that knows which is which; the tensors are the piece's own, not copies.

        Raises:
            ValueError: weights that the model ties have come apart.
        """
        aliases = self.origin.aliases()
        state: dict[str, Tensor] = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            child, _, rest = name.partition(".")
            key = f"{self._paths[child]}.{rest}"
            kept = aliases.get(key, key)
            if state.setdefault(kept, tensor) is not tensor:
                raise ValueError(
                    f"{key!r} and {kept!r} are one weight in {self.origin.name}, and two here; put one parameter in "
                    "both places"
                )
        return state


def pieces_of(net: nn.Module) -> list[Piece]:
    """Return all pieces in `net`, which come from one model; ValueError if there are none, or of several models."""
    pieces = [module for module in net.modules() if isinstance(module, Piece)]
    if len({id(piece.origin) for piece in pieces}) > 1:
        raise ValueError("the layers come from several models, build all of them from one list of specs")
    if not pieces:
        found = sorted({type(module).__name__ for module in net.children()})
        raise ValueError(
            f"no layer here says what its weights are called in a file (layers: {', '.join(found) or 'none'}); "
            "build the specs with ds_ddg.models.from_transformers or torchvision_resnet"
        )
    return pieces
