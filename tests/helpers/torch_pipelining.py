"""The orders of torch.distributed.pipelining's schedules, without ranks, in our operations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ds_ddg.schedules.plan import BACKWARD, FORWARD, WEIGHT, Op

KINDS = {"F": FORWARD, "B": BACKWARD, "I": BACKWARD, "W": WEIGHT}


def torch_order(schedule: Any, num_stages: int, micro_batches: int, chunks: int, v: bool = False) -> list[list[Op]]:
    """Return what each rank of a `schedule` of torch computes in a step; ValueError if torch refuses.

    Torch numbers all parts of the model and calls them stages; what we call a stage is a rank there.
    """
    last = num_stages * chunks - 1
    parts = [last * chunk if v else num_stages * chunk for chunk in range(chunks)]
    stages = [
        SimpleNamespace(num_stages=last + 1, group_size=num_stages, group_rank=0, stage_index=part, submod=None)
        for part in parts
    ]

    def ours(action: Any) -> Op:
        part = action.stage_index
        chunk, stage = divmod(part, num_stages)
        stage = last - part if v and chunk else stage
        return Op(KINDS[action.computation_type.value], stage, action.microbatch_index, chunk)

    order = schedule(stages, micro_batches).pipeline_order
    return [[ours(action) for action in order[rank] if action is not None] for rank in range(num_stages)]
