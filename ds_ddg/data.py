"""The data of a whole call, fetched before its first message is sent.

The first stage reads the inputs and the last the labels, each from its own loader. Fetching all M micro-batches first
means that data which ends, is malformed or changes shape stops the call before anything of it has been trained on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ds_ddg.local import StagePeers
from ds_ddg.staging import Staging
from ds_ddg.wire import StageError

__all__ = ["Feed"]

_READY, _ENDED, _FAILED = 0, 1, 2


class Feed:
    """Micro-batches of the current call on the first and the last stage; elsewhere it does nothing.

    Args:
        first: this is the first stage; it reads the inputs, ``batch[0]``.
        last: this is the last stage; it reads the labels, ``batch[1]``.
        peers: all ranks of this stage, which stop together.
        staging: puts data on the device of this stage; None: it stays on the CPU.
    """

    def __init__(self, first: bool, last: bool, peers: StagePeers, staging: Staging | None = None) -> None:
        self._first, self._last = first, last
        self._peers, self._staging = peers, staging
        self._shape: list[Any] | None = None
        self.labels = True
        """Whether the last stage needs labels."""
        self.fixed_shape = True
        """Whether inputs must keep the shape of the first ones."""
        self._batches: deque[Any] = deque()

    def fetch(self, data_iter: Iterator[Any] | None, count: int, batch_fn: Callable[[Any], Any] | None) -> bool:
        """Pull `count` micro-batches; False if the data ends before, here or on another rank of this stage.

        Raises:
            ValueError, TypeError: the data is not what a pipeline can use.
            StageError: that happened on another rank of this stage.
        """
        self.clear()
        if not (self._first or self._last):
            return True
        pulled: list[Any] = []

        def pull() -> None:
            if data_iter is None and batch_fn is None:
                raise ValueError(
                    "no data: pass an iterator to train_batch(data_iter=...), or training_data=... to initialize()"
                )
            pulled.extend([None if data_iter is None else next(data_iter) for _ in range(count)])

        def prepare() -> None:
            self._batches.extend([self._checked(b if batch_fn is None else batch_fn(b)) for b in pulled])

        if batch_fn is None:
            return self._agree(pull, prepare)
        # A batch_fn may broadcast from the one tensor slice that reads: it must not be called if the data ended there.
        return self._agree(pull) and self._agree(prepare)

    def take(self) -> Any:
        """The next micro-batch of the call, ``(inputs, labels)``, where the stage computes."""
        batch = self._batches.popleft()
        return batch if self._staging is None else tuple(map(self._placed, batch))

    def _placed(self, part: Any) -> Any:
        """Inputs or labels on the device: DeepSpeed's own copy makes the main thread wait for all work there."""
        assert self._staging is not None
        if torch.is_tensor(part):
            return self._staging.to_device([part])[0]
        if isinstance(part, (tuple, list)) and all(map(torch.is_tensor, part)):
            return tuple(self._staging.to_device(part))
        return part

    def clear(self) -> None:
        """Drop what a call that did not happen has left."""
        self._batches.clear()

    def reset_shape(self) -> None:
        """The next inputs may have another shape."""
        self._shape = None

    def _agree(self, *steps: Callable[[], None]) -> bool:
        """Take the steps on all ranks of this stage; False if the data ended on one of them."""
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
        if not isinstance(batch, (tuple, list)) or not batch:
            raise TypeError(f"a micro-batch must be a tuple (inputs, labels), got {type(batch).__name__}")
        inputs, labels = batch[0], batch[1] if len(batch) > 1 else None
        if self._last and self.labels and labels is None:
            raise ValueError(
                "labels are missing: the last stage needs (inputs, labels) for its loss_fn, "
                f"got a micro-batch of {len(batch)} element(s)"
            )
        if self._first:
            tensors = [inputs] if torch.is_tensor(inputs) else inputs
            if not isinstance(tensors, (tuple, list)) or not all(map(torch.is_tensor, tensors)):
                raise TypeError(f"inputs must be a tensor or a tuple of tensors, got {type(inputs).__name__}")
            shape = [tuple(t.shape) for t in tensors]
            if self.fixed_shape:
                if self._shape not in (None, shape):
                    raise ValueError(
                        f"the inputs changed shape from {self._shape} to {shape}; "
                        "make every micro-batch the same shape (drop_last=True, padding), build the PipelineModule "
                        "with dynamic_shape=True, or call engine.reset_activation_shape() before the shape changes"
                    )
                self._shape = shape
        return inputs if self._first else None, labels if self._last else None
