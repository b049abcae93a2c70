"""Stages of equal time: measure every layer on one micro-batch, and split where the slowest stage is fastest.

DeepSpeed's ``partition_method="profile"`` is not implemented. Here is a ``PipelineModule`` in which it is::

    from ds_ddg.partition import PipelineModule

    net = PipelineModule(layers=specs, num_stages=4, loss_fn=loss_fn, sample=(inputs, labels))

Rank 0 measures, every rank gets the same split, and the table of what to expect is printed once. `profile` alone needs
no ``torch.distributed``; the split itself is ``ds_ddg.analysis.balance``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import deepspeed.pipe
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from ds_ddg.analysis.balance import Balance, balance
from ds_ddg.profiling.layer_profiler import profile

__all__ = ["PipelineModule", "profile"]


class PipelineModule(deepspeed.pipe.PipelineModule):
    """DeepSpeed's ``PipelineModule`` with a ``partition_method="profile"`` that works.

    Args:
        layers: as for DeepSpeed's.
        num_stages: as for DeepSpeed's.
        topology: as for DeepSpeed's.
        loss_fn: as for DeepSpeed's; its time counts for the last stage.
        sample: a micro-batch ``(inputs, labels)`` as ``train_batch`` takes from its iterator; only rank 0's is used.
            With it the method is "profile". Ranks without data name the method instead.
        partition_method: as for DeepSpeed's.
        **more: as for DeepSpeed's.

    Raises:
        ValueError: the sample is missing or not used, or there are fewer layers than stages.
        RuntimeError: a layer failed on the sample; every rank raises.
    """

    balance: Balance | None = None
    """The split and what it predicts, if the layers were profiled."""

    def __init__(
        self,
        layers: Iterable[Any],
        num_stages: int | None = None,
        topology: Any = None,
        loss_fn: Any = None,
        *,
        sample: Any = None,
        partition_method: str | None = None,
        **more: Any,
    ) -> None:
        method = partition_method or ("parameters" if sample is None else "profile")
        if sample is not None and method.lower() != "profile":
            raise ValueError(
                f"sample has no meaning for partition_method={method!r}, which measures nothing; "
                'leave it out, or use "profile"'
            )
        self._sample = sample
        super().__init__(layers, num_stages, topology, loss_fn, partition_method=method, **more)
        del self._sample  # not to hold the data as long as the model

    def _partition_layers(self, method: str = "uniform") -> None:
        if method.lower() != "profile":
            super()._partition_layers(method)
            return
        self.balance = self._agreed(self._profiled)
        if self.global_rank == 0:
            print(f"stages by measured time:\n{self.balance}")
        self.parts = list(self.balance.parts)
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    def _profiled(self) -> Balance:
        if self._sample is None:
            raise ValueError(
                'partition_method="profile" measures the layers on rank 0, which has no micro-batch to run them on; '
                "pass sample=(inputs, labels)"
            )
        device = get_accelerator().device_name(self.local_rank)
        return balance(profile(self._layer_specs, self._sample, self.loss_fn, device=device), self.num_stages)

    def _agreed(self, find: Callable[[], Balance]) -> Balance:
        """Return rank 0's result of `find` on every rank; if it fails, all ranks fail, as the others wait for it."""
        answer: list[Any] = [None]
        failure = None
        if self.global_rank == 0:
            try:
                answer = [find()]
            except Exception as error:
                answer, failure = [f"{type(error).__name__}: {error}"], error
        device = torch.device(get_accelerator().device_name(self.local_rank))
        dist.broadcast_object_list(answer, src=0, group=self.world_group, device=device)
        if failure is not None:
            raise failure
        if isinstance(answer[0], str):
            raise RuntimeError(f"rank 0 could not profile the layers, see its log; {answer[0]}")
        return answer[0]
