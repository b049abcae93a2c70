"""The start of the process group: what DeepSpeed and torch do there, made quicker, and refused where it would hang."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch.distributed as dist
from deepspeed.constants import default_pg_timeout
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.utils import logger
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ds_ddg.comm.hosts import check_hosts, exchange_hosts, this_host
from ds_ddg.host import replaced

__all__ = ["BACKEND", "check_before_gloo", "prepared_start"]

BACKEND = import_module("deepspeed.comm.torch")
"""DeepSpeed's module of that name; as an attribute of its package, ``torch`` is the library."""

_SILENCE = 5.0
"""The seconds of a compilation before a word about it; loading what was compiled before takes less."""


@contextmanager
def prepared_start() -> Iterator[None]:
    """Inside this block the process group starts without a needless compilation, and refuses hosts gloo cannot join.

    On CPU DeepSpeed compiles shared-memory collectives for inference, about a minute without a word. No training uses
    them; where they would be used, DeepSpeed takes the process group's all-reduce instead. What it compiles for
    training, such as an optimizer, a line announces.

    Raises:
        RuntimeError: inside, on every rank, if gloo would use loopback addresses between several hosts.
    """
    with ExitStack() as until_the_end:
        until_the_end.enter_context(replaced(BACKEND, "build_shm_op", lambda: None))
        until_the_end.enter_context(replaced(OpBuilder, "jit_load", _announced(OpBuilder.jit_load)))
        until_the_end.enter_context(replaced(dist, "init_process_group", _checked(dist.init_process_group)))
        yield


def check_before_gloo() -> None:
    """Raise RuntimeError on every rank if gloo cannot connect the hosts of the default group, of another back end.

    Collective over all ranks. With gloo as the default group's back end they are connected already.
    """
    if "gloo" in dist.get_backend():
        return
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, this_host())
    check_hosts(hosts)


def _announced(jit_load: Any) -> Any:
    """Return `jit_load`, a method of DeepSpeed's that compiles, with a line if it takes long."""

    @functools.wraps(jit_load)
    def announced(builder: Any, *args: Any, **kwargs: Any) -> Any:
        text = f"DeepSpeed is compiling {builder.name} for this machine, which takes about a minute, once"
        timer = threading.Timer(_SILENCE, logger.warning, [text])
        timer.daemon = True
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            timer.start()
        try:
            return jit_load(builder, *args, **kwargs)
        finally:
            timer.cancel()

    return announced


def _checked(init_process_group: Any) -> Any:
    """Return `init_process_group` with a look at the hosts of all ranks before gloo connects them."""

    @functools.wraps(init_process_group)
    def checked(
        backend: str | None = None,
        init_method: str | None = None,
        timeout: timedelta | None = None,
        world_size: int = -1,
        rank: int = -1,
        store: Any = None,
        **more: Any,
    ) -> None:
        if store is None and (backend is None or "gloo" in backend):
            patience = timeout or default_pg_timeout
            # As torch does it itself, where it is given no store.
            found = rendezvous(init_method or "env://", rank, world_size, timeout=patience)
            store, rank, world_size = next(found)
            store.set_timeout(patience)
            check_hosts(exchange_hosts(store, rank, world_size))
            store, init_method = PrefixStore("default_pg", store), None
        init_process_group(backend, init_method, timeout, world_size, rank, store, **more)

    return checked
