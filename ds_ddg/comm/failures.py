"""If one stage fails, all of them stop, and each says why."""

from __future__ import annotations

import multiprocessing.util
import sys
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from deepspeed.utils import logger

from ds_ddg.comm.lifetime import this_process
from ds_ddg.comm.p2p import NOTICED_WITHIN, Peer, StageError, timed_out
from ds_ddg.comm.stage_links import Links
from ds_ddg.stage import RunState, Stage

__all__ = ["FailureGuard", "KnownToAllError", "OutOfDataError", "guard_stop_iteration", "register_shutdown"]

_T = TypeVar("_T")


class OutOfDataError(Exception):
    """The data has ended before a call, and every stage knows; users get a StopIteration."""


class KnownToAllError(Exception):
    """An error that every rank raises in the same call, so that all can go on; users get its argument."""


def guard_stop_iteration(method: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
    """Run DeepSpeed's part of a call, whose data is fetched at once: a StopIteration is then a mistake in a layer."""
    try:
        return method(*args, **kwargs)
    except StopIteration as error:
        raise RuntimeError("StopIteration raised inside a layer or loss_fn") from error


def register_shutdown(links: Links) -> None:
    """Keep `links` until the process ends, and the process until the other stages have no more use for it."""
    this_process().keep(links)
    # atexit alone would miss the processes of torch.multiprocessing.
    multiprocessing.util.Finalize(None, _shut_down, (weakref.ref(links),), exitpriority=10)


def _shut_down(reference: weakref.ref[Links]) -> None:
    """Leave together at exit, except after an error, when the launcher must hear of it at once."""
    links = reference()
    if links is not None:
        failed = getattr(sys, "last_value", None) is not None
        links.shutdown(timedelta(seconds=5 if failed else 300))


class FailureGuard:
    """Runs what a script calls; if it fails on this stage, the others hear of it before it is raised.

    Args:
        stage: this stage.
        run: the place of the stage in its run.
        links: its links to the other stages.
        owner: the engine, which is never freed if its device has failed.
    """

    def __init__(self, stage: Stage, run: RunState, links: Links, owner: weakref.ref[Any]) -> None:
        self._stage, self._run, self._links, self._owner = stage, run, links, owner
        self.failure: str | None = None
        """The reason why this stage, or another one, has failed; None if all goes well."""

    def run(self, method: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Call `method`; if this stage fails, tell the others before raising, so that no rank is left waiting.

        Raises:
            StopIteration: the data ended, and every stage knows.
            StageError: another stage failed, left or was lost.
        """
        if self.failure is not None:
            raise StageError(self.failure)
        try:
            return method(*args, **kwargs)
        except OutOfDataError:
            raise StopIteration from None
        except KnownToAllError as known:
            raise known.args[0] from known.__cause__
        except Exception as error:
            cause = self._understood(error)
            if self.failure is None:  # a call within a call has told already
                self._fail(cause)
            if cause is error:
                raise
            raise cause from error

    def _understood(self, error: Exception) -> Exception:
        """Return the error that users get for `error`: itself, or what an error of gloo means."""
        if isinstance(error, StageError) or "gloo/transport" not in str(error):
            return error
        reason = str(error).splitlines()[0].partition(". This is typically")[0]
        gone = [] if timed_out(reason) else self._gone()
        try:
            self._links.raise_error_notice(gone)
            if not gone and not self._run.delayed:
                # Nobody has read it there; with nothing to read the channels are of no use afterwards (gloo).
                self._links.raise_error_notice()
        except StageError as said:
            return said
        if gone:
            fate = f"{' and '.join(peer.name for peer in gone)} {'is' if len(gone) == 1 else 'are'} lost"
        else:
            happened = "did not answer" if timed_out(reason) else "is lost, or gave up waiting"
            fate = f"another rank {happened}; it is not known which"
        return StageError(f"{fate}: rank {self._stage.rank} waited for others in call {self._run.call} ({reason})")

    def _gone(self) -> list[Peer]:
        """Return the peers that may be lost; groups of a process notice a broken connection one after the other."""
        deadline = time.monotonic() + NOTICED_WITHIN
        while not (gone := self._links.all_ranks.gone()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return gone

    def _fail(self, error: Exception) -> None:
        here = f"{self._stage.name} failed in call {self._run.call}"
        self.failure = str(error) if isinstance(error, StageError) else f"{here}: {type(error).__name__}: {error}"
        # Logged at once: a launcher that has seen another rank die ends this one within a second.
        logger.error(f"rank {self._stage.rank}: {self.failure}")
        self._links.keep_if_lost(self._owner(), error)
        self._links.tell_failure(self.failure)
