"""Interleaved 1F1B: several chunks of the model on each stage, so that less of a stage waits while the pipeline fills.

Narayanan et al., *Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM* (SC 2021,
arXiv 2104.04473), section 2.2. DeepSpeed has it not; Megatron-LM and ``torch.distributed.pipelining`` have.
"""

from __future__ import annotations

from ds_ddg.schedules.plan import BACKWARD, FORWARD, UPDATE, Op, Plan

__all__ = ["InterleavedPlan", "per_round", "uneven_rounds"]


class InterleavedPlan(Plan):
    """1F1B on `chunks` parts a stage: stage k holds the parts k, K + k, 2K + k, ... of vK in all.

    The order is that of ``ScheduleInterleaved1F1B`` of torch 2.14, and of Megatron-LM where K divides M. The bubble is
    1F1B's divided by v, for v times as many messages, and each also goes from the last stage to the first.
    ValueError if there is one chunk only, or a number of micro-batches that torch refuses.
    """

    name = "interleaved"
    elsewhere = "Megatron-LM and torch.distributed.pipelining (ScheduleInterleaved1F1B)"

    def __init__(self, num_stages: int, micro_batches: int, chunks: int = 2) -> None:
        super().__init__(num_stages, micro_batches)
        if chunks < 2:
            raise ValueError(f"interleaved needs at least 2 chunks a stage, got {chunks}; with 1 it is 1f1b")
        self.num_chunks = chunks

    @classmethod
    def refusal(cls, num_stages: int, micro_batches: int) -> str:
        return uneven_rounds(cls.name, num_stages, micro_batches)

    def _ahead(self, stage: int) -> int:
        """Return how many forward passes come before the first backward, or the pair that it belongs to."""
        ahead = (self.num_chunks - 1) * per_round(self.num_stages, self.micro_batches)
        return min(ahead + 2 * (self.num_stages - 1 - stage), self.num_chunks * self.micro_batches)

    def activations(self, stage: int) -> int:
        return min(self._ahead(stage) + 1, self.num_chunks * self.micro_batches)

    def call(self, stage: int, call: int, start: int = 0) -> list[Op]:
        first = call * self.micro_batches
        forwards = [Op(FORWARD, stage, first + n, chunk) for n, chunk in self._passes()]
        backwards = [Op(BACKWARD, stage, first + n, self.num_chunks - 1 - chunk) for n, chunk in self._passes()]
        ahead = self._ahead(stage)
        ops = forwards[:ahead]
        for forward, backward in zip(forwards[ahead:], backwards, strict=False):
            ops += forward, backward
        ops += backwards[len(forwards) - ahead :]
        return [*ops, Op(UPDATE, stage, first + self.micro_batches - 1)]

    def _passes(self) -> list[tuple[int, int]]:
        """Return micro-batch and chunk of all passes of a call: a round goes through every chunk before the next."""
        size = per_round(self.num_stages, self.micro_batches)
        rounds = range(0, self.micro_batches, size)
        return [(n, chunk) for begin in rounds for chunk in range(self.num_chunks) for n in range(begin, begin + size)]

    def _along(self, op: Op, step: int) -> Op | None:
        place = op.chunk * self.num_stages + op.stage + step
        if not 0 <= place < self.num_stages * self.num_chunks:
            return None
        chunk, stage = divmod(place, self.num_stages)
        return Op(op.kind, stage, op.micro_batch, chunk)


def per_round(num_stages: int, micro_batches: int) -> int:
    """Return how many micro-batches go through a chunk before the next chunk has its turn: K, or a little more."""
    return micro_batches // max(1, micro_batches // num_stages)


def uneven_rounds(name: str, num_stages: int, micro_batches: int) -> str:
    """Return why torch refuses so many micro-batches for the schedule `name`; empty if it takes them."""
    rounds = max(1, micro_batches // num_stages)
    if micro_batches % rounds == 0:
        return ""
    return (
        f"{name} runs micro-batches in M // K rounds of equal length, and {micro_batches} for {num_stages} stages "
        f"do not divide into {rounds}; take a multiple of {num_stages} for M"
    )
