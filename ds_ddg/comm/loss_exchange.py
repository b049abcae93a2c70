"""The losses of past calls: the last stage tells each one, and every stage learns them in order when it asks."""

from __future__ import annotations

from typing import Any, NamedTuple

from ds_ddg.comm.stage_links import Links

__all__ = ["Loss", "Losses", "Row", "Update"]

Row = tuple[Any, ...]
"""The measurements of one stage: its number, then its values."""


class Update(NamedTuple):
    """The result of the updates of one call, on one stage or summed over several."""

    square: float = 0.0
    """The square of the norm of the gradients, before they were clipped."""
    skipped: int = 0
    """The number of stages that skipped their update because of an overflow."""

    def plus(self, other: Update) -> Update:
        """Return the sum of this update and that of other stages."""
        return Update(self.square + other.square, self.skipped + other.skipped)


class Loss(NamedTuple):
    """The loss of one call, mean over micro-batches and replicas, and what travels with it."""

    call: int
    mean: float = 0.0
    additional: tuple[tuple[str, float], ...] | None = None
    """The model's additional losses by name, None if it has none."""
    rows: tuple[Row, ...] = ()
    """The measurements of the stages in the call before."""
    update: Update = Update()
    """The result of the updates of all stages in the call before."""


class Losses:
    """The losses that one stage knows.

    Args:
        links: carries the losses.
    """

    def __init__(self, links: Links) -> None:
        self._links = links
        self._oldest = 0
        self.newest = Loss(call=-1)
        """The loss learned last."""

    def tell(self, loss: Loss, known: int) -> None:
        """Tell `loss` to every stage, this one included; the last stage does so.

        Args:
            loss: the loss of one call.
            known: the call whose loss every stage asks for in the call that runs now.
        """
        at_once = loss.call <= self._wanted(known)
        self._links.tell_loss(at_once, **{**loss._asdict(), "update": tuple(loss.update)})

    def note(self, loss: Loss) -> None:
        """Take over a `loss` that every stage knows already."""
        self.newest = loss

    def learn(self, call: int) -> list[Loss]:
        """Return the losses up to that of `call` that are new here; this waits for those that have not arrived."""
        new = []
        while self.newest.call < self._wanted(call):
            told = self._links.next_loss()
            self.newest = Loss(**{**told, "update": Update(*told["update"])})
            new.append(self.newest)
        return new

    def known(self) -> dict[str, Any] | None:
        """Return the newest loss, for a checkpoint; None if there is none."""
        return {"mean": self.newest.mean, "additional": self.newest.additional} if self._knows() else None

    def restart(self, call: int, known: dict[str, Any] | None) -> None:
        """Forget the losses learned, which belong to other weights: training goes on from a checkpoint.

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
