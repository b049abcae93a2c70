"""Three ways to put the delayed engine in the place of DeepSpeed's ``PipelineEngine``; none leaves a trace.

initialize(...)      instead of ``deepspeed.initialize``: one line of a script changes
with swap(): ...     around code that calls ``deepspeed.initialize`` itself (``ds_ddg.run`` does it for a script)
ddg_engine(Base)     on top of a project's own ``PipelineEngine`` subclass (what it may override: ``host.py``)

A project that has put its own class in the place of ``deepspeed.PipelineEngine``, or does so later, keeps it: the
first two put the schedule on top of that.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import deepspeed
import torch
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.utils import logger

try:
    from ds_ddg.comm.start import BACKEND, prepared_start
    from ds_ddg.engine.engine import Beneath, DDGEngine
    from ds_ddg.host import EngineHost, Host, replaced
except ImportError as error:
    raise RuntimeError(f"ds_ddg needs deepspeed 0.19.8, not {deepspeed.__version__}: {error}") from error

__all__ = ["ddg_engine", "initialize", "swap"]

_MORE_SEAMS = {
    PipelineEngine: ("_INSTRUCTION_MAP",),
    PipelineModule: ("_synchronize_tied_weights", "ckpt_layer_path", "ckpt_layer_path_list"),
    deepspeed: ("PipelineEngine", "set_optimizer_flags"),
    deepspeed.comm: ("barrier",),
    BACKEND: ("build_shm_op",),
    OpBuilder: ("jit_load",),
    torch.autograd.grad_mode: ("_unsafe_preserve_version_counter",),
}
"""Parts of DeepSpeed and torch that the engine needs besides methods that it overrides or that a `Host` lists."""


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
    if isinstance(model, DualPipeVModule):
        raise TypeError(
            "a DualPipeVModule has a schedule of its own, which deepspeed.initialize runs; "
            "for DDG make a PipelineModule of its layers"
        )
    with swap():
        engine, optimizer, loader, scheduler = deepspeed.initialize(*args, **kwargs)
    return engine, optimizer, loader, scheduler


@contextmanager
def swap(engine_class: type = DDGEngine) -> Iterator[None]:
    """Inside this block ``deepspeed.initialize`` makes `engine_class` of a ``PipelineModule``.

    DeepSpeed looks ``PipelineEngine`` up in its module when it is called; the name is restored, even on error. If a
    project's own class is there, or is put there inside the block, the schedule goes on top of that.

    Args:
        engine_class: the class of the engines, with the schedule or to get it on top, see `ddg_engine`.

    Raises:
        TypeError: a project's own class is there, and `engine_class` would drop it, or the schedule cannot be put on
            it.
        RuntimeError: this DeepSpeed lacks something that the engine is built on.
    """
    _check_seams()
    there, kind = deepspeed.PipelineEngine, deepspeed.__class__
    chosen = _chosen(engine_class, there)
    put: list[type] = []
    deepspeed.__class__ = _watched(put)
    vars(deepspeed)["PipelineEngine"] = chosen
    try:
        with ExitStack() as until_the_end:
            if kind is ModuleType:  # else a swap around this one does
                flags = _flags(deepspeed.set_optimizer_flags)
                until_the_end.enter_context(prepared_start())
                until_the_end.enter_context(_naming_others())
                until_the_end.enter_context(replaced(deepspeed, "set_optimizer_flags", flags))
            yield
    finally:
        deepspeed.__class__ = kind
        vars(deepspeed)["PipelineEngine"] = there
        if put:
            deepspeed.PipelineEngine = put[-1]


@functools.cache
def ddg_engine(base: type) -> type:
    """Return an engine class with the delayed schedule on top of `base`, a project's own ``PipelineEngine`` subclass.

    The overrides of `base` take effect, its additions to the instruction map among them: the map is built when an
    engine is constructed. Its ``train_batch`` need not call DeepSpeed's: a ``TrainSchedule`` that it executes gives
    way to the delayed one.

    Args:
        base: the project's class; ``PipelineEngine`` itself gives ``DDGEngine``.

    Returns:
        A subclass of ``DDGEngine`` and of `base`.

    Raises:
        TypeError: `base` is not a ``PipelineEngine``, or has the schedule already; or it overrides what would be
            without effect.
    """
    if not (isinstance(base, type) and issubclass(base, PipelineEngine)) or issubclass(base, DDGEngine):
        name = getattr(base, "__name__", repr(base))
        raise TypeError(f"ddg_engine needs a subclass of deepspeed's PipelineEngine without DDG, got {name}")
    if base is PipelineEngine:
        return DDGEngine
    return type(f"DDG{base.__name__}", (DDGEngine, base, Beneath), {"__module__": base.__module__})


def _chosen(wanted: type, there: type) -> type:
    """Return the engine's class in a swap for `wanted`, where DeepSpeed's module has the class `there`."""
    if wanted is DDGEngine:
        return _delayed(there)
    if not issubclass(there, DDGEngine) and not issubclass(wanted, there):
        raise TypeError(
            f"deepspeed.PipelineEngine is {there.__name__}, whose overrides {wanted.__name__} does not have; "
            f"pass ddg_engine({there.__name__}), or derive {wanted.__name__} from it"
        )
    return _delayed(wanted)


def _delayed(engine_class: type) -> type:
    """Return `engine_class` with the schedule on top, if it is not there already."""
    there = isinstance(engine_class, type) and issubclass(engine_class, DDGEngine)
    return engine_class if there else ddg_engine(engine_class)


def _watched(put: list[type]) -> type[ModuleType]:
    """Return a class for DeepSpeed's module that adds the schedule to each engine set there, and notes it in `put`."""

    class Swapped(ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "PipelineEngine":
                given, value = value, _delayed(value)
                put[:] = [] if given is value else [given]
            super().__setattr__(name, value)

    return Swapped


def _flags(by_names: Any) -> Any:
    """Return what marks parameters for Muon: `by_names` is DeepSpeed's, and an engine of ours goes by structure."""

    def mark(config: Any, model: Any) -> None:
        if not isinstance(model, PipelineModule) or isinstance(model, DualPipeVModule):
            by_names(config, model)

    return mark


@contextmanager
def _naming_others() -> Iterator[None]:
    """Inside this block a warning names each engine without the schedule, which scripts can build by themselves."""
    construct = PipelineEngine.__init__

    @functools.wraps(construct)
    def named(self: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self, DDGEngine):
            kind = type(self).__name__
            logger.warning(
                f"{kind} is built without the delayed schedule, as deepspeed.initialize does not make it of a "
                f"PipelineModule here; for DDG build ds_ddg.ddg_engine({kind}) in its place"
            )
        construct(self, *args, **kwargs)

    PipelineEngine.__init__ = named
    try:
        yield
    finally:
        PipelineEngine.__init__ = construct


def _seams() -> Iterator[tuple[Any, str]]:
    """Yield everything of DeepSpeed and torch that has to be there, by owner and name."""
    overridden = [name for name, method in vars(DDGEngine).items() if getattr(method, "__override__", False)]
    called = [name for name, method in vars(Host).items() if callable(method) and name not in vars(EngineHost)]
    yield from ((PipelineEngine, name) for name in (*overridden, *called) if not name.startswith("__"))
    for owner, names in _MORE_SEAMS.items():
        yield from ((owner, name) for name in names)


def _check_seams() -> None:
    missing = [f"{owner.__name__}.{name}" for owner, name in _seams() if not hasattr(owner, name)]
    if missing:
        raise RuntimeError(
            f"ds_ddg is built on parts of DeepSpeed and torch that deepspeed {deepspeed.__version__} with torch "
            f"{torch.__version__} does not have: {', '.join(missing)}; install deepspeed 0.19.8"
        )
