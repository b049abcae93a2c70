"""The synchronous schedules of DeepSpeed, and GPipe: every call ends with a flush, so no gradient is ever stale.

OneFOneBPlan    DeepSpeed's ``TrainSchedule``: a backward as soon as there is one
GPipePlan       all forward passes, then all backward passes (Huang et al., NeurIPS 2019, arXiv 1811.06965)
DualPipeVPlan   two chunks a stage, out and back (DeepSeek-V3, arXiv 2412.19437; DeepSpeed's ``dualpipev.py``)
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from ds_ddg.schedules.plan import BACKWARD, FORWARD, UPDATE, Op, Plan

__all__ = ["DualPipeVPlan", "GPipePlan", "OneFOneBPlan", "VPlan"]


class OneFOneBPlan(Plan):
    """DeepSpeed's ``TrainSchedule``: 1F1B with a flush at the end of every call."""

    name = "1f1b"

    def activations(self, stage: int) -> int:
        return min(self.num_stages - stage, self.micro_batches)

    def call(self, stage: int, call: int, start: int = 0) -> list[Op]:
        first = call * self.micro_batches
        batch = range(first, first + self.micro_batches)
        ahead = self.activations(stage) - 1
        ops = [Op(FORWARD, stage, n) for n in batch[:ahead]]
        for n in batch:
            if n + ahead in batch:
                ops.append(Op(FORWARD, stage, n + ahead))
            ops.append(Op(BACKWARD, stage, n))
        return [*ops, Op(UPDATE, stage, batch[-1])]


class GPipePlan(Plan):
    """All forward passes of a call, then all its backward passes: as fast as 1F1B, and keeps all M activations."""

    name = "gpipe"

    def activations(self, stage: int) -> int:
        return self.micro_batches

    def call(self, stage: int, call: int, start: int = 0) -> list[Op]:
        first = call * self.micro_batches
        batch = range(first, first + self.micro_batches)
        passes = [Op(kind, stage, n) for kind in (FORWARD, BACKWARD) for n in batch]
        return [*passes, Op(UPDATE, stage, batch[-1])]


class VPlan(Plan):
    """Stage k holds parts k and 2K-1-k of the model: down all stages with the first chunks, up with the second."""

    num_chunks = 2

    def _along(self, op: Op, step: int) -> Op | None:
        turn = 2 * self.num_stages - 1  # the V is its own mirror image
        place = (turn - op.stage if op.chunk else op.stage) + step
        if not 0 <= place < self.num_stages * self.num_chunks:
            return None
        chunk = int(place >= self.num_stages)
        return Op(op.kind, turn - place if chunk else place, op.micro_batch, chunk)


class DualPipeVPlan(VPlan):
    """Two chunks a stage, in a V, so that two streams of work fill each other's bubbles.

    The order is that of DeepSpeed 0.19.8, which does not split a backward pass in two ("zero bubble"). A forward and a
    backward that it runs as a pair also share one exchange of messages (its ``CommitP2P``), so that neither starts
    before the other's input is there, and the first's output waits for the second. While the pipeline fills, DeepSpeed
    receives a forward's input one exchange early and sends its output one late; that costs nothing unless links have
    latency, and is left out.
    ValueError if there are fewer than 2K micro-batches, as in DeepSpeed.
    """

    name = "dualpipev"

    @classmethod
    def refusal(cls, num_stages: int, micro_batches: int) -> str:
        if micro_batches >= 2 * num_stages:
            return ""
        return (
            f"dualpipev needs 2 micro-batches for each stage, at least {2 * num_stages} for {num_stages} stages, "
            f"got {micro_batches}; raise M or use fewer stages"
        )

    def activations(self, stage: int) -> int:
        return 2 * self.num_stages + 1

    def call(self, stage: int, call: int, start: int = 0) -> list[Op]:
        first, last = call * self.micro_batches, (call + 1) * self.micro_batches - 1
        numbers: dict[str, Iterator[int]] = {kind + chunk: count(first) for kind in "FB" for chunk in "01"}
        steps = (step for batch in self._steps(stage) for step in batch)
        ops = [Op(step[0], stage, next(numbers[step]), int(step[1])) for step in steps]
        return [*ops, Op(UPDATE, stage, last)]

    def batches(self, stage: int, calls: int, drain: bool = False) -> Iterator[list[Op]]:
        ops = self.stream(stage, calls, drain)
        sizes = [*map(len, self._steps(stage)), 1]  # the update has nothing to exchange
        return ([next(ops) for _ in range(size)] for _ in range(calls) for size in sizes)

    def _steps(self, stage: int) -> list[list[str]]:
        """Return kinds and chunks in order, grouped by exchange: fill both chunks, alternate, empty both."""
        behind, ahead = self.num_stages - 1 - stage, stage + 1
        steady = self.micro_batches - 2 * self.num_stages + ahead
        phases = [
            (2 * behind, "F0"),
            (ahead, "F0 F1"),
            (behind, "B1 F1"),
            # The first pair of the stage where the V turns is none, in DeepSpeed.
            (1, "F0+B1 F1+B0" if behind else "F0 B1 F1+B0"),
            (steady - 1, "F0+B1 F1+B0"),
            (behind, "B1 F1+B0"),
            (ahead, "B1 B0"),
            (behind, "B0"),
        ]
        return [batch.split("+") for times, steps in phases for batch in steps.split() * times]
