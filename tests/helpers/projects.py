"""A project's own pipeline engine, and what it should compute."""

from __future__ import annotations

import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

from helpers import toy


class Project(PipelineEngine):
    """A project's own engine, with an instruction of its own in the map that all such engines share."""

    def _exec_reduce_grads(self) -> None:
        self.reductions = getattr(self, "reductions", 0) + 1
        super()._exec_reduce_grads()

    _INSTRUCTION_MAP = {**PipelineEngine._INSTRUCTION_MAP, schedule.ReduceGrads: _exec_reduce_grads}  # noqa: RUF012


def oracle(calls: int) -> list[float]:
    torch.set_num_threads(1)
    reference = toy.reference(2, micro_batches=2)
    data = toy.batches(2 * calls)
    return [float(reference.train_batch(data)) for _ in range(calls)]
