"""If one stage fails, all of them stop, and each says why."""

from __future__ import annotations

import functools
import gc
import multiprocessing.util
import os
import sys
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from deepspeed.utils import logger

from ds_ddg.execute import Executor
from ds_ddg.links import Links
from ds_ddg.wire import NOTICED_WITHIN, Peer, StageError, timed_out

__all__ = ["KnownToAllError", "OutOfDataError", "Together", "stay_until_the_others_leave", "together", "with_its_data"]

_Method = TypeVar("_Method", bound=Callable[..., Any])


class OutOfDataError(Exception):
    """There is no data for another call, and every stage knows; users get a StopIteration."""


class KnownToAllError(Exception):
    """What every rank raises in the same call, so that all of them can go on; users get its argument."""


def with_its_data(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run DeepSpeed's part of a call, whose data is fetched at once: a StopIteration is somebody's mistake."""
    try:
        return method(*args, **kwargs)
    except StopIteration as error:
        raise RuntimeError("StopIteration raised inside a layer or loss_fn") from error


def together(method: _Method) -> _Method:
    """If this stage fails, tell the others before raising, so that no rank is left waiting."""

    @functools.wraps(method)
    def run(self: Together, *args: Any, **kwargs: Any) -> Any:
        if self._failure is not None:
            raise StageError(self._failure)
        try:
            return method(self, *args, **kwargs)
        except OutOfDataError:
            raise StopIteration from None
        except KnownToAllError as known:
            raise known.args[0] from known.__cause__
        except Exception as error:
            cause = self._understood(error)
            if self._failure is None:  # a call within a call has told already
                self._fail(cause)
            if cause is error:
                raise
            raise cause from error

    return run  # type: ignore[return-value]


# A forked child (a DataLoader's worker) has the connections of its parent. Were it to free an engine that the parent
# has dropped, gloo would take back receives that are pending there, over the parent's own sockets.
os.register_at_fork(after_in_child=gc.freeze)

_open: list[Links] = []
"""Of every engine of this process, as what they have sent must live on if an engine is dropped before the end."""


def stay_until_the_others_leave(links: Links) -> None:
    """Keep `links` until the process ends, and the process until the other stages have no more use for it."""
    # Those whose process groups have been destroyed can send and receive nothing any more.
    _open[:] = [*(other for other in _open if other.usable), links]
    # atexit alone would miss the processes of torch.multiprocessing.
    multiprocessing.util.Finalize(None, _farewell, (weakref.ref(links),), exitpriority=10)


def _farewell(reference: weakref.ref[Links]) -> None:
    """At exit: leave together, except after an error, when the launcher must hear of it at once."""
    links = reference()
    if links is not None:
        failed = getattr(sys, "last_value", None) is not None
        links.farewell(timedelta(seconds=5 if failed else 300))


class Together(Executor):
    """Mixed into a ``PipelineEngine``: what `together` needs."""

    _calls: int

    _failure: str | None = None

    def _understood(self, error: Exception) -> Exception:
        """`error`, or what it means to users."""
        if isinstance(error, StageError) or "gloo/transport" not in str(error):
            return error
        reason = str(error).splitlines()[0].partition(". This is typically")[0]
        gone = [] if timed_out(reason) else self._gone()
        try:
            self._links.raise_last_words(gone)
            if not gone and self.schedule == "1f1b":
                # Nobody has read it there; with nothing to read the channels are of no use afterwards (gloo).
                self._links.raise_last_words()
        except StageError as said:
            return said
        if gone:
            fate = f"{' and '.join(peer.name for peer in gone)} {'is' if len(gone) == 1 else 'are'} lost"
        else:
            happened = "did not answer" if timed_out(reason) else "is lost, or gave up waiting"
            fate = f"another rank {happened}; it is not known which"
        return StageError(f"{fate}: rank {self.global_rank} waited for others in call {self._calls} ({reason})")

    def _gone(self) -> list[Peer]:
        """Whom a broken connection can mean; the groups of a process don't notice it at the same moment."""
        deadline = time.monotonic() + NOTICED_WITHIN
        while not (gone := self._links.everyone.gone()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return gone

    def _fail(self, error: Exception) -> None:
        here = f"stage {self.stage_id} (rank {self.global_rank}) failed in call {self._calls}"
        self._failure = str(error) if isinstance(error, StageError) else f"{here}: {type(error).__name__}: {error}"
        # Logged at once: a launcher that has seen another rank die ends this one within a second.
        logger.error(f"rank {self.global_rank}: {self._failure}")
        self._links.keep_if_lost(self, error)
        self._links.tell_failure(self._failure)
