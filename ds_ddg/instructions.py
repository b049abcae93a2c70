"""The plan in DeepSpeed's words: a ``PipeSchedule`` whose instructions the engine's dispatch map executes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    PipeSchedule,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    SendActivation,
    SendGrad,
)

from ds_ddg.schedules.plan import BACKWARD, FORWARD, UPDATE, Op, Plan

__all__ = ["AdvanceClocks", "DDGSchedule", "TellLoss", "UpdateWeights"]


class AdvanceClocks(PipeInstruction):
    """End a call in which no gradient arrived: learning rate and step counts move on, the weights stay.

    Roughly ``OptimizerStep`` without ``optimizer.step()``: no weight decay, no momentum, no Adam count.
    """


class TellLoss(PipeInstruction):
    """Tell the other stages, from the last one, the loss of the call, which is known now.

    It comes before the backward pass of the call's last micro-batch, on whose gradient it rides. Until it is read back
    from a device, nothing more is launched there, so the next work should be close: that backward, not the next
    forward.
    """


class UpdateWeights(PipeInstruction):
    """Step the optimizer outside a call: the weights move on, learning rate and step counts stay.

    Roughly ``OptimizerStep`` without the bookkeeping of a call; only a drain needs it.
    """


class DDGSchedule(PipeSchedule):
    """Executes `ops` of one stage; micro-batch n lives in pipe buffer n modulo the number in flight.

    Args:
        plan: the plan that `ops` come from.
        stage_id: this stage.
        ops: operations of the stage, from ``plan.call`` or ``plan.drain``.
        draining: whether the operations finish what is in flight and belong to no call.
    """

    def __init__(self, plan: Plan, stage_id: int, ops: Sequence[Op], draining: bool = False) -> None:
        super().__init__(plan.micro_batches, plan.num_stages, stage_id)
        self.plan = plan
        self.ops = ops
        self.draining = draining

    def num_pipe_buffers(self) -> int:
        """Return one buffer for each micro-batch that can be in flight: d_k + 1."""
        return self.plan.activations(self.stage_id)

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yield the instructions of one operation at a time."""
        for op in self.ops:
            if op.kind == UPDATE:
                yield [ReduceGrads(), UpdateWeights() if self.draining else OptimizerStep()]
            else:
                buffer_id = op.micro_batch % self.num_pipe_buffers()
                yield _instructions(op.kind, buffer_id, self.is_first_stage, self.is_last_stage)
                if op.kind == FORWARD and self.is_last_stage and (op.micro_batch + 1) % self.micro_batches == 0:
                    yield [TellLoss()]
        if not self.draining and all(op.kind != UPDATE for op in self.ops):
            yield [AdvanceClocks()]


@functools.lru_cache(maxsize=1024)
def _instructions(kind: str, buffer_id: int, first: bool, last: bool) -> list[PipeInstruction]:
    """Return the parts of a forward or backward pass; nobody changes an instruction, so one list serves every tick."""
    instructions: list[tuple[bool, type[PipeInstruction]]]
    if kind == FORWARD:
        instructions = [
            (first or last, LoadMicroBatch),
            (not first, RecvActivation),
            (True, ForwardPass),
            (not last, SendActivation),
        ]
    else:
        assert kind == BACKWARD, kind
        instructions = [(not last, RecvGrad), (True, BackwardPass), (not first, SendGrad)]
    return [instruction(buffer_id) for wanted, instruction in instructions if wanted]
