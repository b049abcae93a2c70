"""Versions of the weights: remembered at a forward, used at its delayed backward, forgotten afterwards.

A delayed backward runs after its stage has updated its weights, and autograd does not make that safe: an optimizer
that writes through ``.data`` or a fused kernel leaves autograd's version counter alone, so a late backward silently
mixes old activations with new weights, differently for each layer type (a Linear saves a *view* of its weight, a
convolution the parameter itself). One that bumps the counter makes the late backward fail. Both are settled here.

Stashing is copy-on-write. Before an update, parameters whose current values an unfinished micro-batch still needs
move to a fresh copy, and the old storage stays behind with the graphs that saved it. So a stage holds exactly the
versions in flight plus the newest one: at most ceil(d_k / M) + 1, no copy at all on the last stage.

DeepSpeed's mixed-precision and ZeRO optimizers write into flat buffers of their own, of which the parameters are
views; those cannot move. There it is the forward that moves: it runs on a copy of the buffer's present values, one
more than the versions above, and the parameters return to their place for the update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

__all__ = ["WeightVersions"]


class WeightVersions:
    """Weight versions of one stage, by the micro-batches that saw them.

    Args:
        parameters: the stage's parameters; all versions share the storage of frozen ones.
        stash: True: a backward sees the weights of its own forward (the paper's eq. 6-9). False: the newest ones.
        pinned: the optimizer owns the parameters' present storage, and they must be there when it updates.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], stash: bool = True, pinned: bool = False) -> None:
        self.parameters = tuple(parameters)
        """The parameters of the stage."""
        self._stash = stash
        self._home = [p.data for p in self.parameters] if pinned else None
        self._away = False
        self._seen: dict[int, int] = {}
        self._old: dict[int, list[Tensor]] = {}
        self._left: list[tuple[int, int, bool]] = []
        self.version = 0
        """The number of updates that the weights have had."""

    @property
    def alive(self) -> int:
        """The number of versions of the weights in memory, the newest included."""
        return len(self._old) + 1

    @property
    def in_flight(self) -> int:
        """The number of micro-batches that have been remembered and not forgotten."""
        return len(self._seen)

    def drift(self) -> Tensor | None:
        """Return |w - w'| / |w|, w the trained weights and w' those that the next backward will see; None: the same.

        A tensor with one element on the device of the weights, without a wait for it.
        """
        old = self._old.get(min(self._seen.values(), default=self.version))
        pairs = [(p.data, w) for p, w in zip(self.parameters, old or (), strict=old is not None) if p.requires_grad]
        if not pairs:
            return None
        norm = partial(torch.linalg.vector_norm, dtype=torch.float32)
        moved, newest = [norm(p - w) for p, w in pairs], [norm(p) for p, _ in pairs]  # one difference at a time
        return torch.stack(moved).norm() / torch.stack(newest).norm()

    def remember(self, key: int) -> None:
        """Remember that the forward of micro-batch `key` is about to run on the newest weights."""
        assert key not in self._seen, f"slot {key} is still in flight"
        self._seen[key] = self.version
        if self._home is not None and not self._away:
            self._point_to(self._copies())
            self._away = True

    @contextmanager
    def using(self, key: int) -> Iterator[None]:
        """Inside this block the parameters hold the weights that micro-batch `key` is to be differentiated at."""
        old = self._old.get(self._seen[key])
        if old is None:
            yield
            return
        newest = [p.data for p in self.parameters]
        self._point_to(old)
        try:
            yield
        finally:
            self._point_to(newest)

    def forget(self, key: int) -> None:
        """Forget micro-batch `key`, whose backward is done, and its weights if no other micro-batch needs them."""
        version = self._seen.pop(key)
        if version not in self._seen.values():
            self._old.pop(version, None)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Inside this block the optimizer may write into the weights, unnoticed by micro-batches in flight."""
        if self._stash and self.version in self._seen.values():
            self._old[self.version] = [p.data for p in self.parameters]
            self._point_to(self._home or self._copies())
        elif self._home is not None:
            self._point_to(self._home)
        self._away = False
        # An optimizer that bumps the counter would make autograd refuse every graph still in flight, though what
        # those graphs saved is intact ("stash") or meant to be new ("current").
        with _unsafe_preserve_version_counter(self.parameters):
            yield
        self.version += 1

    def leave(self) -> None:
        """Note the weights at the end of a call, so that `refuse_changes` finds what the script does to them."""
        self._left = self._traces() if self._seen else []

    def refuse_changes(self, module: torch.nn.Module, stage_id: int) -> None:
        """Raise RuntimeError if the weights of `module` are not as they were left, with micro-batches in flight.

        A write through ``.data`` leaves no trace. To the forward passes after it, it is part of the last update. Those
        in flight keep the weights that they saw if that call ended with an update, so from the one on in which the
        first gradient comes back; before that, and with "weights": "current" always, their backward passes see it
        too. In bf16, fp16 and ZeRO-1 the next update takes it back, as the optimizer has weights of its own.
        """
        if not self._seen or not self._left or (traces := self._traces()) == self._left:
            return
        pairs = zip(self._left, traces, module.named_parameters(), strict=True)
        changed = [name for then, now, (name, _) in pairs if then[:2] != now[:2] or then[2] > now[2]]
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise RuntimeError(
                f"weights of stage {stage_id} were written into, replaced or frozen between two calls "
                f"({', '.join(changed[:3])}{more}), while {len(self._seen)} micro-batch(es) are in flight whose "
                "gradients belong to the weights as they were; call engine.drain() before that"
            )

    def assert_empty(self) -> None:
        """Assert that nothing is in flight and that there is one copy of the weights."""
        assert not self._seen, f"in flight: {self._seen}"
        assert not self._old, f"old versions: {list(self._old)}"

    def _traces(self) -> list[tuple[int, int, bool]]:
        """Return the traces of changes of each parameter: count of writes, address, whether it is trained."""
        return [(p._version, p.data_ptr(), p.requires_grad) for p in self.parameters]

    def _copies(self) -> list[Tensor]:
        return [p.data.clone() if p.requires_grad else p.data for p in self.parameters]

    def _point_to(self, weights: list[Tensor]) -> None:
        for parameter, weight in zip(self.parameters, weights, strict=True):
            parameter.data = weight
