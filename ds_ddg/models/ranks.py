"""Joint work of ranks on files. Between them travel names, sizes and digests, never weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ds_ddg.extras import MissingExtraError
from ds_ddg.models.weight_files import WeightsError

__all__ = ["all_or_none", "gather", "own_rank"]

T = TypeVar("T")

_FOR_USERS = (ValueError, OSError, MissingExtraError)


def own_rank() -> int:
    """Return the global rank of this process; 0 where there is one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(value: T) -> list[T]:
    """Return the values of all ranks, ordered by rank; a collective call."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_or_none(work: Callable[[], T]) -> T:
    """Do the work on all ranks; if one fails, all raise `WeightsError`, and no rank is left waiting."""
    result: Any = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as raised:  # whatever it is: the others wait
        error = raised
    own = None if error is None else _told(error)
    for rank, text in enumerate(gather(own)):
        if text is not None:
            where = "" if text == own else f"rank {rank}: "
            raise WeightsError(where + text) from error
    return result


def _told(error: Exception) -> str:
    """Put an error into words; the messages of what is told to users are used as they are."""
    return f"{error}" if isinstance(error, _FOR_USERS) else f"{type(error).__name__}: {error}"
