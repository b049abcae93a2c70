"""If one stage fails, all of them stop, and each says why."""

from __future__ import annotations

import functools
import gc
import multiprocessing.util
import os
import sys
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from deepspeed.utils import logger

from ds_ddg.execute import Executor
from ds_ddg.links import Links
from ds_ddg.wire import StageError

__all__ = ["OutOfDataError", "Together", "stay_until_the_others_leave", "together", "with_its_data"]

_Method = TypeVar("_Method", bound=Callable[..., Any])


class OutOfDataError(Exception):
    """There is no data for another call, and every stage knows; users get a StopIteration."""


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
        if self.schedule == "1f1b":
            # Nobody has read it there; with nothing to read the channels are of no use afterwards (gloo).
            try:
                self._links.raise_last_words()
            except StageError as said:
                return said
        place = self.grid.topology().get_axis_list("pipe", self.stage_id)
        others = [rank for rank in place if rank != self.global_rank]
        if self.schedule == "1f1b" and self.num_stages > 1:
            what = "another rank"  # DeepSpeed's own messages go to the neighbours as well
        elif self.grid.get_slice_parallel_world_size() == 1:
            what = f"a data-parallel replica of stage {self.stage_id} (one of ranks {others})"
        else:
            what = f"a replica or tensor slice of stage {self.stage_id} (one of ranks {others})"
        return StageError(
            f"{what} is lost: rank {self.global_rank} waited for it in call {self._calls} "
            f"({str(error).splitlines()[0]})"
        )

    def _fail(self, error: Exception) -> None:
        here = f"stage {self.stage_id} (rank {self.global_rank}) failed in call {self._calls}"
        self._failure = str(error) if isinstance(error, StageError) else f"{here}: {type(error).__name__}: {error}"
        # Logged at once: a launcher that has seen another rank die ends this one within a second.
        logger.error(f"rank {self.global_rank}: {self._failure}")
        self._links.keep_if_lost(self, error)
        self._links.tell_failure(self._failure)
