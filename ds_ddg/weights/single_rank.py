"""A process group of one rank, whose collectives are done when they are called.

DeepSpeed's mixed-precision and ZeRO optimizers reduce gradients, norm and overflow flag over the replicas of a stage
in every update, also where there is only one. Gloo then hands each tensor to a thread and back, and fetches it from a
GPU for that, which makes the main thread wait for all the work that it has launched there.

The "fake" backend of torch does not replace this group: torch 2.14.1 creates none until a private module of its own
tests (``torch.testing._internal.distributed.fake_pg``) has been imported.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ds_ddg.comm.lifetime import this_process

__all__ = ["local_if_single_rank"]

_BACKEND = "ds_ddg_single_rank"


class _CompletedWork(dist.Work):
    """The handle of a collective that had nothing to do."""

    def wait(self, *_: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class _SingleRankGroup(dist.ProcessGroup):
    """A group of one rank with the collectives that an optimizer calls; torch refuses all others."""

    def __init__(self, *_: Any) -> None:
        # Undeclared, but the form that torch 2.11 has for subclasses.
        super().__init__(0, 1)  # type: ignore[call-arg]

    def allreduce(self, *_: Any) -> dist.Work:
        return _CompletedWork()

    def reduce(self, *_: Any) -> dist.Work:
        return _CompletedWork()


def local_if_single_rank(group: Any) -> Any:
    """Return `group`, or a group whose collectives do nothing if this rank is its only member; None stays None."""
    if group is None or dist.get_world_size(group) > 1:
        return group
    kept = this_process().kept_by(group)
    if kept.local is None:
        if _BACKEND not in dist.Backend.backend_list:
            dist.Backend.register_backend(_BACKEND, _SingleRankGroup, devices=["cpu"])
        ranks = dist.get_process_group_ranks(group)
        kept.local = dist.new_group(ranks, backend=_BACKEND, use_local_synchronization=True)
    return kept.local
