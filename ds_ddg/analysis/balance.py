"""The split of layers into stages whose slowest stage is as fast as it can be.

A pipeline runs at the pace of its slowest stage, so equal numbers of layers or parameters are a poor guide. Given what
each layer costs (``ds_ddg.partition`` measures it), `balance` finds the best split into contiguous stages.

Nothing here imports torch, so a saved profile is split again for another number of stages in milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate, pairwise
from math import inf
from os import PathLike
from pathlib import Path
from typing import Any

from ds_ddg.analysis.format import size, table

__all__ = ["Balance", "LayerCost", "balance", "load", "save"]


@dataclass(frozen=True)
class LayerCost:
    """The cost of one layer for one micro-batch; ValueError if a number is negative or not finite."""

    name: str
    forward_ms: float
    backward_ms: float
    parameter_bytes: int = 0
    """Size of the parameters; a tied layer counts at each of its uses."""
    activation_bytes: int = 0
    """Size of the output and of all that waits for the backward, but for the input, the output of another layer."""
    output_bytes: int = 0
    """Size of the message to the next stage, and of the gradient back, if a stage ends here."""

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if not 0 <= value < inf:
                raise ValueError(f"layer {self.name!r}: {field.name} must be finite and 0 or more, got {value!r}")

    @property
    def total_ms(self) -> float:
        """The time of a forward and a backward, in ms."""
        return self.forward_ms + self.backward_ms


@dataclass(frozen=True)
class Balance:
    """A split of layers into stages, with its predicted times; it prints as a table."""

    layers: tuple[LayerCost, ...]
    parts: tuple[int, ...]
    """The borders of the stages, as in ``PipelineModule.parts``: stage k has the layers parts[k] .. parts[k+1] - 1."""

    @property
    def stages(self) -> list[tuple[LayerCost, ...]]:
        """The layers of each stage."""
        return [self.layers[first:end] for first, end in pairwise(self.parts)]

    @property
    def stage_ms(self) -> list[float]:
        """Forward and backward time of each stage for one micro-batch."""
        return [sum(layer.total_ms for layer in stage) for stage in self.stages]

    @property
    def pace_ms(self) -> float:
        """Time per micro-batch of the slowest stage, which is that of the pipeline once it is full."""
        return max(self.stage_ms)

    @property
    def efficiency(self) -> float:
        """Mean over max of the stages' times: the share of their time that they could work if nobody ever waited."""
        return sum(self.stage_ms) / len(self.stages) / self.pace_ms if self.pace_ms else 1.0

    def record(self) -> dict[str, Any]:
        """Return the prediction as plain data, for programs."""
        return {
            "stages": len(self.stages),
            "parts": list(self.parts),
            "pace_ms": round(self.pace_ms, 6),
            "efficiency": round(self.efficiency, 6),
            "per_stage": [
                {
                    "stage": k,
                    "layers": [layer.name for layer in stage],
                    "forward_ms": round(sum(layer.forward_ms for layer in stage), 6),
                    "backward_ms": round(sum(layer.backward_ms for layer in stage), 6),
                    "parameter_bytes": sum(layer.parameter_bytes for layer in stage),
                    "memory_bytes": sum(_memory(layer) for layer in stage),
                    "share": round(time / self.pace_ms, 6) if self.pace_ms else 1.0,
                }
                for k, (stage, time) in enumerate(zip(self.stages, self.stage_ms, strict=True))
            ],
        }

    def __str__(self) -> str:
        rows = [
            {
                "stage": row["stage"],
                "layers": _span(first, row["layers"]),
                "forward ms": f"{row['forward_ms']:.3f}",
                "backward ms": f"{row['backward_ms']:.3f}",
                "parameters": size(row["parameter_bytes"]),
                "memory": size(row["memory_bytes"]),
                "share": f"{row['share']:.1%}",
            }
            for first, row in zip(self.parts, self.record()["per_stage"], strict=False)
        ]
        return "\n".join(
            [
                table(rows),
                "",
                f"pace: {self.pace_ms:.3f} ms per micro-batch; efficiency (mean / slowest): {self.efficiency:.1%}",
                "memory: parameters and the activations of one micro-batch; share: of the slowest stage's time",
            ]
        )


def balance(layers: Sequence[LayerCost], num_stages: int) -> Balance:
    """Split `layers` into `num_stages` contiguous stages so that the slowest stage takes the least time.

    Of splits that are equally fast, the one that sends the fewest bytes between stages, then the one whose largest
    stage needs the least memory, then the one with the earliest cuts: the answer depends on nothing but the costs.

    Args:
        layers: the costs of the layers, in order.
        num_stages: K; every stage gets a layer at least.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    if not 1 <= num_stages <= len(layers):
        raise ValueError(
            f"every stage needs a layer, and there must be a stage: {num_stages} stages for {len(layers)} layers; "
            f"use 1 to {max(1, len(layers))} stages, or write the model as more layers"
        )
    times = list(accumulate((layer.total_ms for layer in layers), initial=0.0))
    # What rounding makes of two equal sums must not decide between them.
    limit = _best_pace(times, num_stages) * (1 + 1e-9)
    return Balance(tuple(layers), _cheapest(layers, times, num_stages, limit))


def _best_pace(times: Sequence[float], num_stages: int) -> float:
    """Return the least time of the slowest stage; `times` are the sums over the first 0, 1, 2, ... layers."""
    end = len(times)
    # best[j]: the slowest of k stages that share the first j layers.
    best = [0.0] + [inf] * (end - 1)
    for k in range(1, num_stages + 1):
        before, best = best, [inf] * end
        for j in range(k, end):
            for i in reversed(range(k - 1, j)):
                last = times[j] - times[i]
                if last >= best[j]:
                    break  # a longer last stage is no faster
                best[j] = min(best[j], max(before[i], last))
    return best[-1]


def _cheapest(layers: Sequence[LayerCost], times: Sequence[float], num_stages: int, limit: float) -> tuple[int, ...]:
    """Return the split with the least traffic, then the least memory, among those with no stage above `limit`."""
    memory = list(accumulate((_memory(layer) for layer in layers), initial=0))
    traffic = [0, *(layer.output_bytes for layer in layers)]
    # rows[k][j]: (traffic, largest memory, start of the last stage) of k stages that share the first j layers.
    rows: list[dict[int, tuple[int, int, int]]] = [{0: (0, 0, 0)}]
    for k in range(1, num_stages + 1):
        row = {}
        for j in range(k, len(times)):
            choices = []
            for i in reversed(range(k - 1, j)):
                if times[j] - times[i] > limit:
                    break
                if i in rows[-1]:
                    sent, largest, _ = rows[-1][i]
                    choices.append((sent + traffic[i] * (i > 0), max(largest, memory[j] - memory[i]), i))
            if choices:
                row[j] = min(choices)
        rows.append(row)
    parts = [len(layers)]
    for row in reversed(rows[1:]):
        parts.append(row[parts[-1]][2])
    return tuple(reversed(parts))


def save(layers: Sequence[LayerCost], path: str | PathLike[str]) -> None:
    """Write costs as JSON, for `load`."""
    record = {"layers": [asdict(layer) for layer in layers]}
    Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load(path: str | PathLike[str]) -> list[LayerCost]:
    """Read what `save` has written.

    Raises:
        ValueError: the file holds something else, or a cost is out of range.
        OSError: the file cannot be read.
    """
    try:
        return [LayerCost(**entry) for entry in json.loads(Path(path).read_text(encoding="utf-8"))["layers"]]
    except (TypeError, KeyError, UnicodeDecodeError, json.JSONDecodeError) as error:
        keys = ", ".join(field.name for field in fields(LayerCost))
        raise ValueError(
            f'{path} is not a profile of layers, {{"layers": [{{...}}, ...]}} with the keys {keys}: {error!r}; '
            "write one with ds-ddg partition module.py:function --out"
        ) from error


def _memory(layer: LayerCost) -> int:
    return layer.parameter_bytes + layer.activation_bytes


def _span(first: int, names: Sequence[str]) -> str:
    last = f" .. {first + len(names) - 1} {names[-1]}" if len(names) > 1 else ""
    return f"{first} {names[0]}{last}"
