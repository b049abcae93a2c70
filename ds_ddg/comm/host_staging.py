"""Copies between the memory of a GPU and the host memory that messages travel from and into.

Messages go over gloo, which knows host memory alone, so several stages can share one GPU and links without NCCL work;
NCCL carries no messages of ours, only the collectives of DeepSpeed within a stage, where it is what was initialized.
Seen on one GPU that all stages share (tests/gpu); the other tests put a stand-in in the place of streams and
events.

Neither direction makes the main thread wait for the device, which would cost it the lead over the device that hides
the time of Python::

    to the host      compute stream: ... F ->|                                     the main thread goes on
                     copy stream:            |- copy -> event
                     sender's thread:                         wait for it, send    (without the GIL)
    to the device    main thread: a message has arrived, start its copy
                     copy stream:            |- copy ->|
                     compute stream: earlier work ...  |- what uses it

There is one thread for all senders of a process: copies to the host are done in the order in which they were
started, all on one stream, so no message waits for one that started later.

What is sent is a copy that the compute stream makes at once: the memory of a captured graph's outputs is that of its
next run, which does not wait for other streams.

Host memory is pinned. It comes from torch's caching allocator, which keeps blocks by size and hands one out again only
when the copies that use it are done, so no pool of our own is needed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["Staging", "refuse_other_devices", "staging_for"]

_T = TypeVar("_T")
_CPU = torch.device("cpu")


class Staging:
    """Copies of one process to and from its device.

    Args:
        device: the device of the stage.
        streams: has ``Stream``, ``Event``, ``stream``, ``current_stream`` and ``set_device``; default: torch's module
            for `device`.
        pin: whether host memory is pinned, without which no copy is asynchronous.
    """

    def __init__(self, device: torch.device, streams: Any = None, pin: bool = True) -> None:
        self.device = device
        self._streams = torch.get_device_module(device) if streams is None else streams
        self._pin = pin
        self._to_host, self._to_device = (self._streams.Stream(device) for _ in range(2))
        # A thread starts on device 0, where its first wait would open a context, hundreds of megabytes for each rank.
        self._sender = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="ds_ddg sender",
            initializer=partial(self._streams.set_device, device),
        )

    def host_buffer(self, size: int) -> Tensor:
        """Allocate `size` bytes of host memory to receive into."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._pin)

    def to_host(self, tensors: Sequence[Tensor | None]) -> tuple[list[Tensor | None], Any]:
        """Start to copy those of `tensors` that are on the device to the host.

        Returns:
            The tensors in host memory, and what to ``synchronize`` with before they are read; that is None, and the
            tensors are as they were, if none is on the device.
        """
        if not any(t is not None and t.device == self.device for t in tensors):
            return list(tensors), None
        there = [t if t is None or t.device != self.device else t.clone() for t in tensors]
        self._to_host.wait_stream(self._streams.current_stream(self.device))
        with self._streams.stream(self._to_host):
            host = [None if t is None else self._host_copy(t) for t in there]
            # A thread that waits would otherwise spin, on a core that others need.
            copied = self._streams.Event(blocking=True)
            copied.record(self._to_host)
        for tensor in there:
            if tensor is not None and tensor.device == self.device:
                tensor.record_stream(self._to_host)  # its memory is not to be used again before the copy is done
        return host, copied

    def to_device(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Start to copy `tensors` to the device, and return copies that later work of the current stream can use."""
        with self._streams.stream(self._to_device):
            # Allocated on the copy stream: memory of the compute stream may be in use until that has caught up.
            arrived = [None if t is None else t.to(self.device, non_blocking=True) for t in tensors]
        current = self._streams.current_stream(self.device)
        current.wait_stream(self._to_device)
        for tensor in arrived:
            if tensor is not None:
                tensor.record_stream(current)
        return arrived

    def settle(self) -> None:
        """Wait until all copies to the device are done, so that their host memory may change; for no other work."""
        copied = self._streams.Event(blocking=True)
        copied.record(self._to_device)
        copied.synchronize()

    def later(self, work: Callable[[], _T]) -> Future[_T]:
        """Run `work` on the sender's thread, after all work that the thread was given before."""
        return self._sender.submit(work)

    def keep_if_lost(self, *things: Any) -> None:
        """Never free `things` if the device has failed for good.

        To free memory that several streams have used, torch asks the device. If that has failed, the process ends
        there and then, before anybody can say why.
        """
        try:
            self._to_host.query()
        except RuntimeError:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(things))

    def _host_copy(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pin)
        return host.copy_(tensor, non_blocking=True)


def refuse_other_devices(tensors: Sequence[Tensor | None], staging: Staging | None) -> None:
    """Raise ValueError for a tensor that is neither on the device of this stage nor in host memory.

    Another device would copy it, and nothing here waits for the work of that device.
    """
    own = _CPU if staging is None else staging.device
    for index, tensor in enumerate(tensors):
        if tensor is not None and tensor.device not in (own, _CPU):
            raise ValueError(
                f"tensor {index} of those that leave this stage is on {tensor.device}, and the stage computes on "
                f"{own}; move it there in the layer that makes it: .to({str(own)!r})"
            )


def staging_for(device: torch.device) -> Staging | None:
    """Make the `Staging` of a stage on `device`; None on the CPU, whose memory the messages can use."""
    if device.type == "cpu":
        return None
    if device.index is None:  # tensors name the device that is current
        device = torch.device(device.type, torch.get_device_module(device).current_device())
    return Staging(device)
