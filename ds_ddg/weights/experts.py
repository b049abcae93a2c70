"""Mixture-of-experts layers of DeepSpeed (``deepspeed.moe.layer.MoE``) in a pipeline.

With ``ep_size=E`` each stage spreads the experts of a layer over E of its replicas. Tokens travel between them in the
layer's forward and backward, in the same order on all of them, as all follow the same plan: the replicas of a stage
keep step with each other, the stages do not. Norms of expert gradients are a stage's own business too: DeepSpeed's
optimizers would sum them over the pipe axis, which ``StageLocalGrid`` hides from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["create_expert_groups", "expert_files", "expert_sizes"]

_LARGEST = 4096


def expert_sizes(module: Any) -> list[int]:
    """Return the ``ep_size`` of every MoE layer of all stages, in ascending order; collective over all ranks.

    Args:
        module: the ``PipelineModule``; each rank has the layers of its own stage alone.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.moe.layer import MoE

    device = get_accelerator().device_name(module.local_rank)
    found = torch.zeros(_LARGEST + 1, dtype=torch.int32, device=device)
    for layer in module.modules():
        if isinstance(layer, MoE):
            found[min(layer.ep_size, _LARGEST)] = 1
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [int(size) for size in found.nonzero().flatten()]


def create_expert_groups(sizes: Sequence[int], config: Any, module: Any) -> None:
    """Create the process groups of expert layers on every rank, those without such a layer included. Collective.

    DeepSpeed creates them where it finds a layer; on a stage without one the next group that all ranks create would
    then be another than on the rest, and the ranks would wait for each other.

    Args:
        sizes: what `expert_sizes` found.
        config: the parsed ``DeepSpeedConfig``.
        module: the ``PipelineModule``.

    Raises:
        ValueError: this layout of ranks has no groups of that size inside a stage, or DeepSpeed has kept those of an
            engine with another layout, which it has one set of per process.
    """
    from deepspeed.utils import groups

    if module.topology().get_dim("model") > 1:
        return  # DeepSpeed has several layouts for that, and the layers choose
    stage = module.topology().get_axis_list("pipe", module.stage_id)
    for size in sizes:
        if len(stage) % size:
            raise ValueError(
                f"expert layers with ep_size={size}: a stage has {len(stage)} replicas (ranks {stage}), which are no "
                f"multiple of it; use an ep_size that divides {len(stage)}"
            )
        groups._create_expert_and_data_parallel(
            size,
            pp_size=module.num_stages,
            use_data_before_expert_parallel_=config.use_data_before_expert_parallel_,
        )
        for kind in (groups._EXPERT_PARALLEL_GROUP_RANKS, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS):
            ranks = list(kind[f"ep_size_{size}"])
            if not set(ranks) <= set(stage):
                raise ValueError(
                    f"expert layers with ep_size={size}: DeepSpeed's expert group of this rank, {ranks}, leaves its "
                    f'stage, ranks {stage}; put "pipe" first among the axes of the topology, and do not build '
                    "engines of different layouts in one process"
                )


def expert_files(engine: Any, directory: str, tag: str, optimizer: bool) -> Iterator[str]:
    """Yield the files of a checkpoint that the stage of `engine` reads for its experts, named as DeepSpeed does it."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    layers = [layer for layer in engine.module.modules() if isinstance(layer, MoE)]
    for index, layer in enumerate(layers):
        first = groups._get_expert_parallel_rank(layer.expert_group_name) * layer.num_local_experts
        for number in range(first, first + layer.num_local_experts):
            yield engine._get_expert_ckpt_name(
                directory, index, number, tag, checkpoint_mp_rank=engine.checkpoint_mp_rank
            )
    if optimizer and not engine.zero_optimization():
        place = groups._get_expert_parallel_rank(groups._get_max_expert_size_name())
        yield engine._get_optimizer_ckpt_name(directory, tag, place)
