"""Costs of a model's stages in time and memory, as given or from measured layers. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from ds_ddg.analysis.balance import LayerCost, balance
from ds_ddg.analysis.memory import Backward
from ds_ddg.schedules.simulator import Cost

__all__ = ["Model"]


@dataclass(frozen=True)
class Model:
    """The costs of each stage; bytes are per stage, in order, or empty where they are not known.

    Optimizer states are the same under every schedule, so they are not counted.
    """

    cost: Cost
    weight_bytes: Sequence[float] = ()
    """Bytes of one version of a stage's weights; their gradients take as much."""
    activation_bytes: Sequence[float] = ()
    """Bytes that one micro-batch keeps on a stage until its backward, without its input."""
    input_bytes: float = 0.0
    """Bytes of the data of a micro-batch."""
    output_bytes: Sequence[float] = ()
    """Bytes that each stage sends on for a micro-batch; by default the same for all, as the cost says."""
    backward: Sequence[Backward] = ()
    """Bytes that a backward pass has alive; by default, as if every stage had many layers, all alike."""

    def __post_init__(self) -> None:
        for name in ("weight_bytes", "activation_bytes"):
            value = getattr(self, name)
            if not all(0 <= number < inf for number in value):
                raise ValueError(f"{name} must be finite and 0 or more, got {list(value)}")

    @classmethod
    def of_layers(
        cls, layers: Sequence[LayerCost], num_stages: int, update: float, link: float, bandwidth: float
    ) -> Model:
        """Build a model of measured layers in their best split; all times are in ms, `bandwidth` is in bytes per ms.

        A hop carries what the largest of the stages' outputs is.
        """
        split = balance(layers, num_stages)
        times = split.stage_ms
        mean = sum(times) / num_stages
        forward = sum(layer.forward_ms for layer in layers) / num_stages
        cost = Cost(
            forward,
            mean - forward,
            update,
            link=link,
            num_bytes=max((stage[-1].output_bytes for stage in split.stages[:-1]), default=0),
            bandwidth=bandwidth,
            scale=tuple(time / mean for time in times) if mean else (),
        )
        return cls.of_stages(split.stages, cost)

    @classmethod
    def of_stages(cls, stages: Sequence[Sequence[LayerCost]], cost: Cost, input_bytes: float = 0.0) -> Model:
        """Build a model of measured layers that the caller has split into `stages`; the rest is as in the class."""
        weights = tuple(float(sum(layer.parameter_bytes for layer in stage)) for stage in stages)
        activations = tuple(float(sum(layer.activation_bytes for layer in stage)) for stage in stages)
        outputs = tuple(float(stage[-1].output_bytes) for stage in stages)
        backward = tuple(map(Backward.of_layers, stages, (0.0, *outputs[:-1])))
        return cls(cost, weights, activations, input_bytes, outputs, backward)
