"""Which address gloo would give to other hosts, and what is said where that one leads nowhere."""

from __future__ import annotations

import re
import socket
from typing import Any

import pytest
import torch.distributed as dist

from ds_ddg.comm import hosts
from ds_ddg.comm.hosts import Host, check_hosts, exchange_hosts, this_host

NEAR = Host("near", "kernel 1", "", ("eth0",))
HIDDEN = Host("hidden", "kernel 2", "its name resolves to 127.0.1.1", ("docker0", "eth1"))


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        if not addresses:
            raise socket.gaierror("Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(hosts.socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize(
    ("interface", "addresses", "loopback"),
    [
        ("", ["127.0.1.1"], "its name resolves to 127.0.1.1"),
        ("", [], "its name resolves to 127.0.0.1"),  # gloo falls back to it
        ("", ["192.0.2.1"], "its name resolves to 127.0.0.1"),  # no address of this machine
        ("", ["192.0.2.1", "0.0.0.0"], ""),  # one that can be bound
        ("eth0", ["127.0.0.1"], ""),
        ("lo", ["0.0.0.0"], "GLOO_SOCKET_IFNAME=lo"),
    ],
)
def test_what_makes_gloo_use_a_loopback_address(
    monkeypatch: pytest.MonkeyPatch, interface: str, addresses: list[str], loopback: str
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    resolve_to(monkeypatch, *addresses)
    assert this_host().loopback == loopback
    assert "lo" not in this_host().interfaces


@pytest.mark.parametrize("ranks", [[HIDDEN, HIDDEN], [NEAR, NEAR._replace(network="kernel 3")]])
def test_hosts_that_reach_each_other(ranks: list[Host]) -> None:
    check_hosts(ranks)


def test_hosts_that_do_not_reach_each_other() -> None:
    with pytest.raises(RuntimeError) as caught:
        check_hosts([NEAR, HIDDEN, HIDDEN])
    said = str(caught.value)
    assert "hidden (ranks 1, 2): its name resolves to 127.0.1.1, interfaces there: docker0, eth1" in said
    assert "near" not in said
    assert said.endswith("export GLOO_SOCKET_IFNAME=eth1")


def test_processes_of_one_host_are_on_one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = dist.HashStore()
    store.set("ds_ddg/host/1", '["other", "elsewhere", "", []]')
    store.set("ds_ddg/heard/1", "")
    told = exchange_hosts(store, 0, 2)
    assert told == [this_host(), Host("other", "elsewhere", "", ())]
    check_hosts([told[0], told[0]])
    with pytest.raises(RuntimeError, match=re.escape("(rank 0): GLOO_SOCKET_IFNAME=lo")):
        check_hosts(told)
