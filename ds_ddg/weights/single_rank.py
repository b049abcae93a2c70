"""A process group of one rank, whose collectives are done when they are called.

DeepSpeed's mixed-precision and ZeRO optimizers reduce gradients, norm and overflow flag over the replicas of a stage
in every update, also where there is but one. Gloo then hands each tensor to a thread and back, and fetches it from a
GPU for that, which makes the main thread wait for all the work that it has launched there.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

__all__ = ["alone_if_one"]

_BACKEND = "ds_ddg_alone"
_stand_ins: WeakKeyDictionary[dist.ProcessGroup, Any] = WeakKeyDictionary()


class _Done(dist.Work):
    """Of a collective that had nothing to do."""

    def wait(self, *_: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class _Alone(dist.ProcessGroup):
    """Has the collectives that an optimizer asks for; torch refuses all others."""

    def __init__(self, *_: Any) -> None:
        # Undeclared, but the form that torch 2.11 has for subclasses.
        super().__init__(0, 1)  # type: ignore[call-arg]

    def allreduce(self, *_: Any) -> dist.Work:
        return _Done()

    def reduce(self, *_: Any) -> dist.Work:
        return _Done()


def alone_if_one(group: Any) -> Any:
    """`group`, or one that does nothing in its place if this rank is its only member."""
    if group is None or dist.get_world_size(group) > 1:
        return group
    if group not in _stand_ins:
        if _BACKEND not in dist.Backend.backend_list:
            dist.Backend.register_backend(_BACKEND, _Alone, devices=["cpu"])
        ranks = dist.get_process_group_ranks(group)
        _stand_ins[group] = dist.new_group(ranks, backend=_BACKEND, use_local_synchronization=True)
    return _stand_ins[group]
