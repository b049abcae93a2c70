"""The losses of past calls: the last stage tells each one, every stage learns them in order, whenever it likes."""

from __future__ import annotations

from typing import Any, NamedTuple

from ds_ddg.comm.stage_links import Links

__all__ = ["Loss", "Losses", "Row", "Update"]

Row = tuple[Any, ...]
"""What one stage measured: its number, then its values."""


class Update(NamedTuple):
    """What the updates of one call came to, on one stage or several."""

    square: float = 0.0
    """Of the norm of the gradients, before they were clipped."""
    skipped: int = 0
    """Stages that skipped theirs because of an overflow."""

    def plus(self, other: Update) -> Update:
        """Of more stages."""
        return Update(self.square + other.square, self.skipped + other.skipped)


class Loss(NamedTuple):
    """The loss of one call, mean over micro-batches and replicas, and what travels with it."""

    call: int
    mean: float = 0.0
    additional: tuple[tuple[str, float], ...] | None = None
    """The model's additional losses by name, None if it has none."""
    rows: tuple[Row, ...] = ()
    """What the stages measured in the call before."""
    update: Update = Update()
    """Of all stages in the call before."""


class Losses:
    """What one stage knows of them.

    Args:
        links: what they travel over.
    """

    def __init__(self, links: Links) -> None:
        self._links = links
        self._oldest = 0
        self.newest = Loss(call=-1)
        """The last one learned."""

    def tell(self, loss: Loss, known: int) -> None:
        """On the last stage: to every stage, itself included, which will ask for that of `known` in the same call."""
        at_once = loss.call <= self._wanted(known)
        self._links.tell_loss(at_once, **{**loss._asdict(), "update": tuple(loss.update)})

    def note(self, loss: Loss) -> None:
        """Every stage knows this one already."""
        self.newest = loss

    def learn(self, call: int) -> list[Loss]:
        """Those up to that of `call` which are new here, each once; waits for what has not arrived."""
        new = []
        while self.newest.call < self._wanted(call):
            told = self._links.next_loss()
            self.newest = Loss(**{**told, "update": Update(*told["update"])})
            new.append(self.newest)
        return new

    def known(self) -> dict[str, Any] | None:
        """The newest one for a checkpoint; None if there is none."""
        return {"mean": self.newest.mean, "additional": self.newest.additional} if self._knows() else None

    def restart(self, call: int, known: dict[str, Any] | None) -> None:
        """Training goes on from a checkpoint with number `call`: what was learned belongs to other weights.

        Args:
            call: the next call.
            known: the loss of the call before, from the checkpoint. Without it `call` waits for its own loss.
        """
        self.newest = Loss(call - 1, **(known or {}))
        self._oldest = call - 1 if known else call

    def _wanted(self, call: int) -> int:
        return max(call, self._oldest)

    def _knows(self) -> bool:
        return self.newest.call >= self._oldest
