"""The data of a whole call, fetched before its first message is sent.

The first stage reads the inputs and the last the labels, each from its own loader. Fetching all M micro-batches first
means that data which ends, is malformed or changes shape stops the call before anything of it has been trained on.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.utils.logging import log_dist_once
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ds_ddg.comm.host_staging import Staging
from ds_ddg.comm.p2p import StageError
from ds_ddg.comm.waits import UNOBSERVED, WaitObserver
from ds_ddg.engine.output_checks import described
from ds_ddg.profiling.isolation import tensors
from ds_ddg.weights.stage_groups import StagePeers

__all__ = ["Feed"]

_READY, _ENDED, _FAILED = 0, 1, 2


class Feed:
    """Holds the micro-batches of the current call on the first and the last stage; elsewhere it does nothing.

    Args:
        first: this is the first stage; it reads the inputs, ``batch[0]``.
        last: this is the last stage; it reads the labels, ``batch[1]``.
        peers: all ranks of this stage, which stop together.
        staging: puts data on the device of this stage; None: it stays on the CPU.
        observer: measures how long fetching takes; default: nobody does.
    """

    def __init__(
        self,
        first: bool,
        last: bool,
        peers: StagePeers,
        staging: Staging | None = None,
        observer: WaitObserver = UNOBSERVED,
    ) -> None:
        self._waits = observer.waits
        self._first, self._last = first, last
        self._peers, self._staging = peers, staging
        self._shape: list[Any] | None = None
        self.labels = True
        """Whether the last stage needs labels."""
        self.fixed_shape = True
        """Whether all micro-batches must have as many samples as the first."""
        self.as_deepspeed = False
        """Whether the data is for DeepSpeed's own schedule in a run of its own: whatever that can run is right."""
        self._batches: deque[Any] = deque()
        self._lent = False
        """Whether the device may still be copying from memory that belongs to the script."""

    def fetch(self, data_iter: Iterator[Any] | None, count: int, batch_fn: Callable[[Any], Any] | None) -> bool:
        """Pull `count` micro-batches; return False if the data ends before, here or on another rank of this stage.

        Raises:
            ValueError, TypeError: the data is not what a pipeline can use.
            StageError: that happened on another rank of this stage.
        """
        with self._waits("data"):
            return self._fetch(data_iter, count, batch_fn)

    def _fetch(self, data_iter: Iterator[Any] | None, count: int, batch_fn: Callable[[Any], Any] | None) -> bool:
        self.clear()
        if not (self._first or self._last):
            return True
        pulled: list[Any] = []
        given: list[tuple[Tensor, int]] = []

        def pull() -> None:
            if data_iter is None and batch_fn is None:
                raise ValueError(
                    "no data: pass an iterator to train_batch(data_iter=...), or training_data=... to initialize()"
                )
            for _ in range(count):
                batch = None if data_iter is None else next(data_iter)
                # DeepSpeed is done with a micro-batch before it pulls the next, so an iterator may use memory again.
                pulled.append(tree_map_only(Tensor, Tensor.clone, batch) if self.as_deepspeed else batch)
                given.extend((t, t._version) for t in tensors(pulled[-1]) if not t.is_inference())
            if any(t._version != version for t, version in given):
                raise ValueError(
                    f"the data iterator has written into a micro-batch that it had given before; all {count} of a "
                    "call are fetched first, so let it give new tensors, such as tensor.clone()"
                )

        def prepare() -> None:
            self._batches.extend([self._checked(b if batch_fn is None else batch_fn(b)) for b in pulled])

        if batch_fn is None:
            return self._agree(pull, prepare)
        # A batch_fn may broadcast from the one tensor slice that reads: it must not be called if the data ended there.
        return self._agree(pull) and self._agree(prepare)

    def take(self) -> Any:
        """Return the next micro-batch of the call, ``(inputs, labels)``, on the device of the stage."""
        batch = self._batches.popleft()
        return batch if self._staging is None else tuple(map(self._placed, batch))

    def settle(self) -> None:
        """End a call whose schedule has been executed: from here on a loader may write into the batches again.

        Raises:
            RuntimeError: some of them have not been taken.
        """
        if self._batches:
            left = len(self._batches)
            self.clear()
            raise RuntimeError(
                f"{left} micro-batches of this call were fetched and not trained on: the engine's LoadMicroBatch must "
                "take them from self._next_batch(), not from the iterator"
            )
        if self._lent and self._staging is not None:
            self._staging.settle()
        self._lent = False

    def _placed(self, part: Any) -> Any:
        """Return inputs or labels on the device; DeepSpeed's own copy makes the main thread wait for all its work."""
        assert self._staging is not None
        tensors = part if isinstance(part, (tuple, list)) else (part,)
        # Of other memory torch has made a copy of its own by the time that it returns.
        self._lent |= any(torch.is_tensor(tensor) and tensor.is_pinned() for tensor in tensors)
        if torch.is_tensor(part):
            return self._staging.to_device([part])[0]
        if isinstance(part, (tuple, list)) and all(map(torch.is_tensor, part)):
            return tuple(self._staging.to_device(part))
        return part

    def clear(self) -> None:
        """Drop the micro-batches of a call that did not happen."""
        self._batches.clear()

    def reset_shape(self) -> None:
        """Allow the next inputs another shape."""
        self._shape = None

    def _agree(self, *steps: Callable[[], None]) -> bool:
        """Take the steps on all ranks of this stage; return False if the data ended on one of them."""
        state, error = _READY, None
        try:
            for step in steps:
                step()
        except StopIteration:
            state = _ENDED
        except Exception as problem:
            state, error = _FAILED, problem
        state = self._peers.largest(state)
        if error is not None:
            raise error
        if state == _FAILED:
            raise StageError("the data of another rank of this stage is not usable; see its message")
        if state == _ENDED:
            self.clear()
        return state == _READY

    def _checked(self, batch: Any) -> Any:
        """Return what this stage needs of a micro-batch, as ``(inputs, labels)``."""
        inputs = self._entry(batch, 0) if self._first else None
        labels = self._entry(batch, 1) if self._last else None
        if self._first:
            self._check_inputs(inputs)
            if isinstance(batch, (tuple, list, Tensor)) and len(batch) > 2:
                log_dist_once(
                    f"a micro-batch has {len(batch)} entries, of which only the first two are used, as inputs and "
                    "labels; give several of either as a tuple: ((x, mask), (y, weight))",
                    ranks=[0],
                    level=logging.WARNING,
                )
        if isinstance(labels, (tuple, list)) and not all(map(torch.is_tensor, labels)):
            raise TypeError(
                f"labels must be a tensor, a tuple of tensors, or what is neither tuple nor list, got "
                f"{described(labels)}; put what is nested or no tensor into a dict, which reaches loss_fn as it is"
            )
        return inputs, labels

    def _entry(self, batch: Any, index: int) -> Any:
        """Return entry `index` of a micro-batch, which to DeepSpeed may be anything that has entries."""
        try:
            if not torch.is_tensor(batch) or self.as_deepspeed:  # a batch of inputs alone has entries, too
                return batch[index]
        except (IndexError, KeyError, TypeError) as error:
            if index == 1 and isinstance(batch, (tuple, list)) and batch:
                if not self.labels:
                    return None
                raise ValueError(
                    "labels are missing: the last stage needs (inputs, labels) for its loss_fn, "
                    f"got a micro-batch of {len(batch)} element(s); if it needs none, give (inputs, None)"
                ) from error
        raise TypeError(f"a micro-batch must be a tuple (inputs, labels), got {described(batch)}")

    def _check_inputs(self, inputs: Any) -> None:
        parts = [inputs] if torch.is_tensor(inputs) else inputs
        if not isinstance(parts, (tuple, list)) or not all(map(torch.is_tensor, parts)):
            raise TypeError(f"inputs must be a tensor or a tuple of tensors, got {described(inputs)}")
        if not self.fixed_shape or self.as_deepspeed:
            return
        # What else changes need not reach the next stage: behind a pooling, say. Whether it does, the stages see.
        shape = [tuple(part.shape) for part in parts]
        if self._shape is not None and [s[:1] for s in self._shape] != [s[:1] for s in shape]:
            raise ValueError(
                f"the inputs changed shape from {self._shape} to {shape}; "
                "make every micro-batch the same shape (drop_last=True, padding), build the PipelineModule "
                "with dynamic_shape=True, or call engine.reset_activation_shape() before the shape changes"
            )
        self._shape = shape
