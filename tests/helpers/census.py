"""The collectives of this process, counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

_COLLECTIVE = re.compile("gather|reduce|scatter|broadcast|barrier|all_?to_?all")


@contextmanager
def census() -> Iterator[Counter[tuple[str, tuple[int, ...]]]]:
    """Inside this block every collective of this process is counted by name and global ranks.

    All collectives, of torch.distributed, of DeepSpeed and of objects, end in a method of `ProcessGroup`.
    """
    seen: Counter[tuple[str, tuple[int, ...]]] = Counter()
    # As the class holds them: what `getattr` returns would not become a method again.
    originals = {name: method for name, method in vars(dist.ProcessGroup).items() if _COLLECTIVE.search(name)}

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def method(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            seen[name, tuple(dist.get_process_group_ranks(group))] += 1
            return original.__get__(group)(*args, **kwargs)

        return method

    for name, original in originals.items():
        setattr(dist.ProcessGroup, name, counting(name, original))
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)
