"""The hosts of a job as gloo sees them, compared before it connects the ranks.

Where a host's name stands beside 127.0.0.1 in /etc/hosts, as on several distributions, gloo tells that address to the
other ranks. On one host that is right. From another host it leads nowhere: ranks wait, and the connection is refused.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["INTERFACE", "Host", "check_hosts", "exchange_hosts", "this_host"]

INTERFACE = "GLOO_SOCKET_IFNAME"
"""The environment variable that names the network interfaces gloo uses."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NETWORK = Path("/proc/self/ns/net")


class Host(NamedTuple):
    """The host of one rank."""

    name: str
    network: str
    """The same for processes that reach each other over 127.0.0.1, and for no others."""
    loopback: str
    """What makes gloo use a loopback address; empty if it uses another one."""
    interfaces: tuple[str, ...]


def this_host() -> Host:
    """Return the host of this process."""
    name = socket.gethostname()
    chosen = os.environ.get(INTERFACE, "")
    if chosen:
        loopback = f"{INTERFACE}={chosen}" if chosen in ("lo", "lo0") else ""
    else:
        address = _address_of(name)
        loopback = f"its name resolves to {address}" if address.startswith("127.") or address == "::1" else ""
    others = (interface for _, interface in socket.if_nameindex())
    return Host(name, _network(name), loopback, tuple(i for i in others if i not in ("lo", "lo0")))


def exchange_hosts(store: Any, rank: int, world_size: int) -> list[Host]:
    """Return the hosts of all ranks, by rank; every rank must call it.

    Args:
        store: a store of ``torch.distributed`` that all ranks reach.
        rank: this global rank.
        world_size: the number of ranks.
    """
    keys, heard = ([f"ds_ddg/{what}/{other}" for other in range(world_size)] for what in ("host", "heard"))
    store.set(keys[rank], json.dumps(this_host()))
    told = list(map(json.loads, store.multi_get(keys)))
    store.set(heard[rank], "")
    if rank == 0:
        store.wait(heard)  # the store may be in this process, which an error ends
    return [Host(name, network, loopback, tuple(interfaces)) for name, network, loopback, interfaces in told]


def check_hosts(hosts: Iterable[Host]) -> None:
    """Raise RuntimeError if gloo cannot connect the ranks on `hosts`, one for each rank; the same on every rank."""
    ranks: dict[Host, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks.setdefault(host, []).append(rank)
    if len({host.network for host in ranks}) < 2:
        return
    hidden = {host: held for host, held in ranks.items() if host.loopback}
    if not hidden:
        return
    listed = "; ".join(
        f"{host.name} ({'ranks' if len(held) > 1 else 'rank'} {', '.join(map(str, held))}): {host.loopback}, "
        f"interfaces there: {', '.join(host.interfaces) or 'none but the loopback one'}"
        for host, held in hidden.items()
    )
    example = next((host.interfaces[-1] for host in hidden if host.interfaces), "eth0")
    raise RuntimeError(
        f"the ranks are on several hosts, and gloo would use a loopback address, which other hosts cannot reach, on "
        f"{listed}. Name the interface by which the hosts reach each other, on each of them before the start: "
        f"export {INTERFACE}={example}"
    )


def _address_of(name: str) -> str:
    """Return the address that gloo takes: the first of the host's name that can be bound, else the loopback one."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as trial:
                trial.bind(address)
        except OSError:
            continue
        return str(address[0])
    return "127.0.0.1"


def _network(name: str) -> str:
    """Return what `Host.network` is: the kernel that runs and the network namespace, else the host's `name`."""
    try:
        return f"{_BOOT.read_text().strip()} {_NETWORK.stat().st_ino}"
    except OSError:
        return name
