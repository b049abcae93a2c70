"""Checks what layers and loss functions return: it must be able to travel, and a backward to start from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from deepspeed.runtime.pipe.schedule import BackwardPass, SendActivation
from torch import Tensor

from ds_ddg.comm.stage_links import as_tuple

__all__ = ["FixedShape", "described", "refuse_activation", "refuse_loss", "with_checks", "with_own_memory"]


class FixedShape:
    """Holds what a stage sends to the shape of the first that it sent."""

    def __init__(self, stage_id: int) -> None:
        self._stage_id = stage_id
        self._spec: list[Any] | None = None

    def reset(self) -> None:
        """Allow the next activations another shape."""
        self._spec = None

    def check(self, tensors: tuple[Tensor, ...]) -> None:
        """Raise ValueError if `tensors` have another shape than those before."""
        spec = [(t.dtype, tuple(t.shape)) for t in tensors]
        if self._spec not in (None, spec):
            raise ValueError(
                f"the activations of stage {self._stage_id} changed from {self._spec} to {spec}; "
                "make every micro-batch the same shape (drop_last=True, padding), build the PipelineModule with "
                "dynamic_shape=True, or call engine.reset_activation_shape() on every rank before the shape changes"
            )
        self._spec = spec


def with_checks(
    instruction_map: Mapping[type, Callable[..., None]], fixed_shape: FixedShape
) -> dict[type, Callable[..., None]]:
    """Return DeepSpeed's own instructions with checks of what it would train wrongly, or fail on without a reason."""
    send, backward = instruction_map[SendActivation], instruction_map[BackwardPass]

    def send_checked(engine: Any, buffer_id: int) -> None:
        outputs = engine.pipe_buffers["outputs"][buffer_id]
        sent = outputs if isinstance(outputs, tuple) else (outputs,)
        # Evaluation and training share one receive buffer, which another shape would not fit or only fill in part.
        if not engine.dynamic_shape and all(map(torch.is_tensor, sent)):
            fixed_shape.check(sent)
        send(engine, buffer_id)

    def backward_checked(engine: Any, buffer_id: int) -> None:
        if engine.is_last_stage():
            refuse_loss(engine.loss, engine.module.loss_fn is None)
        backward(engine, buffer_id)

    return {**instruction_map, SendActivation: send_checked, BackwardPass: backward_checked}


def refuse_activation(outputs: Any, stage_id: int) -> None:
    """Raise TypeError for outputs that cannot go to the next stage."""
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    if not all(torch.is_tensor(t) and _is_dense(t) for t in tensors):
        raise TypeError(
            f"the last layer of stage {stage_id} returned {described(outputs)}; "
            "what goes to the next stage must be a tensor or a tuple of tensors, all of them dense"
        )


def refuse_loss(loss: Any, of_layer: bool, error: Exception | None = None) -> None:
    """Raise TypeError, because of `error`, for a value that is no loss.

    Args:
        loss: what a backward pass is to start from.
        of_layer: it is what the last layer returned, in a model without a loss_fn.
        error: what came of it, if it was taken for one.
    """
    whose = "the last layer, whose output is the loss as there is no loss_fn," if of_layer else "loss_fn"
    if torch.is_tensor(loss) and loss.numel() == 1:
        if loss.grad_fn is not None:
            return
        raise TypeError(
            f"{whose} returned a loss without a gradient, cut off from what the model put out; compute it without "
            "detach(), item(), no_grad() and rounding, from outputs of layers that are to be trained"
        ) from error
    got = described(loss)
    raise TypeError(f"{whose} returned {got}; it must be a tensor of one number, such as a mean") from error


def with_own_memory(outputs: Any, module: torch.nn.Module) -> Any:
    """Return `outputs` with copies of weights and buffers, which change while a message is still on its way."""
    # Results of an operation have memory of their own, unless they are views.
    if not any(t.is_leaf or t._base is not None for t in as_tuple(outputs)):
        return outputs
    state = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())} - {0}
    own = [t.clone() if t.untyped_storage().data_ptr() in state else t for t in as_tuple(outputs)]
    return tuple(own) if isinstance(outputs, tuple) else own[0]


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def described(value: Any) -> str:
    """Describe `value` for an error message: of a tuple or list, its first entry that is no dense tensor."""
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        odd = [index for index, entry in enumerate(value) if not (torch.is_tensor(entry) and _is_dense(entry))]
        if not odd:
            return f"a {kind} of {len(value)}"
        return f"a {kind} whose entry {odd[0]} is {described(value[odd[0]])}"
    if torch.is_tensor(value):
        if value.is_nested:
            return "a nested tensor"
        return f"a tensor of shape {tuple(value.shape)}" if _is_dense(value) else f"a tensor of layout {value.layout}"
    return "None" if value is None else f"a {type(value).__name__}"
