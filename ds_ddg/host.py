"""DeepSpeed's engine as our collaborators see it: the one place that says what they use of it.

``DDGEngine`` (``engine/engine.py``) holds every override of DeepSpeed's methods; whatever else we use of its engine is
listed here. ``entry.py`` compares both lists with the DeepSpeed that is installed.

What we replace in DeepSpeed's modules while an engine is at work stands here too; ``entry.py`` replaces the class.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed import accelerator, comm
from deepspeed.runtime.pipe import p2p
from torch import Tensor

__all__ = ["EngineHost", "Host", "barrier_replaced", "replaced", "without_greetings"]


class Host(Protocol):
    """The attributes and methods of a ``PipelineEngine`` that collaborators use, by DeepSpeed's names."""

    # Its parts
    module: Any
    device: torch.device
    grid: Any
    mpu: Any
    optimizer: Any
    lr_scheduler: Any
    monitor: Any
    timers: Any
    engine_timers: Any
    checkpoint_engine: Any
    param_names: dict[Any, str]
    seq_data_parallel_group: Any
    global_rank: int
    checkpoint_mp_rank: int
    has_moe_layers: bool
    is_data_parallel: bool
    is_model_parallel: bool
    is_pipe_parallel: bool
    is_pipe_partitioned: bool
    is_grad_partitioned: bool
    using_bf16_optimizer: bool
    dynamic_shape: bool
    batch_fn: Any

    # Its state
    micro_batches: int
    global_steps: int
    global_samples: int
    skipped_steps: int
    data_iterator: Any
    pipe_buffers: dict[str, list[Any]]
    num_pipe_buffers: int
    loss: Any
    total_loss: Any
    total_additional_losses: Any
    agg_train_loss: Any
    agg_additional_losses: Any
    grad_layer: Any
    _INSTRUCTION_MAP: Any
    _compute_loss: bool
    _global_grad_norm: Any
    _step_applied: bool

    # Its answers
    def bfloat16_enabled(self) -> bool: ...
    def fp16_enabled(self) -> bool: ...
    def zero_optimization(self) -> bool: ...
    def gradient_accumulation_steps(self) -> int: ...
    def gradient_clipping(self) -> float: ...
    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]: ...
    def load_universal_checkpoint(self) -> bool: ...
    def optimizer_name(self) -> str | None: ...
    def steps_per_print(self) -> int | None: ...
    def train_batch_size(self) -> int: ...
    def wall_clock_breakdown(self) -> bool: ...
    def _commit_decoupled_checkpoint(self) -> None: ...
    def _exec_schedule(self, pipe_schedule: Any) -> None: ...
    def _loss_stage_global_rank(self) -> int: ...
    def _get_ckpt_name(self, checkpoints_path: str, tag: str) -> str: ...
    def _get_expert_ckpt_name(
        self, checkpoints_path: str, layer_id: int, expert_id: int, tag: str, *, checkpoint_mp_rank: int
    ) -> str: ...
    def _get_optimizer_ckpt_name(self, checkpoints_path: str, tag: str, expp_rank: int) -> str: ...
    def _get_zero_ckpt_name(self, checkpoints_path: str, tag: str) -> str: ...
    def _reentrant_activation_checkpointing(self) -> bool: ...
    def reset_activation_shape(self) -> None: ...

    # Additions of `EngineHost`
    def carry_out(self, instruction: type, *args: Any) -> None:
        """Carry out a pipeline instruction as the engine beneath the delayed one would."""

    def choose_instructions(self) -> None:
        """Carry out instructions as the present schedule wants it."""

    def mean_loss(self) -> Tensor:
        """Return DeepSpeed's mean over micro-batches and replicas on the last stage, without its broadcast."""


class EngineHost:
    """The `Host` of a real engine, to which it passes on all that is not its own.

    It does not keep the engine alive, so that an engine that is dropped is freed at once.
    """

    _engine: Callable[[], Any]

    def __init__(self, engine: Any) -> None:
        object.__setattr__(self, "_engine", weakref.ref(engine))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._engine(), name, value)

    def carry_out(self, instruction: type, *args: Any) -> None:
        """See `Host`."""
        self._engine()._carry_out(instruction, *args)

    def choose_instructions(self) -> None:
        """See `Host`."""
        self._engine()._choose_instructions()

    def mean_loss(self) -> Any:
        """See `Host`."""
        engine = self._engine()
        pipe_parallel, engine.is_pipe_parallel = engine.is_pipe_parallel, False
        try:
            return engine._beneath_aggregate_total_loss()
        finally:
            engine.is_pipe_parallel = pipe_parallel


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside this block the attribute `name` of `owner`, an object or a module, is `value`."""
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def without_greetings() -> Iterator[None]:
    """Inside this block neighbours do not greet each other over gloo from a device.

    DeepSpeed's engine sends a zero from stage to stage when it is built. Gloo takes the address of a tensor on a
    device for an address of the host, and the connection breaks.
    """
    with ExitStack() as until_the_end:
        if accelerator.get_accelerator().device_name() != "cpu" and dist.get_backend() == "gloo":
            for name in ("send", "recv"):
                until_the_end.enter_context(replaced(p2p, name, lambda *_: None))
        yield


@contextmanager
def barrier_replaced(meet: Callable[[], Any]) -> Iterator[None]:
    """Inside this block DeepSpeed calls `meet` in place of its barrier of all ranks."""
    barrier = comm.barrier

    def meet_if_all(group: Any = None, *args: Any, **kwargs: Any) -> Any:
        return meet() if group is None else barrier(group, *args, **kwargs)

    with replaced(comm, "barrier", meet_if_all):
        yield
