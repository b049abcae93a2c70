"""What has to live longer than the engine that made it: as long as its process group, or as the process."""

from __future__ import annotations

import functools
import gc
import os
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch.distributed as dist

__all__ = ["KeptByGroup", "Process", "this_process"]


class _Usable(Protocol):
    """Links, which are usable until their process group is destroyed."""

    @property
    def usable(self) -> bool: ...


@dataclass
class KeptByGroup:
    """What lives as long as a process group, which may outlive several engines."""

    sends: list[Any] = field(default_factory=list)
    """Everything that senders have sent. Gloo withdraws a send when its handle is freed, and the peer would wait for
    ever: so handles must outlive an engine that is dropped before all has arrived."""
    local: Any = None
    """The group without messages that replaces this one, if it has one rank and somebody has asked."""


class Process:
    """The owner of what outlives the engines of this process."""

    def __init__(self) -> None:
        self._open: list[_Usable] = []
        self._kept: WeakKeyDictionary[dist.ProcessGroup, KeptByGroup] = WeakKeyDictionary()
        # A forked child (a DataLoader's worker) has the connections of its parent. Were it to free an engine that the
        # parent has dropped, gloo would take back receives that are pending there, over the parent's own sockets.
        os.register_at_fork(after_in_child=gc.freeze)

    def keep(self, links: _Usable) -> None:
        """Keep `links`, as their messages must live on if their engine is dropped before the end."""
        # Those whose process groups have been destroyed can send and receive nothing any more.
        self._open[:] = [*(other for other in self._open if other.usable), links]

    def kept_by(self, group: dist.ProcessGroup) -> KeptByGroup:
        """Return what lives as long as `group`."""
        return self._kept.setdefault(group, KeptByGroup())


@functools.cache
def this_process() -> Process:
    """Return the `Process` of this process, made by its first engine."""
    return Process()
