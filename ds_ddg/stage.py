"""The facts about a stage that never change, and the place of the stage in its run."""

from __future__ import annotations

from dataclasses import dataclass

from ds_ddg.config import DDGConfig
from ds_ddg.schedules.ddg import DDGPlan

__all__ = ["RunState", "Stage", "name_of"]


def name_of(stage_id: int, rank: int) -> str:
    """Return the name that errors give a stage on one of its ranks."""
    return f"stage {stage_id} (rank {rank})"


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline, as this rank holds it; it never changes."""

    stage_id: int
    num_stages: int
    rank: int
    """The global rank."""
    config: DDGConfig

    @property
    def is_first(self) -> bool:
        """Whether the stage reads the inputs."""
        return self.stage_id == 0

    @property
    def is_last(self) -> bool:
        """Whether the stage reads the labels and computes the loss."""
        return self.stage_id == self.num_stages - 1

    @property
    def name(self) -> str:
        """The name that errors give the stage on this rank."""
        return name_of(self.stage_id, self.rank)


@dataclass
class RunState:
    """The place of a stage in its run; it changes through its methods alone, at the same calls on every rank.

    Args:
        num_stages: K.
        micro_batches: M, micro-batches per call.
        slack: extra micro-batches in flight per hop.
    """

    num_stages: int
    micro_batches: int
    slack: int = 0
    schedule: str = "1f1b"
    """The present schedule, "ddg" or "1f1b"."""
    call: int = 0
    """The number of the present call, or between two calls of the next one."""
    filled_at: int = 0
    """The first micro-batch since the pipeline was last empty."""
    drained: bool = True
    """Whether the pipeline is empty and its channels have been flushed."""

    @property
    def plan(self) -> DDGPlan:
        """The plan of the delayed schedule."""
        return DDGPlan(self.num_stages, self.micro_batches, self.slack)

    @property
    def delayed(self) -> bool:
        """Whether the present schedule is DDG."""
        return self.schedule == "ddg"

    @property
    def next_micro_batch(self) -> int:
        """The number of micro-batches that have gone forward, between two calls."""
        return self.call * self.micro_batches

    def begin(self) -> None:
        """Note that messages may be on their way from here on."""
        self.drained = False

    def end_call(self) -> int:
        """End a call, and return its number."""
        self.call += 1
        return self.call - 1

    def drain(self) -> None:
        """Note that nothing is in flight any more: the pipeline fills anew."""
        self.drained = True
        self.filled_at = self.next_micro_batch

    def resume(self, call: int) -> None:
        """Go on from a checkpoint, with call number `call`."""
        self.call = call
        self.filled_at = self.next_micro_batch

    def resize(self, micro_batches: int) -> None:
        """Change the micro-batches of a call from here on; the pipeline must be empty."""
        self.micro_batches = micro_batches
        self.filled_at = self.next_micro_batch

    def switch(self, schedule: str) -> None:
        """Change to `schedule` from the next call on; the pipeline must be empty."""
        self.schedule = schedule

    def choose_slack(self, slack: int) -> None:
        """Change to `slack` from the next call on; the pipeline must be empty."""
        self.slack = slack
