"""A port on which processes of this machine can meet."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from pathlib import Path

__all__ = ["free_port"]

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""Has the first and the last of the ports that connections get which ask for none."""
_FIRST, _TRIES = 10_000, 1000


def free_port() -> int:
    """Return a TCP port that nobody uses, none of those that any connection may get before it is used.

    Raises:
        OSError: there is none.
    """
    below = int(_EPHEMERAL.read_text().split()[0]) if _EPHEMERAL.exists() else 32768
    for port in random.SystemRandom().sample(range(_FIRST, below), _TRIES):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no free port among {_TRIES} of {_FIRST} to {below - 1}")
