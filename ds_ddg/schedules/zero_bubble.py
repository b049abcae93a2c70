"""Zero bubble schedules: a backward in two parts, of which the second waits until its stage has nothing else to do.

Qi et al., *Zero Bubble Pipeline Parallelism* (ICLR 2024, arXiv 2401.10241). Only the gradient of the input (B) is
waited for by another stage; the gradients of the weights (W) fill what would be bubbles. Both schedules here are
synchronous: no gradient is stale. Nothing waits at the update here; gradients clipped by the norm of the whole model
make all stages wait there for the last. DeepSpeed has neither; ``torch.distributed.pipelining`` has both.
"""

from __future__ import annotations

from itertools import count

from ds_ddg.schedules.interleaved import uneven_rounds
from ds_ddg.schedules.plan import BACKWARD, FORWARD, UPDATE, WEIGHT, Op, Plan
from ds_ddg.schedules.synchronous import VPlan

__all__ = ["ZeroBubbleH1Plan", "ZeroBubbleVPlan"]


class ZeroBubbleH1Plan(Plan):
    """1F1B whose stage k puts each W off by k micro-batches: a third of 1F1B's bubble if F, B and W take as long.

    The order is that of ``ScheduleInterleavedZeroBubble`` of torch 2.14 with one chunk a stage, which is the ZB-H1 of
    the paper's section 2.1: every stage keeps as many activations as the first of 1F1B. ValueError if torch refuses
    the number of micro-batches.
    """

    name = "zb-h1"
    splits_backward = True
    elsewhere = "torch.distributed.pipelining (ScheduleInterleavedZeroBubble with one stage a rank)"

    @classmethod
    def refusal(cls, num_stages: int, micro_batches: int) -> str:
        return uneven_rounds(cls.name, num_stages, micro_batches)

    def activations(self, stage: int) -> int:
        return min(self.num_stages, self.micro_batches)

    def half_done(self, stage: int) -> int:
        return min(stage + 1, self.micro_batches)

    def call(self, stage: int, call: int, start: int = 0) -> list[Op]:
        first = call * self.micro_batches
        batch = range(first, first + self.micro_batches)
        ahead = min(self.num_stages - 1 - stage, self.micro_batches)
        ops = [Op(FORWARD, stage, n) for n in batch[:ahead]]
        for n in batch:
            if n + ahead in batch:
                ops.append(Op(FORWARD, stage, n + ahead))
            ops.append(Op(BACKWARD, stage, n))
            if n - stage in batch:
                ops.append(Op(WEIGHT, stage, n - stage))
        put_off = batch[-stage:] if stage else ()
        return [*ops, *(Op(WEIGHT, stage, n) for n in put_off), Op(UPDATE, stage, batch[-1])]


class ZeroBubbleVPlan(VPlan):
    """ZB-V, two chunks in a V: no bubble at all if F, B and W take as long, with the activations of 1F1B.

    The order is that of ``ScheduleZBVZeroBubble`` of torch 2.14, after the paper's section 6. With fewer than 2K - 1
    micro-batches it is the order for 2K - 1 of them, without those that are missing.
    """

    name = "zb-v"
    splits_backward = True
    elsewhere = "torch.distributed.pipelining (ScheduleZBVZeroBubble)"

    def activations(self, stage: int) -> int:
        return min(2 * self.num_stages, self.micro_batches + stage + 1, 2 * self.micro_batches)

    def half_done(self, stage: int) -> int:
        """Return 2k + 1, but for missing micro-batches: as it empties, stage k puts off k W's of each chunk."""
        missing = max(0, 2 * self.num_stages - 1 - self.micro_batches)
        return max(1, min(stage + 1, self.num_stages - missing) + max(0, stage - missing))

    def call(self, stage: int, call: int, start: int = 0) -> list[Op]:
        first, last = call * self.micro_batches, (call + 1) * self.micro_batches - 1
        numbers = {kind + chunk: count(first) for kind in "FBW" for chunk in "01"}
        ops = [Op(step[0], stage, next(numbers[step]), int(step[1])) for step in self._steps(stage)]
        return [*(op for op in ops if op.micro_batch <= last), Op(UPDATE, stage, last)]

    def _steps(self, stage: int) -> list[str]:
        """Return kinds and chunks in order: fill both chunks, alternate, empty both with the W's behind."""
        behind = self.num_stages - stage
        steady = max(0, self.micro_batches - (2 * self.num_stages - 1)) + stage
        phases = [
            (2 * behind - 1, "F0"),
            (stage, "F1 F0"),
            (behind, "F1 B1 W1"),
            (steady, "F0 B0 W0 F1 B1 W1"),
            (behind - 1, "B0 W0 F1 B1 W1"),
            (stage, "B0 B1"),
            (behind, "B0 W0"),
            (stage, "W1"),
            (stage, "W0"),
        ]
        return [step for times, steps in phases for step in steps.split() * times]
