"""Three ways to put the delayed engine in the place of DeepSpeed's ``PipelineEngine``; none leaves a trace.

initialize(...)      instead of ``deepspeed.initialize``: one line of a script changes
with swap(): ...     around code that calls ``deepspeed.initialize`` itself (``ds_ddg.run`` does it for a script)
ddg_engine(Base)     on top of a project's own ``PipelineEngine`` subclass
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule

try:
    from ds_ddg.engine import DDGEngine, DDGMixin
except ImportError as error:
    raise RuntimeError(f"ds_ddg needs deepspeed 0.19.8, not {deepspeed.__version__}: {error}") from error

__all__ = ["ddg_engine", "initialize", "swap"]

_SEAMS = {
    PipelineEngine: (
        "_INSTRUCTION_MAP",
        "_aggregate_total_loss",
        "_commit_decoupled_checkpoint",
        "_configure_optimizer",
        "_exec_backward_pass",
        "_exec_forward_pass",
        "_exec_optimizer_step",
        "_exec_reduce_tied_grads",
        "_exec_schedule",
        "_get_ckpt_name",
        "_get_zero_ckpt_name",
        "_next_batch",
        "_reduce_non_expert_gradients",
        "_take_model_step",
        "_train_schedule",
        "clip_fp32_gradients",
        "reset_activation_shape",
    ),
    PipelineModule: ("_synchronize_tied_weights", "ckpt_layer_path", "ckpt_layer_path_list"),
    deepspeed: ("PipelineEngine",),
    deepspeed.comm: ("barrier",),
    torch.autograd.grad_mode: ("_unsafe_preserve_version_counter",),
}


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """Set up delayed training of a ``PipelineModule``; ``deepspeed.initialize``'s arguments and 4-tuple.

    Args:
        *args: as for ``deepspeed.initialize``.
        **kwargs: as for ``deepspeed.initialize``; the config may hold a ``"ddg"`` block (see ``DDGConfig``).

    Returns:
        ``(engine, optimizer, dataloader, lr_scheduler)``; `engine` is a ``DDGEngine``.

    Raises:
        TypeError: the model is not a ``PipelineModule``.
        ValueError: the ``"ddg"`` block is wrong, or the set-up cannot be trained exactly.
        RuntimeError: this DeepSpeed lacks something that the engine is built on.
    """
    model = kwargs.get("model", args[1] if len(args) > 1 else None)
    if not isinstance(model, PipelineModule):
        raise TypeError(
            f"ds_ddg trains pipelines: model must be a deepspeed.pipe.PipelineModule, got {type(model).__name__}; "
            "wrap its layers in PipelineModule(layers=[...], num_stages=K, loss_fn=...)"
        )
    with swap():
        engine, optimizer, loader, scheduler = deepspeed.initialize(*args, **kwargs)
    return engine, optimizer, loader, scheduler


@contextmanager
def swap(engine_class: type = DDGEngine) -> Iterator[None]:
    """Inside this block ``deepspeed.initialize`` makes `engine_class` of a ``PipelineModule``.

    It looks ``PipelineEngine`` up in its module when it is called; the name is restored, even on error.

    Raises:
        RuntimeError: this DeepSpeed lacks something that the engine is built on.
    """
    _check_seams()
    saved = deepspeed.PipelineEngine
    deepspeed.PipelineEngine = engine_class
    try:
        yield
    finally:
        deepspeed.PipelineEngine = saved


def ddg_engine(base: type) -> type:
    """The delayed schedule on top of `base`, a project's own ``PipelineEngine`` subclass.

    Its additions to the instruction map are kept: the map is built when an engine is constructed.

    Raises:
        TypeError: `base` is not a ``PipelineEngine``, or has the schedule already.
    """
    if not issubclass(base, PipelineEngine) or issubclass(base, DDGMixin):
        raise TypeError(f"ddg_engine needs a subclass of deepspeed's PipelineEngine without DDG, got {base.__name__}")
    return type(f"DDG{base.__name__}", (DDGMixin, base), {"__module__": base.__module__})


def _check_seams() -> None:
    missing = [
        f"{owner.__name__}.{name}" for owner, names in _SEAMS.items() for name in names if not hasattr(owner, name)
    ]
    if missing:
        raise RuntimeError(
            f"ds_ddg is built on parts of DeepSpeed and torch that deepspeed {deepspeed.__version__} with torch "
            f"{torch.__version__} does not have: {', '.join(missing)}; install deepspeed 0.19.8"
        )
