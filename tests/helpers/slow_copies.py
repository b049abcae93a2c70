"""Copies to and from the host that take their time: a stand-in for a device."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ds_ddg.comm.host_staging import Staging

TIMEOUT = 60.0
CPU = torch.device("cpu")
SENDER = "ds_ddg sender"


class Device:
    """Streams and events of a device whose memory is the host's: it computes at once, and copies when it may."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.may_copy = threading.Event()
        self.may_copy.set()
        self.seconds = seconds
        """The seconds that a copy takes."""
        self.defect = ""
        """The reason why copies fail; empty if they do not."""
        self.started: list[tuple[Tensor, Tensor]] = []
        """Copies (to, from) that no event has claimed yet."""
        self.freed_too_late = 0
        """Copies in host memory that were freed when it had a defect; torch would end the process."""
        self.threads: dict[str, torch.device] = {}
        """The current device of each thread, where it was set."""
        self.log: list[str] = []
        self.waits = 0
        """The waits of the host, for copies to the device alone."""
        self._names = iter(("down", "up"))
        self._current = ["compute"]

    def Stream(self, device: torch.device) -> Stream:  # noqa: N802, as torch calls it
        return Stream(self, next(self._names))

    def Event(self, blocking: bool) -> Event:  # noqa: N802
        assert blocking, "a thread that spins takes a core from a stage"
        return Event(self)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._current.append(stream.name)
        yield
        self._current.pop()

    def set_device(self, device: torch.device) -> None:
        self.threads[threading.current_thread().name] = device

    def current_stream(self, device: torch.device) -> Stream:
        return Stream(self, self._current[-1])

    def freed(self) -> None:
        self.freed_too_late += bool(self.defect)

    def note(self, what: str) -> None:
        if len(self.log) < 100:
            self.log.append(f"{self._current[-1]}: {what}")


class Stream:
    def __init__(self, device: Device, name: str) -> None:
        self.device, self.name = device, name

    def wait_stream(self, other: Stream) -> None:
        self.device.note(f"{self.name} waits for {other.name}")

    def query(self) -> bool:
        if self.device.defect:
            raise RuntimeError(self.device.defect)
        return True


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self, stream: Stream) -> None:
        self.device.note(f"event on {stream.name}")
        self.stream = stream.name
        if stream.name == "up":
            return
        self.copies, self.device.started = self.device.started, []

    def synchronize(self) -> None:
        if self.stream == "up":  # nothing on it waits for the compute stream
            self.device.waits += 1
            return
        assert threading.current_thread().name.startswith(SENDER), "the main thread must not wait for the device"
        assert self.device.may_copy.wait(TIMEOUT)
        time.sleep(self.device.seconds)
        if self.device.defect:
            raise RuntimeError(self.device.defect)
        for host, there in self.copies:
            host.copy_(there)


class StandIn(Staging):
    """Staging of a `Device`; what it copies to is rubbish until the copy is done."""

    def __init__(self, device: Device) -> None:
        super().__init__(CPU, device, pin=False)
        self.stand_in = device

    def _host_copy(self, tensor: Tensor) -> Tensor:
        self.stand_in.note("copy to the host")
        memory = np.full(tensor.numel() * tensor.element_size(), 0x55, np.uint8)
        weakref.finalize(memory, self.stand_in.freed)
        host = torch.empty(0, dtype=tensor.dtype)
        host.set_(torch.from_numpy(memory).untyped_storage(), 0, tensor.shape)  # type: ignore[call-overload]
        self.stand_in.started.append((host, tensor))  # read when it copies
        return host


@contextmanager
def device(seconds: float = 0.0) -> Iterator[Device]:
    """Make a device; torch refuses to note a stream for memory of the host, so that is recorded instead."""
    made = Device(seconds)
    with mock.patch.object(
        torch.Tensor, "record_stream", lambda _, stream: made.note(f"memory in use by {stream.name}")
    ):
        yield made


@contextmanager
def staged(seconds: float = 0.001) -> Iterator[Device]:
    """Inside this block new engines keep what they compute on a stand-in for a device."""
    with device(seconds) as made, mock.patch("ds_ddg.engine.engine.staging_for", side_effect=lambda _: StandIn(made)):
        yield made


def senders() -> int:
    """How many threads that send are alive."""
    gc.collect()
    return sum(thread.name.startswith(SENDER) for thread in threading.enumerate())
