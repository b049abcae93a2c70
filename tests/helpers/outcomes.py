"""How ranks ended, and the error if one did not return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Outcome:
    """The end of one rank."""

    rank: int
    state: Literal["returned", "raised", "died", "hung"]
    """`died`: the process ended without a word; `hung`: it had to be killed."""
    value: Any = None
    exc_type: str = ""
    message: str = ""
    traceback: str = ""
    exit_code: int | None = None
    """Exit code of the process: None while it is alive; negative for a signal."""
    log: str = ""
    """The end of what the rank wrote to stdout and stderr; of a hung rank, also where each thread was."""

    @property
    def failed(self) -> bool:
        return self.state != "returned"

    def __str__(self) -> str:
        head = f"rank {self.rank} {self.state}"
        if self.exc_type:
            head += f" {self.exc_type}: {self.message}"
        if self.exit_code is not None:
            head += f" (exit code {self.exit_code})"
        if not self.failed:
            return head
        output = self.log and f"-- output --\n{self.log}"
        return "\n".join(part.rstrip() for part in (head, self.traceback, output) if part)


class RanksFailedError(AssertionError):
    """At least one rank did not return; `outcomes` holds all of them, by rank."""

    def __init__(self, what: str, outcomes: list[Outcome], first: int) -> None:
        self.outcomes = outcomes
        self.first = first
        ordered = sorted(outcomes, key=lambda outcome: outcome.rank != first)
        rule = "\n" + "=" * 40 + "\n"
        super().__init__(f"{what}, rank {first} first" + rule + rule.join(str(outcome) for outcome in ordered))
