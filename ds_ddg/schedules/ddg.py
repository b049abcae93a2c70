"""Decoupled delayed gradients (DDG): **the algorithm**, in three methods.

The schedule is that of Huo et al., *Decoupled Parallel Backpropagation with Convergence Guarantee* (ICML 2018,
arXiv 1804.10574), eq. 6-9; with one micro-batch a call, ``DDGPlan.call`` is its Algorithm 1, one line per tick.

    tick    forward of micro-batch n, then backward of micro-batch n - d_k, whose gradient has just come back
    call    M ticks, then one update of the weights with what their backward passes accumulated
    drain   the backward passes that are still in flight when training pauses

Stage k of K has the delay d_k = (K-1-k)(1+slack) micro-batches; ``plan.py`` has the vocabulary.
"""

from __future__ import annotations

from ds_ddg.schedules.plan import BACKWARD, FORWARD, UPDATE, Op, Plan

__all__ = ["DDGPlan"]


class DDGPlan(Plan):
    """Decoupled delayed gradients: in tick n, forward of n and backward of n - d_k; no stage ever waits for a flush.

    With ``micro_batches=1`` and ``slack=0`` this is the paper's Algorithm 1 and 2. With more micro-batches a call
    the delay stays K-1-k *micro-batches*, so staleness falls to at most ceil(d_k / M) updates. Each unit of `slack`
    keeps one more micro-batch in flight per hop, which hides the latency of the links.
    """

    name = "ddg"

    def __init__(self, num_stages: int, micro_batches: int = 1, slack: int = 0) -> None:
        super().__init__(num_stages, micro_batches)
        if slack < 0:
            raise ValueError(f"slack must be 0 or more, got {slack}")
        self.slack = slack

    def delay(self, stage: int) -> int:
        return (self.num_stages - 1 - stage) * (1 + self.slack)

    def activations(self, stage: int) -> int:
        return self.delay(stage) + 1

    def slowdown(self, latency: float) -> float:
        """Return the factor by which a latency of each hop, in ticks, slows a tick: 1 up to a latency of slack / 2.

        A gradient that climbs h hops and its answer that comes down again take 2h latencies and h + 1 passes through
        a tick's work, in h(1 + slack) + 1 ticks; the slowest such loop sets the pace.
        """
        return max((h + 1 + 2 * h * latency) / (h * (1 + self.slack) + 1) for h in range(self.num_stages))

    def tick(self, stage: int, n: int, start: int = 0) -> list[Op]:
        """Return F(n), then B(n - d_k) once the gradient of that micro-batch has had time to come back."""
        back = n - self.delay(stage)
        return [Op(FORWARD, stage, n), Op(BACKWARD, stage, back)] if back >= start else [Op(FORWARD, stage, n)]

    def call(self, stage: int, call: int, start: int = 0) -> list[Op]:
        """Return M ticks, then one update with what their backward passes accumulated (none yet: no update)."""
        first = call * self.micro_batches
        ops = [op for n in range(first, first + self.micro_batches) for op in self.tick(stage, n, start)]
        newest = [op for op in ops if op.kind == BACKWARD][-1:]
        return ops + [op._replace(kind=UPDATE) for op in newest]

    def drain(self, stage: int, end: int, start: int = 0) -> list[Op]:
        """Return the backward passes in flight, an update whenever M have accumulated and one for the rest."""
        ops: list[Op] = []
        in_flight = range(max(start, end - self.delay(stage)), end)
        for count, n in enumerate(in_flight, 1):
            ops.append(Op(BACKWARD, stage, n))
            if count % self.micro_batches == 0 or count == len(in_flight):
                ops.append(Op(UPDATE, stage, n))
        return ops
