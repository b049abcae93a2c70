"""The schedules as plain data: which stage does what, in which order, and what must come first.

Nothing here imports torch, so the plan can be printed, replayed and drawn in milliseconds.

Vocabulary (shared by the whole package)

    stage k          one of K parts of the model, 0 .. K-1, one process (group) each
    micro-batch n    0, 1, 2, ... counted since training began; call t covers n = tM .. tM+M-1
    M                micro-batches per ``train_batch()`` call (``gradient_accumulation_steps``)
    tick n           what a stage does when micro-batch n is its turn: F(n), then B(n - d_k)
    delay d_k        (K-1-k)(1+slack): how many micro-batches old a gradient is when stage k uses it
    version          the weights between two updates; *staleness* is counted in versions

The algorithm is Huo et al., *Decoupled Parallel Backpropagation with Convergence Guarantee* (ICML 2018,
arXiv 1804.10574), eq. 6-9. ``DDGPlan(K, M=1).call`` is its Algorithm 1, one line per tick.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["BACKWARD", "FORWARD", "UPDATE", "DDGPlan", "Op", "Plan"]

FORWARD, BACKWARD, UPDATE = "F", "B", "U"


class Op(NamedTuple):
    """One piece of work of one stage; prints as ``2B5``: stage 2, backward of micro-batch 5."""

    kind: str
    stage: int
    micro_batch: int
    """The micro-batch; for an update, the newest micro-batch whose gradient is in it."""
    chunk: int = 0
    """Which part of the stage, where a schedule gives it two; the second prints as ``2B5'``."""

    def __str__(self) -> str:
        return f"{self.stage}{self.label}"

    @property
    def label(self) -> str:
        """What it is where the stage is clear from the context: ``B5``."""
        return f"{self.kind}{self.micro_batch}" + "'" * self.chunk

    @classmethod
    def parse(cls, text: str) -> Op:
        """Reverse of ``str(op)``; ValueError if `text` is not of that form."""
        for kind in (FORWARD, BACKWARD, UPDATE):
            stage, found, micro_batch = text.partition(kind)
            number = micro_batch.removesuffix("'")
            if found and stage.isdigit() and number.isdigit():
                return cls(kind, int(stage), int(number), int(number != micro_batch))
        raise ValueError(f"{text!r} is not an operation: expected stage, F, B or U, micro-batch, such as 2B5")


class Plan:
    """What every stage does in every call. Subclasses give the order; the dependency rule is common to all."""

    name = ""
    num_chunks = 1
    """Parts of the model on each stage. Two make a V: down all stages with the first, up again with the second."""

    def __init__(self, num_stages: int, micro_batches: int = 1) -> None:
        if num_stages < 1 or micro_batches < 1:
            raise ValueError(f"a plan needs at least 1 stage and 1 micro-batch, got {num_stages} and {micro_batches}")
        self.num_stages = num_stages
        self.micro_batches = micro_batches

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        delays = ", ".join(str(self.delay(stage)) for stage in range(self.num_stages))
        return f"{type(self).__name__}({settings}; delays {delays})"

    def call(self, stage: int, call: int, start: int = 0) -> list[Op]:
        """Operations of `stage` in `train_batch()` call number `call`, in order.

        `start` is the first micro-batch since the pipeline was last empty (0, or where a drain left off).
        """
        raise NotImplementedError

    def updates(self, stage: int, call: int, start: int = 0) -> bool:
        """Whether `stage` updates its weights in `call`: not before the first gradient has come back."""
        return (call + 1) * self.micro_batches - self.delay(stage) > start

    def drain(self, stage: int, end: int, start: int = 0) -> list[Op]:
        """Operations that finish what `stage` still has in flight when `end` micro-batches have gone forward."""
        return []

    def stream(self, stage: int, calls: int, drain: bool = False) -> Iterator[Op]:
        """All operations of `stage` over `calls` calls, with the drain behind them if wanted."""
        for call in range(calls):
            yield from self.call(stage, call)
        if drain:
            yield from self.drain(stage, calls * self.micro_batches)

    def batches(self, stage: int, calls: int, drain: bool = False) -> Iterator[list[Op]]:
        """The stream, with those operations in one list between which `stage` neither receives nor sends.

        All that a list needs from other stages is there before its first operation starts, and what others need of it
        leaves after its last.
        """
        return ([op] for op in self.stream(stage, calls, drain))

    def needs(self, op: Op) -> list[Op]:
        """What must be finished, on any stage, before `op` may start. The only dependency rule there is."""
        if op.kind == UPDATE:
            return [Op(BACKWARD, op.stage, op.micro_batch, chunk) for chunk in range(self.num_chunks)]
        before = self._along(op, -1)
        if op.kind == FORWARD:
            return [] if before is None else [before]
        behind = self._along(op, +1)
        forward = Op(FORWARD, op.stage, op.micro_batch, op.chunk)
        return [forward] if behind is None else [forward, behind]

    def receiver(self, op: Op) -> int | None:
        """The stage that needs what `op` has made, None if no other does: `needs`, read from the other end."""
        after = None if op.kind == UPDATE else self._along(op, +1 if op.kind == FORWARD else -1)
        return None if after is None or after.stage == op.stage else after.stage

    def _along(self, op: Op, step: int) -> Op | None:
        """The same work `step` places further on the way of a micro-batch through the model; None outside of it."""
        turn = 2 * self.num_stages - 1  # the V is its own mirror image
        place = (turn - op.stage if op.chunk else op.stage) + step
        if not 0 <= place < self.num_stages * self.num_chunks:
            return None
        chunk = int(place >= self.num_stages)
        return Op(op.kind, turn - place if chunk else place, op.micro_batch, chunk)

    def delay(self, stage: int) -> int:
        """Micro-batches between a forward and the tick that uses its gradient (0: no staleness)."""
        return 0

    def staleness(self, stage: int) -> int:
        """Updates that `stage` makes between the forward of a micro-batch and the use of its gradient, at most."""
        return -(-self.delay(stage) // self.micro_batches)

    def versions(self, stage: int) -> int:
        """Weight versions alive on `stage` at once, at most, when a backward uses those of its forward."""
        return self.staleness(stage) + 1

    def activations(self, stage: int) -> int:
        """Forward passes, each through one chunk, whose activations are alive on `stage` at once, at most."""
        raise NotImplementedError


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
        """How many times longer a tick takes if each hop has this latency, in ticks: 1 up to a latency of slack / 2.

        A gradient that climbs h hops and its answer that comes down again take 2h latencies and h + 1 passes through
        a tick's work, in h(1 + slack) + 1 ticks; the slowest such loop sets the pace.
        """
        return max((h + 1 + 2 * h * latency) / (h * (1 + self.slack) + 1) for h in range(self.num_stages))

    def tick(self, stage: int, n: int, start: int = 0) -> list[Op]:
        """F(n), then B(n - d_k) once the gradient of that micro-batch has had time to come back."""
        back = n - self.delay(stage)
        return [Op(FORWARD, stage, n), Op(BACKWARD, stage, back)] if back >= start else [Op(FORWARD, stage, n)]

    def call(self, stage: int, call: int, start: int = 0) -> list[Op]:
        """M ticks, then one update with what their backward passes accumulated (none yet: no update)."""
        first = call * self.micro_batches
        ops = [op for n in range(first, first + self.micro_batches) for op in self.tick(stage, n, start)]
        newest = [op for op in ops if op.kind == BACKWARD][-1:]
        return ops + [op._replace(kind=UPDATE) for op in newest]

    def drain(self, stage: int, end: int, start: int = 0) -> list[Op]:
        """The backward passes in flight, an update whenever M have accumulated and one for the rest."""
        ops: list[Op] = []
        in_flight = range(max(start, end - self.delay(stage)), end)
        for count, n in enumerate(in_flight, 1):
            ops.append(Op(BACKWARD, stage, n))
            if count % self.micro_batches == 0 or count == len(in_flight):
                ops.append(Op(UPDATE, stage, n))
        return ops
