"""The cost of each layer: its forward and backward time and its memory, measured on one micro-batch.

Modules are copied, specs are built, and freed again before the next layer, so no more than a layer or two is alive at
once and the model itself never runs::

    layer 0    build or copy -> forward, backward, ... -> free     its output, cut off from the graph,
    layer 1                     build or copy -> ...               is the input of the next
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ds_ddg.analysis.balance import LayerCost
from ds_ddg.profiling.isolation import cut, fresh, gradients_put_back, leaves, tensors, unchanged_random

__all__ = ["profile"]

_Forward = Callable[[Any], Any]


def profile(
    layers: Iterable[Any],
    sample: Any,
    loss_fn: Any = None,
    *,
    device: Any = None,
    repetitions: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> list[LayerCost]:
    """Measure every layer in training mode on one micro-batch.

    Modules are copied and specs are built on the device, one at a time, so the model, its gradients, its buffers and
    the random numbers stay as they are. Only what a plain function takes from outside cannot be copied: gradients are
    put back there, buffers that it writes to are not. Inside ``torch.autocast`` the layers run as there.

    Args:
        layers: as for a ``PipelineModule``: specs, tied specs, modules, functions.
        sample: a micro-batch ``(inputs, labels)``; `labels` go to `loss_fn` alone.
        loss_fn: counts for the last layer.
        device: the device to run on; default: DeepSpeed's accelerator.
        repetitions: timed runs of each layer, after two that are not; the median counts.
        clock: seconds.

    Returns:
        The costs in order, for `balance`.

    Raises:
        ValueError: there are no layers, one of them is no layer, or the sample is no pair.
        RuntimeError: a layer cannot be copied or fails on the sample.
    """
    if not isinstance(sample, (tuple, list)) or len(sample) != 2:
        raise ValueError(
            "sample must be one micro-batch (inputs, labels) as train_batch takes from its iterator, "
            f"got {_describe(sample)}; without a loss function, (inputs, None) will do"
        )
    if repetitions < 1:
        raise ValueError(f"repetitions must be 1 or more, got {repetitions}")
    meter = _Meter(torch.device(device or get_accelerator().current_device_name()), repetitions, clock)
    values, labels = (meter.place(part) for part in sample)
    costs: list[LayerCost] = []
    with unchanged_random(meter.device), torch.enable_grad():
        for index, layer in enumerate(layers):
            cost, values = meter.measure(f"layer {index}", layer, values)
            costs.append(cost)
        if not costs:
            raise ValueError("there are no layers to profile; pass those of the PipelineModule")
        if loss_fn is not None:
            loss, _ = meter.measure("loss_fn", loss_fn, values, labels)
            costs[-1] = _with_loss(costs[-1], loss)
    return costs


@dataclass(frozen=True)
class _Meter:
    """Runs layers and reads the clock."""

    device: torch.device
    repetitions: int
    clock: Callable[[], float]

    def place(self, values: Any) -> Any:
        return tree_map_only(Tensor, lambda tensor: tensor.to(self.device), values)

    def measure(self, where: str, layer: Any, values: Any, *more: Any) -> tuple[LayerCost, Any]:
        """Return the cost of ``layer(values, *more)``, and its output cut off from the graph."""
        where = f"{where} ({_name(layer)})"
        call, module = self._own(where, layer)

        def forward(inputs: Any) -> Any:
            return call(inputs, *more)

        try:
            kept, output = _memory(forward, module, values)
            runs = [self._run(forward, values) for _ in range(1 + self.repetitions)][1:]
        except Exception as error:
            raise RuntimeError(
                f"{where} failed on {_describe(values)}: {error}; "
                "the sample must be one micro-batch that the model can train on"
            ) from error
        forward_s, backward_s = (statistics.median(times) for times in zip(*runs, strict=True))
        parameters = [] if module is None else list(module.parameters())
        cost = LayerCost(
            _name(layer),
            forward_ms=round(1e3 * forward_s, 6),
            backward_ms=round(1e3 * backward_s, 6),
            parameter_bytes=_num_bytes(parameters),
            activation_bytes=kept,
            output_bytes=_num_bytes(tensors(output)),
        )
        return cost, output

    def _own(self, where: str, layer: Any) -> tuple[Callable[..., Any], nn.Module | None]:
        """Return a function that runs in place of `layer`, and its module, built or copied: a run leaves traces."""
        if isinstance(layer, LayerSpec):
            module = layer.build()
        elif callable(layer):
            module = _copied(where, layer)
        else:
            raise ValueError(f"{where} must be a LayerSpec, a module or a function, got {layer!r}")
        if not isinstance(module, nn.Module):
            return module, None
        module = module.to(self.device).train()
        use = layer.forward_fn if isinstance(layer, TiedLayerSpec) else None
        return (module if use is None else partial(use, module)), module

    def _run(self, forward: _Forward, values: Any) -> tuple[float, float]:
        """Return the seconds of one forward and one backward."""
        inputs = fresh(values)
        forward_s, output = self._timed(lambda: forward(inputs))
        roots = [tensor for tensor in tensors(output) if tensor.requires_grad]
        if not roots:
            return forward_s, 0.0
        gradients = [torch.ones_like(root) for root in roots]
        with gradients_put_back(leaves(roots)):
            backward_s, _ = self._timed(lambda: torch.autograd.backward(roots, gradients))
        return forward_s, backward_s

    def _timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        get_accelerator().synchronize(self.device.index)
        start = self.clock()
        result = work()
        get_accelerator().synchronize(self.device.index)
        return self.clock() - start, result


def _copied(where: str, layer: Any) -> Any:
    try:
        return copy.deepcopy(layer)
    except Exception as error:
        raise RuntimeError(
            f"{where} cannot be copied, and profiling must not change the original: {error}; "
            "pass it as a LayerSpec, which is built anew"
        ) from error


def _memory(forward: _Forward, module: nn.Module | None, values: Any) -> tuple[int, Any]:
    """Return the bytes that a forward leaves for its backward, and the output cut off from the graph."""
    inputs = fresh(values)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.update(_storages([tensor]))
        return tensor.detach()  # autograd would keep a cycle alive if it got the tensor itself

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward(inputs)
    kept.update(_storages(tensors(output)))
    state = [] if module is None else [*module.parameters(), *module.buffers()]
    elsewhere = _storages([*state, *leaves(tensors(output)), *tensors(inputs)])
    left = sum(size for address, size in kept.items() if address not in elsewhere)
    return left, tree_map_only(Tensor, cut, output)


def _with_loss(last: LayerCost, loss: LayerCost) -> LayerCost:
    return replace(
        last,
        name=f"{last.name} + {loss.name}",
        forward_ms=last.forward_ms + loss.forward_ms,
        backward_ms=last.backward_ms + loss.backward_ms,
        parameter_bytes=last.parameter_bytes + loss.parameter_bytes,
        activation_bytes=last.activation_bytes + loss.activation_bytes,
    )


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return bytes by address, so that views of one storage count once."""
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _name(layer: Any) -> str:
    kind = layer.typename if isinstance(layer, LayerSpec) else layer
    return str(getattr(kind, "__name__", type(kind).__name__))


def _describe(values: Any) -> str:
    def one(leaf: Any) -> str:
        return f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else repr(leaf)

    return ", ".join(one(leaf) for leaf in tree_leaves(values)) or "nothing"
