"""Two machines on one: network namespaces joined by a virtual cable, each with interfaces and names of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

INTERFACE = "cable"
ADDRESSES = ("198.18.0.1", "198.18.0.2")
"""Of the two nodes; nothing outside the namespaces sees them."""


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[str, str]]:
    """Make two namespaces, or skip; yield their names. In both, this host's own name resolves to 127.0.0.1."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    mark = uuid.uuid4().hex[:8]
    names = f"ddg-{mark}-a", f"ddg-{mark}-b"
    configured = [Path("/etc/netns") / name for name in names]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("-n", names[0], "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", names[1])
            for name, address, directory in zip(names, ADDRESSES, configured, strict=True):
                ip("-n", name, "addr", "add", f"{address}/30", "dev", INTERFACE)
                for interface in (INTERFACE, "lo"):
                    ip("-n", name, "link", "set", interface, "up")
                directory.mkdir(parents=True)
                (directory / "hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n")
            ip("netns", "exec", names[0], "true")
        except OSError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield names
    finally:
        for name, directory in zip(names, configured, strict=True):
            shutil.rmtree(directory, ignore_errors=True)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30)
        with contextlib.suppress(OSError):  # others' are in there
            configured[0].parent.rmdir()


def run_on(
    names: Sequence[str], commands: Sequence[Sequence[str]], environment: dict[str, str], patience: float
) -> list[tuple[int, str]]:
    """Run one of `commands` on each node at once; the exit status and the output of each."""
    running = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for name, command in zip(names, commands, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=patience)[0] for process in running]
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return [(process.returncode, output) for process, output in zip(running, outputs, strict=True)]
