"""The schedule is put on DeepSpeed's ``PipelineEngine``, or on a project's own class that derives from it.

The classes of an engine, in the order in which Python looks for a method:

    DDGEngine         what the schedule does differently; it calls what is below wherever it can
    the project's     takes effect where it is called from above, or by DeepSpeed; else refused by name
    Beneath           where DeepSpeed's own part of a call begins and ends
    PipelineEngine

An instruction is carried out by whatever the project's ``_INSTRUCTION_MAP`` names for it, as DeepSpeed would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from deepspeed.runtime.pipe import schedule as instructions
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils import logger

__all__ = ["METHODS", "is_deepspeeds", "refuse_overrides", "warn_of_patches"]

_LOSS = "a loss reaches the other stages without a collective; work on what train_batch returns"
_PLACES = "the first stage has the inputs, the last one labels and loss"
_MESSAGES = "messages between stages are the schedule's own; convert tensors in a layer"
_REDUCING = "a stage without replicas skips it; override _exec_reduce_grads"

WITHOUT_EFFECT = {
    "_aggregate_total_loss": _LOSS,
    "_bcast_pipe_scalar": _LOSS,
    "_loss_stage_global_rank": _PLACES,
    "is_first_stage": _PLACES,
    "is_last_stage": _PLACES,
    "_next_batch": "the data of a call is fetched before it begins; use set_batch_fn, or wrap the iterator",
    "_train_schedule": "that is what is replaced; leave it out",
    "allreduce_gradients": _REDUCING,
    "_reduce_non_expert_gradients": _REDUCING,
    "clip_fp32_gradients": 'stages clip as "clip" says, without waiting for each other; clip in _take_model_step',
    "get_global_grad_norm": "the norm of the whole pipeline is that of an earlier call; give yours another name",
    "_exec_reduce_tied_grads": "a tied weight is updated by its owner alone, without a collective",
    "_exec_send_activations": _MESSAGES,
    "_exec_recv_activations": _MESSAGES,
    "_exec_send_grads": _MESSAGES,
    "_exec_recv_grads": _MESSAGES,
    "_send_tensor_meta": _MESSAGES,
    "_recv_tensor_meta": _MESSAGES,
    "_allocate_or_extend_buffers": _MESSAGES,
    "_allocate_buffer": _MESSAGES,
    "_allocate_zeros": _MESSAGES,
}
"""Methods of DeepSpeed's engine that the delayed one does not call, or not on every rank: why, and what to do."""

METHODS = {
    instructions.LoadMicroBatch: "_exec_load_micro_batch",
    instructions.ForwardPass: "_exec_forward_pass",
    instructions.BackwardPass: "_exec_backward_pass",
    instructions.ReduceGrads: "_exec_reduce_grads",
    instructions.OptimizerStep: "_exec_optimizer_step",
    instructions.ReduceTiedGrads: "_exec_reduce_tied_grads",
    instructions.SendActivation: "_exec_send_activations",
    instructions.RecvActivation: "_exec_recv_activations",
    instructions.SendGrad: "_exec_send_grads",
    instructions.RecvGrad: "_exec_recv_grads",
}
"""The methods of the instructions that the delayed engine carries out in its own way."""


def refuse_overrides(engine: type, ours: type) -> None:
    """Raise for methods that a project's class overrides and the delayed engine would not call on every rank.

    Args:
        engine: the class of an engine.
        ours: ``DDGEngine``.

    Raises:
        TypeError: one line for each, with what to do instead.
    """
    mro = engine.__mro__
    above, beneath = mro[: mro.index(ours)], mro[1 + mro.index(ours) : mro.index(PipelineEngine)]
    project = [cls for cls in beneath if cls.__module__ != ours.__module__]
    names = {name for name in (*vars(ours), *ours.__annotations__) if not name.startswith("__")}
    found = [*_overrides(project, names), *_mapped_beneath(project), *_mapped_above(engine, above, project)]
    if found:
        whose = project[0].__name__ if project else engine.__name__
        raise TypeError(f"the delayed schedule cannot be put on {whose}:\n" + "\n".join(f"- {line}" for line in found))


def warn_of_patches() -> None:
    """Log which methods of DeepSpeed's own class somebody has replaced to no effect."""
    for name, reason in WITHOUT_EFFECT.items():
        if not is_deepspeeds(getattr(PipelineEngine, name)):
            logger.warning(f"PipelineEngine.{name} has been replaced, and DDG does not call it: {reason}")


def _overrides(project: Sequence[type], ours: set[str]) -> Iterator[str]:
    for cls in project:
        for name in vars(cls):
            if name in WITHOUT_EFFECT:
                yield f"{cls.__name__}.{name} would be without effect: {WITHOUT_EFFECT[name]}"
            elif name in ours and not hasattr(PipelineEngine, name):
                yield f"{cls.__name__}.{name} would hide behind one of DDG's own of that name: rename it"


def _mapped_beneath(project: Sequence[type]) -> Iterator[str]:
    """Yield functions beneath that a map names for an instruction in place of DeepSpeed's method, to no effect."""
    owner = _with_map(project)
    for instruction, name in METHODS.items():
        run = owner._INSTRUCTION_MAP[instruction]
        # A method of that name has been found already.
        if name in WITHOUT_EFFECT and not is_deepspeeds(run) and not any(name in vars(cls) for cls in project):
            yield (
                f"{owner.__name__}._INSTRUCTION_MAP[{instruction.__name__}] would be without effect: "
                f"{WITHOUT_EFFECT[name]}"
            )


def _mapped_above(engine: type, above: Sequence[type], project: Sequence[type]) -> Iterator[str]:
    """Yield functions that the map of a class above the delayed engine names to no effect; its methods have one."""
    known = _with_map(project)._INSTRUCTION_MAP
    for cls in above:
        for instruction, run in vars(cls).get("_INSTRUCTION_MAP", {}).items():
            name = METHODS.get(instruction)
            if name and not is_deepspeeds(run) and run not in (getattr(engine, name), known.get(instruction)):
                yield (
                    f"{cls.__name__}._INSTRUCTION_MAP[{instruction.__name__}] would be without effect: "
                    f"override {name}, and call its super()"
                )


def _with_map(project: Sequence[type]) -> Any:
    """Return the class whose instruction map the engine beneath has."""
    return next((cls for cls in project if "_INSTRUCTION_MAP" in vars(cls)), PipelineEngine)


def is_deepspeeds(function: Any) -> bool:
    """Whether `function` was defined in DeepSpeed or torch, whatever name it has by now."""
    return str(getattr(function, "__globals__", {}).get("__name__", "")).startswith(("deepspeed.", "torch."))
