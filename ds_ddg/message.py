"""What travels between two stages, as bytes: a header that says what follows, and raw tensors.

The header has a fixed number of bytes: JSON, a zero byte, and the tensors themselves if they are only a few bytes.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

__all__ = ["HEADER_BYTES", "Header", "Kind", "Message", "Spec", "bytes_of", "empty", "fit", "spec_of", "unpack"]

HEADER_BYTES = 4096
INLINE_BYTES = 1024
_TEXT_BYTES = 3072

Spec = tuple[tuple[str, tuple[int, ...]] | None, ...]
"""Type and shape of each tensor of a message; None where there is none."""

_Info = tuple[tuple[str, Any], ...]


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


@dataclass(frozen=True)
class Message:
    """One message as received: its kind, small values, and tensors that now belong to the receiver."""

    kind: Kind
    info: dict[str, Any]
    tensors: tuple[Tensor | None, ...] = ()


def spec_of(tensors: Sequence[Tensor | None]) -> Spec:
    """Types and shapes of `tensors`."""
    return tuple(None if t is None else (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in tensors)


def empty(spec: Spec) -> list[Tensor | None]:
    """Tensors to receive into."""
    return [None if s is None else torch.empty(s[1], dtype=getattr(torch, s[0])) for s in spec]


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


@dataclass(frozen=True)
class Header:
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
        info = tuple(self.info.items())
        text = _text(self.kind, info, self.spec, self.standing, self.recurs, self.inline is not None)
        header = text + (self.inline or b"")
        if len(header) > HEADER_BYTES:
            raise ValueError(
                f"a message of {len(self.spec)} tensors needs a header of {len(header)} bytes, at most {HEADER_BYTES}"
            )
        return torch.frombuffer(bytearray(header.ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)

    @classmethod
    def decode(cls, header: Tensor) -> Header:
        """Reverse of `encode`."""
        text, _, rest = header.numpy().tobytes().partition(b"\0")
        kind, info, spec, standing, recurs, has_inline = _parsed(text)
        return cls(kind, dict(info), spec, standing, recurs, rest if has_inline else None)


# Most headers of a training run say the same, and every microsecond between two stages counts.


@functools.lru_cache(maxsize=64)
def _text(kind: Kind, info: _Info, spec: Spec, *flags: bool) -> bytes:
    return json.dumps([kind.value, info, spec, *flags]).encode() + b"\0"  # JSON writes no such byte


@functools.lru_cache(maxsize=64)
def _parsed(text: bytes) -> tuple[Kind, _Info, Spec, bool, bool, bool]:
    kind, info, spec, *flags = json.loads(text)
    shapes = tuple(entry and (entry[0], tuple(entry[1])) for entry in spec)
    return Kind(kind), tuple((key, value) for key, value in info), shapes, *flags


def fit(text: str) -> str:
    """The beginning of `text`, as much as a header holds; JSON takes up to twelve bytes for a letter."""
    text = text[:_TEXT_BYTES]
    while len(json.dumps(text)) > _TEXT_BYTES:
        text = text[: -max(1, len(text) // 8)]
    return text
