"""Ports for launchers, which listen on them seconds after they were chosen."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from benchmarks import ports

pytestmark = pytest.mark.pure


def test_no_connection_gets_the_port_meanwhile() -> None:
    """The system gives connections ports of its own range; an earlier version chose from there, and lost the race."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(10_000 <= ports.free_port() < first for _ in range(50))


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        number = taken.getsockname()[1]
        monkeypatch.setattr(ports.random.SystemRandom, "sample", lambda *_: [number, 10_001, 10_002, 10_003])
        assert ports.free_port() in (10_001, 10_002, 10_003)
        monkeypatch.setattr(ports.random.SystemRandom, "sample", lambda *_: [number])
        with pytest.raises(OSError, match="no free port"):
            ports.free_port()
