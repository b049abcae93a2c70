"""Calls that succeed on all ranks or on none, and that wait for all of them anyway: saving and loading.

DeepSpeed has barriers there, in which a rank cannot hear that another has failed. Exchanges replace them: at each one
every rank says whether all is well, and a rank that has failed says so at its next exchange and leaves. So all ranks
hear of it in the same exchange of the same call, and can go on together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ds_ddg.comm.failures import FailureGuard, KnownToAllError
from ds_ddg.comm.message import fit
from ds_ddg.comm.p2p import StageError
from ds_ddg.comm.stage_links import Links
from ds_ddg.host import barrier_replaced
from ds_ddg.stage import RunState, Stage

__all__ = ["Agreement"]


class Agreement:
    """Makes a call succeed on all ranks or fail on all.

    Args:
        stage: this stage.
        run: the place of the stage in its run.
        links: the links of the stage to all ranks.
        failures: knows whether this stage has failed for good.
    """

    def __init__(self, stage: Stage, run: RunState, links: Links, failures: FailureGuard) -> None:
        self._stage, self._run, self._links, self._failures = stage, run, links, failures

    def begin(self, what: str) -> None:
        """Begin `what` on every stage of the pipeline, or raise if another stage is doing something else."""
        self._run.begin()
        self._links.begin((what, self._run.call, self._run.micro_batches), ready=True, with_data=False)
        self._links.meet()  # in an exchange no stage could hear it

    @contextmanager
    def all_or_none(self, what: str, consequence: str = "") -> Iterator[None]:
        """Inside this block a failure of one rank makes all ranks fail, and users get the reason on each.

        Args:
            what: the call, as users know it.
            consequence: the state of all ranks after a failure, in words; if empty, a rank raises its own error.
        """
        try:
            with barrier_replaced(lambda: self.meet(what, consequence)):
                yield
            self.meet(what, consequence)
        except KnownToAllError:
            raise
        except Exception as error:
            self._leave(error, what, consequence)

    def meet(self, what: str, consequence: str = "", **told: Any) -> list[dict[str, Any]]:
        """Wait for all ranks, and return what the others tell.

        Args:
            what: the call, as users know it.
            consequence: the state of all ranks after a failure, in words.
            **told: small plain values for the other ranks.

        Raises:
            StageError: a rank has failed for good, or the ranks are in different calls.
            KnownToAllError: a rank has failed in this call, and all can go on.
        """
        heard = self._links.all_ranks.exchange(what, call=self._run.call, **told)
        for other in heard:
            if other.get("fatal"):
                raise StageError(other["failure"])
        for other in heard:
            if "failure" in other:
                raise KnownToAllError(StageError(_and(other["failure"], consequence)))
        others = {(other["what"], other["call"]) for other in heard} - {(what, self._run.call)}
        if others:
            there = " and ".join(f"{name} of call {call}" for name, call in sorted(others))
            raise StageError(
                f"the ranks are out of step: rank {self._stage.rank} is in {what} of call {self._run.call}, others "
                f"are in {there}; make the same calls in the same order on every rank"
            )
        return heard

    def agree_on(self, what: str, name: str, value: Any) -> None:
        """Wait for all ranks; each raises ValueError if their values of `name` differ.

        Args:
            what: the call, as users know it.
            name: name of the value, for errors.
            value: the value of this rank.
        """
        by_rank = {str(value): [self._stage.rank]}
        for other in self.meet(what, value=value, rank=self._stage.rank):
            by_rank.setdefault(str(other["value"]), []).append(other["rank"])
        if len(by_rank) > 1:
            listed = ", ".join(f"{value!r} on ranks {sorted(ranks)}" for value, ranks in sorted(by_rank.items()))
            raise KnownToAllError(ValueError(f"{what} needs the same {name} on every rank, got {listed}"))

    def _leave(self, error: Exception, what: str, consequence: str) -> None:
        """Tell all ranks, which would wait for this one, that it has failed, and raise."""
        here = f"{self._stage.name} failed in {what}: {type(error).__name__}: {error}"
        if self._failures.failure is not None or isinstance(error, StageError) or "gloo/transport" in str(error):
            self._links.all_ranks.tell(what=what, fatal=True, failure=fit(self._failures.failure or here))
            raise error
        heard = self._links.all_ranks.exchange(what, call=self._run.call, failure=fit(here))
        for other in heard:
            if other.get("fatal"):
                raise StageError(other["failure"]) from error
        raise KnownToAllError(StageError(_and(here, consequence)) if consequence else error) from error


def _and(failure: str, consequence: str) -> str:
    return f"{failure}; {consequence}" if consequence else failure
