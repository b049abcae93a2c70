"""Training that is saved, loaded and goes on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from helpers import toy

WARMUP = {"warmup_min_lr": 0.001, "warmup_max_lr": 0.02, "warmup_num_steps": 7, "warmup_type": "linear"}


def engine(num_stages: int, micro_batches: int, optimizer: str, ddg: dict[str, Any] | None, **more: Any) -> Any:
    """Make a DDG engine, or DeepSpeed's own if `ddg` is None, with a scheduler."""
    scheduler = {"type": "WarmupLR", "params": WARMUP}
    initialize = deepspeed.initialize if ddg is None else None
    return toy.engine(
        num_stages, micro_batches, optimizer, ddg, initialize=initialize, scheduler=scheduler, **more
    )  # fmt: skip


def start_elsewhere(engine: Any) -> None:
    """Give the engine other weights than every engine starts from."""
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.add_(torch.randn_like(parameter))


def skip(data: Iterator[Any], count: int) -> Iterator[Any]:
    return itertools.islice(data, count, None)


def snapshot(engine: Any) -> dict[str, Any]:
    """Return all that a checkpoint is to bring back."""
    optimizer = engine.optimizer.state_dict()
    return {
        "weights": toy.state(engine.module),
        "optimizer": {k: {n: torch.as_tensor(v).clone() for n, v in s.items()} for k, s in optimizer["state"].items()},
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer["param_groups"]],
        "scheduler": dict(engine.lr_scheduler.state_dict()),
        "counts": (engine.global_steps, engine.global_samples, engine.skipped_steps, tuple(engine.get_lr())),
    }


def assert_same(ours: Any, theirs: Any, *only: str) -> None:
    """Assert that two snapshots (or the named parts) are equal to the last bit."""
    __tracebackhide__ = True
    for name in only or theirs:
        assert same(ours[name], theirs[name]), name


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def train(engine: Any, data: Iterator[Any], calls: int) -> list[tuple[Any, ...]]:
    seen = []
    for _ in range(calls):
        loss = float(engine.train_batch(data))
        seen.append((loss, engine.loss_step, engine.global_steps, engine.global_samples, tuple(engine.get_lr())))
    return seen


def go_on(rank: int, world_size: int, directory: str, num_stages: int, forms: Any, ddg: dict[str, Any]) -> list[Any]:
    """Compare run A, 5 calls, save, 4 more, with run B: another start, 2 calls of its own, load, the same 4."""
    found = []
    for micro_batches, weights, optimizer in forms:
        tag = f"{micro_batches}{weights}{optimizer}"
        settings = {**ddg, "weights": weights}
        a = engine(num_stages, micro_batches, optimizer, settings)
        seed = rank // num_stages
        data = toy.batches(9 * micro_batches, seed=seed)
        train(a, data, 5)
        a.save_checkpoint(directory, tag=tag, client_state={"rng": torch.get_rng_state(), "epoch": 3})
        ours = train(a, data, 4)
        a.drain()

        b = engine(num_stages, micro_batches, optimizer, settings)
        start_elsewhere(b)
        train(b, toy.batches(9 * micro_batches, seed=99), 2)
        flight = b.versions.in_flight
        _, state = b.load_checkpoint(directory, tag=tag)
        assert flight > 0 or b.is_last_stage()
        assert (b.global_steps, b.loss_step, state["epoch"]) == (5, 4, 3)
        assert "ds_ddg" not in state
        torch.set_rng_state(state["rng"].cpu())
        theirs = train(b, skip(toy.batches(9 * micro_batches, seed=seed), 5 * micro_batches), 4)
        b.drain()
        found.append((tag, ours, theirs, snapshot(a), snapshot(b)))
    return found


def assert_resumed(results: list[list[Any]], forms: int) -> None:
    __tracebackhide__ = True
    for found in results:
        assert len(found) == forms
        for tag, ours, theirs, a, b in found:
            assert ours == theirs, tag
            assert_same(a, b)


class Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).bfloat16()


def zero_engine(num_stages: int, weights: str) -> Any:
    """Make an engine in bf16, the optimizer's fp32 weights and state partitioned over the replicas."""
    from deepspeed.pipe import PipelineModule

    import ds_ddg

    torch.manual_seed(7)
    layers = [nn.Sequential(Cast(), nn.Linear(48, 12)), *(toy.Residual(12) for _ in range(4)), nn.Linear(12, 5)]
    net = PipelineModule(
        layers, num_stages=num_stages, loss_fn=lambda x, y: toy.loss_fn(x.float(), y), partition_method="uniform"
    )
    torch.manual_seed(11)
    more = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
    return ds_ddg.initialize(
        model=net,
        config=toy.config(2, {"weights": weights}, **more),
        optimizer=toy.OPTIMIZERS["adamw"],
        model_parameters=net.parameters(),
    )[0]
