"""``DDGEngine``: a ``PipelineEngine`` whose ``train_batch`` leaves its last micro-batches in flight.

A call never waits for the stages behind it: it ends when this stage has done its M ticks. What that changes for the
rest of the engine's life is here; how one instruction is carried out is in ``execute.py``; their order in ``plan.py``.

    train_batch   data for the whole call first, then the plan's operations, then the newest loss known without a wait
    drain         the backward passes in flight, an update whenever M have accumulated; nothing is retained
    eval_batch    between two calls, with buffers of its own; what is in flight stays there
    schedule      "ddg" or "1f1b", switched between calls, draining first

Calls count from 0 on every rank alike, and so do the learning rate and ``global_steps``, whatever is in flight.
"""

from __future__ import annotations

import functools
import math
import multiprocessing.util
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils import logger

from ds_ddg.config import DDGConfig, refuse_unsupported
from ds_ddg.data import Feed
from ds_ddg.execute import Executor
from ds_ddg.links import Links
from ds_ddg.message import Kind
from ds_ddg.plan import DDGPlan
from ds_ddg.schedule import DDGSchedule
from ds_ddg.wire import StageError

__all__ = ["DDGEngine", "DDGMixin"]

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _with_its_data(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run DeepSpeed's part of a call, whose data is here already: a StopIteration is a mistake in somebody's code."""
    try:
        return method(*args, **kwargs)
    except StopIteration as error:
        raise RuntimeError("StopIteration raised inside a layer or loss_fn") from error


def _together(method: _Method) -> _Method:
    """If this stage fails, tell the others before raising, so that no rank is left waiting."""

    @functools.wraps(method)
    def run(self: DDGMixin, *args: Any, **kwargs: Any) -> Any:
        if self._failure is not None:
            raise StageError(self._failure)
        try:
            return method(self, *args, **kwargs)
        except StopIteration:
            raise
        except Exception as error:
            cause = self._understood(error)
            if self._failure is None:  # a call within a call has told already
                self._fail(cause)
            if cause is error:
                raise
            raise cause from error

    return run  # type: ignore[return-value]


def _farewell(links: Links) -> None:
    """At exit: leave together, except after an error, when the launcher must hear of it at once."""
    failed = getattr(sys, "last_value", None) is not None
    links.farewell(timedelta(seconds=5 if failed else 300))


class DDGMixin(Executor):
    """The delayed schedule on top of any ``PipelineEngine``; see the module's docstring."""

    _failure: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.ddg = DDGConfig.parse(kwargs["config_class"]._param_dict.get("ddg"))
        if self.ddg.enabled:
            refuse_unsupported(kwargs["config_class"], kwargs["model"])
        self._schedule = "1f1b"
        super().__init__(*args, **kwargs)
        self._calls = 0
        self._filled_at = 0
        self._parked = True
        self._loss_call, self._loss_value = -1, 0.0
        self._new_versions()
        self.pipe_buffers.update(grads=[], rng=[])
        self._feed = Feed(
            first=self.is_first_stage(),
            last=self.is_last_stage(),
            replicas=self.mpu.get_data_parallel_group() if self.is_data_parallel else None,
            device=self.device,
        )
        self._links = Links(self.grid.topology().get_axis_comm_lists("pipe"), self.global_rank, self.plan)
        self._ddg_from = self.ddg.sync_steps if self.ddg.enabled else None
        if self._ddg_from == 0:
            self.schedule = "ddg"
        # Kept alive until then, as its messages are; atexit alone would miss the processes of torch.multiprocessing.
        multiprocessing.util.Finalize(None, _farewell, (self._links,), exitpriority=10)

    # -- life of a call ---------------------------------------------------------------------------------------------

    @_together
    def train_batch(self, data_iter: Iterator[Any] | None = None) -> torch.Tensor:
        """One call: M ticks and at most one update. DeepSpeed's signature and, but for its age, its result.

        Args:
            data_iter: yields micro-batches ``(inputs, labels)``; exactly M are pulled on the first and last stage.

        Returns:
            0-dim tensor, the same on every rank: the mean loss of call number ``loss_step``.

        Raises:
            StopIteration: on every rank, if the data ends inside this call; nothing of the call has been trained on.
            StageError: another stage failed, left or was lost.
        """
        if self._ddg_from is not None and self.global_steps >= self._ddg_from:
            self.schedule = "ddg"
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        self._begin("train_batch", self.data_iterator, self.micro_batches)
        return _with_its_data(super().train_batch)

    @_together
    def eval_batch(
        self,
        data_iter: Iterator[Any],
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """Evaluate the weights of the current call on all stages. DeepSpeed's signature and result.

        Raises:
            StopIteration: on every rank, if the data ends before `num_micro_batches` (default: M).
        """
        count = self.micro_batches if num_micro_batches is None else num_micro_batches
        self._begin("eval_batch", data_iter, count, labelled=compute_loss)
        self._links.meet()  # in DeepSpeed's own barrier no stage could hear that another failed
        with self._buffers_of_its_own():
            arguments = data_iter, return_logits, compute_loss, reduce_output, bcast_loss, count
            return _with_its_data(super().eval_batch, *arguments)

    @_together
    def drain(self) -> None:
        """Finish every backward pass in flight. Nothing is left in flight or retained; twice does nothing.

        Steps the optimizer whenever M gradients have accumulated and once for the rest, at the present learning rate.
        """
        if self._parked:
            return
        end = self._calls * self.micro_batches
        if self._schedule == "ddg" and end > self._filled_at:
            self.module.train()
            ops = self.plan.drain(self.stage_id, end, self._filled_at)
            with torch.enable_grad():  # it may be called from evaluation code
                self._exec_schedule(DDGSchedule(self.plan, self.stage_id, ops, draining=True))
            self._learn_loss(self._calls - 1)
        self._links.park()
        self._parked = True
        self._filled_at = end
        self.versions.assert_empty()

    @property
    def schedule(self) -> str:
        """``"ddg"`` or ``"1f1b"`` (DeepSpeed's own); assign between calls, on every rank, to switch."""
        return self._schedule

    @schedule.setter
    def schedule(self, name: str) -> None:
        if name not in ("ddg", "1f1b"):
            raise ValueError(f'schedule must be "ddg" or "1f1b", got {name!r}')
        self._ddg_from = None  # whoever assigns it decides from here on
        if name == self._schedule:
            return
        if name == "ddg" and not self.ddg.enabled:
            refuse_unsupported(self._config, self.module)
        self.drain()
        self._schedule = name
        self.__dict__.pop("_INSTRUCTION_MAP", None)  # the class's own, for DeepSpeed's schedule
        if name == "ddg":
            self._INSTRUCTION_MAP = self._ddg_instruction_map()
        self.pipe_buffers = {column: [None] * self.num_pipe_buffers for column in self.pipe_buffers}
        self.reset_activation_shape()

    @property
    def plan(self) -> DDGPlan:
        """The plan of the delayed schedule at the present number of micro-batches."""
        return DDGPlan(self.num_stages, self.micro_batches, self.ddg.slack)

    @property
    def loss_step(self) -> int:
        """The call (0-based, as ``global_steps`` counts them) that the loss last returned belongs to."""
        return self._loss_call + self.global_steps - self._calls

    # -- what DeepSpeed calls ---------------------------------------------------------------------------------------

    def destroy(self) -> None:
        """DeepSpeed's; the other stages learn that this one has left."""
        links = self.__dict__.get("_links")  # DeepSpeed also calls this for an engine whose construction failed
        if links is not None:
            links.leave()
        super().destroy()

    def _train_schedule(self) -> Any:
        if self._schedule == "1f1b":
            return super()._train_schedule()
        ops = self.plan.call(self.stage_id, self._calls, self._filled_at)
        return DDGSchedule(self.plan, self.stage_id, ops)

    def _next_batch(self) -> Any:
        return self._feed.take()

    def _aggregate_total_loss(self) -> torch.Tensor:
        call, self._calls = self._calls, self._calls + 1
        if self._schedule == "1f1b":
            loss = super()._aggregate_total_loss()
            self._loss_call, self._loss_value = call, float(loss)
            return loss
        if self.is_last_stage():
            self._links.tell_loss(call, self._mean_loss())
        delay = 0 if self.ddg.loss == "exact" else self.plan.staleness(0)
        self._learn_loss(max(call - delay, 0))
        return torch.tensor(self._loss_value, device=self.device)

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """DeepSpeed's, after a drain: another number of micro-batches per call is another plan."""
        self.drain()
        super().set_train_batch_size(train_batch_size)
        self._filled_at = self._calls * self.micro_batches

    def _bcast_pipe_scalar(self, data: Any, src_rank: int | None = None, dtype: torch.dtype = torch.float32) -> Any:
        """DeepSpeed's waits in a broadcast, where a stage could not hear that another failed."""
        if src_rank not in (None, self._loss_stage_global_rank()):
            return super()._bcast_pipe_scalar(data, src_rank, dtype)
        value = self._links.share(float(data) if self.is_last_stage() else 0.0)
        return torch.tensor(value, dtype=dtype, device=self.device)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's, after a drain: what is in flight belongs to no checkpoint."""
        self.drain()
        return super().save_checkpoint(*args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's, after a drain: gradients in flight belong to the weights that are given up."""
        self.drain()
        return super().load_checkpoint(*args, **kwargs)

    # -- between the stages -----------------------------------------------------------------------------------------

    def _begin(self, what: str, data_iter: Iterator[Any] | None, micro_batches: int, labelled: bool = True) -> None:
        """Fetch the data of a call, then start it on every stage, or stop on every stage."""
        self._parked = False
        self._feed.labels = labelled and self.module.loss_fn is not None
        self._feed.fixed_shape = self.num_stages > 1 and what == "train_batch" and not self.dynamic_shape
        ready = self._feed.fetch(data_iter, micro_batches, self.batch_fn)
        here = (what, self._calls, micro_batches)
        # Evaluation has a barrier before its first activation, and DeepSpeed's schedule sends its own.
        with_data = what == "train_batch" and self._schedule == "ddg"
        kind = self._links.begin(here, ready, with_data)
        if kind is Kind.END:
            self._feed.clear()
            raise StopIteration
        if not ready:
            raise RuntimeError(
                f"the data of the last stage ended in call {self._calls}, that of the first stage did not; "
                "give both the same number of micro-batches"
            )

    def _mean_loss(self) -> float:
        """Mean loss of this call over micro-batches and replicas, on the last stage."""
        if self.module.get_additional_losses() is not None:
            raise NotImplementedError("additional losses are not supported yet; add them up in loss_fn")
        loss = self._scale_loss_by_gas(self.total_loss).detach().clone()
        self.dp_group_loss = loss.clone()
        if self.is_data_parallel:
            dist.all_reduce(loss, group=self.mpu.get_data_parallel_group())
            loss /= self.dp_world_size
        value = float(loss)
        if not math.isfinite(value) and math.isfinite(self._loss_value):
            logger.error(f"stage {self.stage_id}: the loss of call {self._calls - 1} is {value}; training goes on")
        return value

    def _learn_loss(self, call: int) -> None:
        """Take the losses up to that of `call`; waits only if it has not arrived."""
        while self._loss_call < call:
            self._loss_call, self._loss_value = self._links.next_loss()

    def _understood(self, error: Exception) -> Exception:
        """`error`, or what it means to users."""
        if not isinstance(error, StageError) and "gloo/transport" in str(error):
            replicas = [rank for rank in self.grid.dp_group if rank != self.global_rank]
            return StageError(
                f"a data-parallel replica of stage {self.stage_id} (one of ranks {replicas}) is lost: rank "
                f"{self.global_rank} waited for it in call {self._calls} ({str(error).splitlines()[0]})"
            )
        return error

    def _fail(self, error: Exception) -> None:
        here = f"stage {self.stage_id} (rank {self.global_rank}) failed in call {self._calls}"
        self._failure = str(error) if isinstance(error, StageError) else f"{here}: {type(error).__name__}: {error}"
        # Logged at once: a launcher that has seen another rank die ends this one within a second.
        logger.error(f"rank {self.global_rank}: {self._failure}")
        self._links.tell_failure(self._failure)


class DDGEngine(DDGMixin, PipelineEngine):
    """DeepSpeed's pipeline engine with the delayed schedule; ``ds_ddg.initialize`` creates it."""
