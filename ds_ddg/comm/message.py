"""Messages between two stages, as bytes: a header that says what follows, and raw tensors.

The header has a fixed number of bytes, pickled (the ranks of a job trust each other, as in ``torch.distributed``), and
holds the tensors themselves if they are only a few bytes. A stage handles one or two headers in every tick, between
the arrival of an activation and the work on it, so every microsecond counts here.
"""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from io import BytesIO
from itertools import zip_longest
from operator import le
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "HEADER_BYTES",
    "INLINE_BYTES",
    "Capacity",
    "Header",
    "Kind",
    "Message",
    "Spec",
    "bytes_of",
    "fit",
    "fits",
    "from_parts",
    "larger",
    "sizes_of",
    "spec_of",
    "unpack",
]

HEADER_BYTES = 4096
INLINE_BYTES = 1024
_TEXT_BYTES = 3072

Spec = tuple[tuple[str, tuple[int, ...]] | None, ...]
"""Type and shape of each tensor of a message, None for each that is None."""
Capacity = tuple[int, ...]
"""Bytes of each tensor that really travels, or of each receive buffer."""


class Kind(str, Enum):
    """The purpose of a message."""

    DATA = "data"
    """The tensors of one micro-batch, or the loss of one call."""
    BEGIN = "begin"
    """A call begins that sends no data yet; the receiver checks that it is in the same one."""
    END = "end"
    """Instead of BEGIN: the data ended."""
    ERROR = "error"
    """The sender failed; `text` says how."""
    FLUSH = "flush"
    """The pipeline is drained: release the preposted receives."""
    RESHAPE = "reshape"
    """Release the preposted receives for others of the sizes given as `capacity`; a message for them follows."""
    LEAVE = "leave"
    """The sender has done its work and will send nothing more."""


class Message(NamedTuple):
    """One message as received: its kind, small values, and tensors that now belong to the receiver."""

    kind: Kind
    info: dict[str, Any]
    tensors: tuple[Tensor | None, ...] = ()


def spec_of(tensors: Sequence[Tensor | None]) -> Spec:
    """Return types and shapes of `tensors`."""
    return tuple(None if t is None else (_name(t.dtype), tuple(t.shape)) for t in tensors)


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bytes_of(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """Return the tensors that really travel as raw bytes: every dtype of torch goes over every back end that way."""
    return [t.reshape(-1).view(torch.uint8) for t in tensors if t is not None and t.numel() > 0]


def sizes_of(spec: Spec) -> Capacity:
    """Return the numbers of bytes of what `bytes_of` gives for such tensors."""
    sizes = (math.prod(entry[1]) * getattr(torch, entry[0]).itemsize for entry in spec if entry is not None)
    return tuple(size for size in sizes if size)


def fits(sizes: Capacity, capacity: Capacity) -> bool:
    """Return whether receive buffers of this `capacity` hold tensors of these `sizes`."""
    return len(sizes) <= len(capacity) and all(map(le, sizes, capacity))


def larger(sizes: Capacity, capacity: Capacity) -> Capacity:
    """Return the smallest capacity that holds both."""
    return tuple(map(max, zip_longest(sizes, capacity, fillvalue=0)))


def from_parts(spec: Spec, parts: Iterable[Tensor]) -> list[Tensor | None]:
    """Restore tensors of types and shapes `spec` from their bytes, the reverse of `bytes_of`."""
    remaining = iter(parts)
    # No views of the bytes for autograd: what a layer writes into a tensor has nothing to do with them.
    return _shaped(spec, lambda size, dtype: next(remaining).view(dtype).data)


def unpack(spec: Spec, inline: bytes) -> list[Tensor | None]:
    """Read the tensors of types and shapes `spec` out of a header that holds their bytes."""
    stream = BytesIO(inline)
    return _shaped(spec, lambda size, dtype: torch.frombuffer(bytearray(stream.read(size)), dtype=dtype))


def _shaped(spec: Spec, part: Callable[[int, torch.dtype], Tensor]) -> list[Tensor | None]:
    """Make the tensors of `spec`, each from what `part` returns for its number of bytes and type."""
    tensors: list[Tensor | None] = []
    for entry in spec:
        if entry is None:
            tensors.append(None)
            continue
        dtype, shape = getattr(torch, entry[0]), entry[1]
        size = math.prod(shape) * dtype.itemsize
        tensors.append((part(size, dtype) if size else torch.empty(0, dtype=dtype)).reshape(shape))
    return tensors


class Header(NamedTuple):
    """The first part of a message: it says what follows."""

    kind: Kind
    info: dict[str, Any]
    spec: Spec = ()
    preposted: bool = False
    """Whether the tensors go into the receives that are posted ahead."""
    inline: bytes | None = None
    """The bytes of the tensors themselves, if the header holds them."""

    def encode(self) -> Tensor:
        """Return this header as a tensor of ``HEADER_BYTES`` bytes.

        Raises:
            ValueError: the header needs more bytes.
        """
        header = pickle.dumps((self.kind.value, *self[1:]), protocol=5)
        if len(header) > HEADER_BYTES:
            raise ValueError(
                f"a message of {len(self.spec)} tensors needs a header of {len(header)} bytes, at most {HEADER_BYTES}"
            )
        return torch.frombuffer(bytearray(header.ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)

    @classmethod
    def decode(cls, header: memoryview) -> Header:
        """Restore a header from the memory of a tensor that `encode` made."""
        kind, *fields = pickle.loads(header)
        return cls(Kind(kind), *fields)


def fit(text: str) -> str:
    """Cut `text` to what a header holds."""
    return text.encode(errors="replace")[:_TEXT_BYTES].decode(errors="ignore")
