"""What layers and loss functions may return: what can travel, and what a backward can start from."""

from __future__ import annotations

from typing import Any

import torch

from ds_ddg.links import as_tuple

__all__ = ["refuse_activation", "refuse_loss", "with_own_memory"]


def refuse_activation(outputs: Any, stage_id: int) -> None:
    """Raise TypeError for what cannot go to the next stage."""
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    if not all(torch.is_tensor(t) and _is_dense(t) for t in tensors):
        raise TypeError(
            f"the last layer of stage {stage_id} returned {_described(outputs)}; "
            "what goes to the next stage must be a tensor or a tuple of tensors, all of them dense"
        )


def refuse_loss(loss: Any, of_layer: bool, error: Exception | None = None) -> None:
    """Raise TypeError, because of `error`, for what is no loss.

    Args:
        loss: what training is to start from.
        of_layer: it is what the last layer returned, in a model without a loss_fn.
        error: what came of it, if it was taken for one.
    """
    if torch.is_tensor(loss) and loss.numel() == 1:
        return
    whose = "the last layer, whose output is the loss as there is no loss_fn," if of_layer else "loss_fn"
    got = f"a tensor of shape {tuple(loss.shape)}" if torch.is_tensor(loss) else _described(loss)
    raise TypeError(f"{whose} returned {got}; it must be a tensor of one number, such as a mean") from error


def with_own_memory(outputs: Any, module: torch.nn.Module) -> Any:
    """Copies of outputs that are a weight or a buffer: those change while a message is still on its way."""
    # Results of an operation have memory of their own, unless they are views.
    if not any(t.is_leaf or t._base is not None for t in as_tuple(outputs)):
        return outputs
    state = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())} - {0}
    own = [t.clone() if t.untyped_storage().data_ptr() in state else t for t in as_tuple(outputs)]
    return tuple(own) if isinstance(outputs, tuple) else own[0]


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def _described(value: Any) -> str:
    """What `value` is, for an error message."""
    if isinstance(value, tuple):
        odd = [index for index, entry in enumerate(value) if not (torch.is_tensor(entry) and _is_dense(entry))]
        return f"a tuple whose entry {odd[0]} is {_described(value[odd[0]])}" if odd else f"a tuple of {len(value)}"
    if torch.is_tensor(value):
        return "a nested tensor" if value.is_nested else f"a tensor of layout {value.layout}"
    return "None" if value is None else f"a {type(value).__name__}"
