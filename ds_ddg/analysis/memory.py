"""The memory that a stage needs at its fullest moment, counted from the plan.

In the steady state of DDG stage k goes through the same moments in every call: M backward passes and an update. At
each, something else is at its most:

    weights       at the backward of n - d_k all versions since that micro-batch's; one more after the update
    activations   those of d_k micro-batches wait; of the one at work they go, layer by layer
    gradients     of the weights: none before the first backward of a call, whose layers make them as the activations
                  go; all of them at the others
    messages      sent ones are held until the plan says that they must have been read (`Channels.expect`); the next
                  ones may come early, if they are large (`Receiver.take`)
    data          on the first stage, of the rest of the call

Not counted: optimizer states, what an update needs for itself, what a mixed-precision optimizer adds, and what the
backward of a single layer works with besides the gradients of its output and its input. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ds_ddg.analysis.balance import LayerCost
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.schedules.plan import Plan

__all__ = ["Backward", "Sizes", "fullest"]


class Backward(NamedTuple):
    """The bytes that a backward pass has alive at its peak, its micro-batch's activations included."""

    first: float
    """The peak of the first backward of a call, with the weight gradients that it makes."""
    later: float
    """The peak of every later backward, without the weight gradients, which are all there already."""

    @classmethod
    def of_equal_layers(cls, weights: float, activations: float, message: float) -> Backward:
        """Estimate the peak for many equal layers: as a layer's activations go, a gradient of its weights comes.

        Two gradients of activations are at work: of a layer's output, and of its input.
        """
        return cls(max(weights, activations) + 2 * message, activations + 2 * message)

    @classmethod
    def of_layers(cls, layers: Sequence[LayerCost], received: float) -> Backward:
        """Compute the peak for measured layers.

        Args:
            layers: the layers of one stage, in order.
            received: bytes of the gradient that the first layer makes of its input; 0 if it makes none.
        """
        first = later = 0.0
        kept, made = 0.0, float(sum(layer.parameter_bytes for layer in layers))
        for layer in layers:
            kept += layer.activation_bytes
            work = layer.output_bytes + received
            first = max(first, kept + made + work)
            later = max(later, kept + layer.parameter_bytes + work)  # adds a gradient of its own to the one there
            made -= layer.parameter_bytes
            received = layer.output_bytes
        return cls(first, later)


@dataclass(frozen=True)
class Sizes:
    """The sizes of what one stage holds, in bytes."""

    weights: float
    """Size of one version of the weights; their gradients take as much."""
    activations: float
    """Size of the activations of one micro-batch, without its input."""
    received: float
    """Size of the input of one micro-batch, which is data or a message."""
    sent: float
    """Size of the message to the next stage for a micro-batch, and of the gradient back; 0 on the last stage."""
    backward: Backward


def fullest(plan: Plan, stage: int, sizes: Sizes, stash: bool = True, recompute: bool = False) -> float:
    """Return bytes that `stage` has alive at its fullest moment, for weights, gradients, activations and messages.

    Args:
        plan: the plan, which says what is in flight.
        stage: this stage.
        sizes: sizes of what the stage holds.
        stash: whether every micro-batch in flight keeps the weights of its forward; otherwise there is one version.
        recompute: whether activations are computed anew for the backward, so only the inputs wait.
    """
    if not isinstance(plan, DDGPlan):
        return _synchronous(plan, stage, sizes)
    messages = 0.0
    if stage > 0:
        # Gradients held, and the next activation.
        messages += (plan.delay(stage - 1) - plan.delay(stage) + 2) * sizes.received
    if stage < plan.num_stages - 1:
        messages += 2 * sizes.sent  # the gradient that is used, and the next, for which there is room already
    if recompute:
        messages += plan.activations(stage) * sizes.sent  # activations held, which are no longer in any graph
    # DeepSpeed runs the layers on a copy of their input.
    waiting = plan.delay(stage) * (sizes.received if recompute else 2 * sizes.received + sizes.activations)
    return messages + waiting + max(_moments(plan, stage, sizes, stash))


def _moments(plan: DDGPlan, stage: int, sizes: Sizes, stash: bool) -> Iterator[float]:
    """Yield the bytes at each backward of a call and at its update, but for what is the same at all of them."""
    delay, m = plan.delay(stage), plan.micro_batches
    for number in range(m):
        versions = 1 - min(0, number - delay) // m if stash else 1
        work = sizes.backward.first if number == 0 else sizes.weights + sizes.backward.later
        data = (m - 1 - number) * sizes.received if stage == 0 else 0.0
        yield versions * sizes.weights + 2 * sizes.received + work + data
    yield (plan.versions(stage) if stash else 1) * sizes.weights + sizes.weights


def _synchronous(plan: Plan, stage: int, sizes: Sizes) -> float:
    """Return an upper bound for the other schedules: not every backward finds all passes alive.

    A backward whose W is put off keeps its activations, and gradients that may take as much: those of what the layers
    with weights have made. torch.distributed.pipelining has a buffer for every message of a call, and those are as
    large as the larger of the stage's own two, also where a chunk ends inside the model.
    """
    passes = plan.activations(stage) / plan.num_chunks
    half_done = plan.half_done(stage) / plan.num_chunks
    one = plan.micro_batches == 1
    work = sizes.backward.first if one else sizes.weights + sizes.backward.later
    if plan.elsewhere:
        messages = 2 * plan.num_chunks * plan.micro_batches * max(sizes.received, sizes.sent)
    else:
        messages = 2 * sizes.sent + (2 if stage > 0 else plan.micro_batches - 1) * sizes.received
        messages += passes * 2 * sizes.received
    # Of the passes, one is at work.
    waiting = (passes - 1 + half_done) * sizes.activations
    return sizes.weights + waiting + work + messages
