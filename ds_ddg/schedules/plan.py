"""A schedule as plain data: which stage does what, in which order, and what must come first.

The order of decoupled delayed gradients is in ``ddg.py``, that of the schedules it is compared with in
``synchronous.py`` (DeepSpeed's), ``interleaved.py`` and ``zero_bubble.py`` (which DeepSpeed has not). Nothing here
imports torch, so a plan can be printed, replayed and drawn in milliseconds.

Vocabulary (shared by the whole package)

    stage k          one of K parts of the model, 0 .. K-1, one process (group) each
    micro-batch n    0, 1, 2, ... counted since training began; call t covers n = tM .. tM+M-1
    M                micro-batches per ``train_batch()`` call (``gradient_accumulation_steps``)
    tick n           what a stage does when micro-batch n is its turn: F(n), then B(n - d_k)
    delay d_k        (K-1-k)(1+slack): how many micro-batches old a gradient is when stage k uses it
    version          the weights between two updates; *staleness* is counted in versions
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["BACKWARD", "FORWARD", "UPDATE", "WEIGHT", "Op", "Plan"]

FORWARD, BACKWARD, UPDATE = "F", "B", "U"
WEIGHT = "W"
"""The gradients of the weights, where a schedule splits a backward: its B then makes that of the input alone."""


class Op(NamedTuple):
    """One piece of work of one stage; prints as ``2B5``: stage 2, backward of micro-batch 5."""

    kind: str
    stage: int
    micro_batch: int
    """The micro-batch; for an update, the newest micro-batch whose gradient is in it."""
    chunk: int = 0
    """Number of the part of the stage, where it has several: the second prints as ``2B5'``, the third as ``2B5'2``."""

    def __str__(self) -> str:
        return f"{self.stage}{self.label}"

    @property
    def label(self) -> str:
        """The name of the operation where the stage is clear from the context: ``B5``."""
        mark = f"'{self.chunk if self.chunk > 1 else ''}" if self.chunk else ""
        return f"{self.kind}{self.micro_batch}{mark}"

    @classmethod
    def parse(cls, text: str) -> Op:
        """Reverse of ``str(op)``; ValueError if `text` is not of that form."""
        if found := _OPERATION.fullmatch(text):
            stage, kind, micro_batch, mark, chunk = found.groups()
            return cls(kind, int(stage), int(micro_batch), int(chunk or 1) if mark else 0)
        raise ValueError(f"{text!r} is not an operation: expected stage, F, B, W or U, micro-batch, such as 2B5")


_OPERATION = re.compile(r"([0-9]+)([FBWU])([0-9]+)(?:(')([2-9]|[1-9][0-9]+)?)?")


class Plan:
    """The operations of every stage in every call. Subclasses give the order; the dependency rule is common to all."""

    name = ""
    num_chunks = 1
    """Parts of the model on each stage."""
    splits_backward = False
    """Whether every backward is two operations: B for the gradient of the input, W for those of the weights."""
    elsewhere = ""
    """What runs the schedule, if DeepSpeed does not."""

    def __init__(self, num_stages: int, micro_batches: int = 1) -> None:
        if num_stages < 1 or micro_batches < 1:
            raise ValueError(f"a plan needs at least 1 stage and 1 micro-batch, got {num_stages} and {micro_batches}")
        if refusal := self.refusal(num_stages, micro_batches):
            raise ValueError(refusal)
        self.num_stages = num_stages
        self.micro_batches = micro_batches

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        delays = ", ".join(str(self.delay(stage)) for stage in range(self.num_stages))
        return f"{type(self).__name__}({settings}; delays {delays})"

    @classmethod
    def refusal(cls, num_stages: int, micro_batches: int) -> str:
        """Return why the schedule cannot run so many micro-batches, and what to do; empty if it can."""
        return ""

    def call(self, stage: int, call: int, start: int = 0) -> list[Op]:
        """Return the operations of `stage` in `train_batch()` call number `call`, in order.

        `start` is the first micro-batch since the pipeline was last empty (0, or where a drain left off).
        """
        raise NotImplementedError

    def updates(self, stage: int, call: int, start: int = 0) -> bool:
        """Return whether `stage` updates its weights in `call`: not before the first gradient has come back."""
        return (call + 1) * self.micro_batches - self.delay(stage) > start

    def drain(self, stage: int, end: int, start: int = 0) -> list[Op]:
        """Return the operations that finish what `stage` has in flight when `end` micro-batches have gone forward."""
        return []

    def stream(self, stage: int, calls: int, drain: bool = False) -> Iterator[Op]:
        """Yield all operations of `stage` over `calls` calls, with the drain behind them if wanted."""
        for call in range(calls):
            yield from self.call(stage, call)
        if drain:
            yield from self.drain(stage, calls * self.micro_batches)

    def batches(self, stage: int, calls: int, drain: bool = False) -> Iterator[list[Op]]:
        """Return the stream, with those operations in one list between which `stage` neither receives nor sends.

        All that a list needs from other stages is there before its first operation starts, and what others need of it
        leaves after its last.
        """
        return ([op] for op in self.stream(stage, calls, drain))

    def needs(self, op: Op) -> list[Op]:
        """Return what must be finished, on any stage, before `op` may start; this is the only dependency rule.

        An update needs the gradients of its newest micro-batch; those of older ones come earlier on its stage.
        """
        if op.kind == UPDATE:
            gradient = WEIGHT if self.splits_backward else BACKWARD
            return [Op(gradient, op.stage, op.micro_batch, chunk) for chunk in range(self.num_chunks)]
        if op.kind == WEIGHT:
            return [op._replace(kind=BACKWARD)]
        before = self._along(op, -1)
        if op.kind == FORWARD:
            return [] if before is None else [before]
        behind = self._along(op, +1)
        forward = Op(FORWARD, op.stage, op.micro_batch, op.chunk)
        return [forward] if behind is None else [forward, behind]

    def receiver(self, op: Op) -> int | None:
        """Return the stage that needs what `op` has made, None if no other does: `needs`, read from the other end."""
        step = {FORWARD: +1, BACKWARD: -1}.get(op.kind)
        after = None if step is None else self._along(op, step)
        return None if after is None or after.stage == op.stage else after.stage

    def _along(self, op: Op, step: int) -> Op | None:
        """Return the same work `step` places further on a micro-batch's way through the model; None outside of it."""
        stage = op.stage + step
        return op._replace(stage=stage) if 0 <= stage < self.num_stages else None

    def delay(self, stage: int) -> int:
        """Return the number of micro-batches from a forward to the tick that uses its gradient (0: no staleness)."""
        return 0

    def staleness(self, stage: int) -> int:
        """Return the most updates that `stage` makes between a micro-batch's forward and the use of its gradient."""
        return -(-self.delay(stage) // self.micro_batches)

    def versions(self, stage: int) -> int:
        """Return the most weight versions alive on `stage` at once, when a backward uses those of its forward."""
        return self.staleness(stage) + 1

    def activations(self, stage: int) -> int:
        """Return the most forward passes, each through one chunk, whose activations are alive on `stage` at once."""
        raise NotImplementedError

    def half_done(self, stage: int) -> int:
        """Return the most passes through a chunk of `stage` at once whose B is done, and whose W is not."""
        return 0
