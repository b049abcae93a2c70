"""What travels between two stages, as bytes: a header that says what follows, and raw tensors.

The header has a fixed number of bytes, pickled (the ranks of a job trust each other, as in ``torch.distributed``), and
holds the tensors themselves if they are only a few bytes. There are one or two in every tick of a stage, between the
arrival of an activation and the work on it, so every microsecond counts here.
"""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["HEADER_BYTES", "Header", "Kind", "Message", "Spec", "bytes_of", "empty", "fit", "spec_of", "unpack"]

HEADER_BYTES = 4096
INLINE_BYTES = 1024
_TEXT_BYTES = 3072

Spec = tuple[tuple[str, tuple[int, ...]] | None, ...]
"""Type and shape of each tensor of a message; None where there is none."""


class Kind(str, Enum):
    """What a message is about."""

    DATA = "data"
    """The tensors of one micro-batch, or the loss of one call."""
    BEGIN = "begin"
    """A call begins that sends no data yet; the receiver checks that it is in the same one."""
    END = "end"
    """Instead of BEGIN: the data ended."""
    ERROR = "error"
    """The sender failed; `text` says how."""
    PARK = "park"
    """The pipeline is drained: release the standing receive."""
    RESHAPE = "reshape"
    """Release the standing receive, for one of another shape; the message itself follows."""
    LEAVE = "leave"
    """The sender has done its work and will send nothing more."""


class Message(NamedTuple):
    """One message as received: its kind, small values, and tensors that now belong to the receiver."""

    kind: Kind
    info: dict[str, Any]
    tensors: tuple[Tensor | None, ...] = ()


def spec_of(tensors: Sequence[Tensor | None]) -> Spec:
    """Types and shapes of `tensors`."""
    return tuple(None if t is None else (_name(t.dtype), tuple(t.shape)) for t in tensors)


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def empty(spec: Spec, pin: bool = False) -> list[Tensor | None]:
    """Tensors to receive into; `pin`: in memory that a device can copy from at any time."""
    return [None if s is None else torch.empty(s[1], dtype=getattr(torch, s[0]), pin_memory=pin) for s in spec]


def unpack(spec: Spec, inline: bytes) -> list[Tensor | None]:
    """The tensors of a header that has them inline."""
    tensors: list[Tensor | None] = []
    offset = 0
    for entry in spec:
        if entry is None:
            tensors.append(None)
            continue
        dtype, shape = getattr(torch, entry[0]), entry[1]
        end = offset + math.prod(shape) * dtype.itemsize
        empty = end == offset  # which frombuffer refuses
        part = torch.empty(0, dtype=dtype) if empty else torch.frombuffer(bytearray(inline[offset:end]), dtype=dtype)
        tensors.append(part.reshape(shape))
        offset = end
    return tensors


def bytes_of(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """The tensors that really travel, as raw bytes: every dtype of torch goes over every back end that way."""
    return [t.reshape(-1).view(torch.uint8) for t in tensors if t is not None and t.numel() > 0]


class Header(NamedTuple):
    """The first part of a message."""

    kind: Kind
    info: dict[str, Any]
    spec: Spec = ()
    standing: bool = False
    """The tensors fill the receive that is posted for their shape."""
    recurs: bool = False
    """More of this shape will follow."""
    inline: bytes | None = None
    """The tensors themselves, if they are here."""

    def encode(self) -> Tensor:
        """As a tensor of ``HEADER_BYTES`` bytes; ValueError if it is longer."""
        header = pickle.dumps((self.kind.value, *self[1:]), protocol=5)
        if len(header) > HEADER_BYTES:
            raise ValueError(
                f"a message of {len(self.spec)} tensors needs a header of {len(header)} bytes, at most {HEADER_BYTES}"
            )
        return torch.frombuffer(bytearray(header.ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)

    @classmethod
    def decode(cls, header: memoryview) -> Header:
        """Reverse of `encode`, from the memory of such a tensor."""
        kind, *fields = pickle.loads(header)
        return cls(Kind(kind), *fields)


def fit(text: str) -> str:
    """The beginning of `text`, as much as a header holds."""
    return text.encode(errors="replace")[:_TEXT_BYTES].decode(errors="ignore")
