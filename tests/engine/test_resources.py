"""What the engine uses: no collective across stages, no more memory than the plan says, nothing after a drain."""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers import toy
from helpers.census import census
from helpers.distributed import GetRanks

# -- collectives ------------------------------------------------------------------------------------------------------


def take_the_census(rank: int, world_size: int) -> list[tuple[str, int]]:
    import deepspeed.comm

    pair = dist.new_group([0, 1])
    parts = [torch.zeros(1), torch.zeros(1)]
    one, objects = torch.zeros(1), [None, None]
    calls = {
        "all_reduce": lambda: dist.all_reduce(one, group=pair),
        "broadcast": lambda: dist.broadcast(one, 0, group=pair),
        "reduce": lambda: dist.reduce(one, 0, group=pair),
        "barrier": lambda: dist.barrier(group=pair),
        "monitored_barrier": lambda: dist.monitored_barrier(group=pair),
        "all_gather": lambda: dist.all_gather(parts, one, group=pair),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(torch.zeros(2), one, group=pair),
        "reduce_scatter": lambda: dist.reduce_scatter(one, parts, group=pair),
        "gather": lambda: dist.gather(one, parts if rank == 0 else None, 0, group=pair),
        "scatter": lambda: dist.scatter(one, parts if rank == 0 else None, 0, group=pair),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.zeros(2), torch.zeros(2), group=pair),
        "all_gather_object": lambda: dist.all_gather_object(objects, rank, group=pair),
        "broadcast_object_list": lambda: dist.broadcast_object_list(objects, 0, group=pair),
        "deepspeed all_reduce": lambda: deepspeed.comm.all_reduce(one, group=pair),
        "deepspeed broadcast": lambda: deepspeed.comm.broadcast(one, 0, group=pair),
        "deepspeed barrier": lambda: deepspeed.comm.barrier(group=pair),
        "async": lambda: dist.all_reduce(one, group=pair, async_op=True).wait(),
        "point to point": lambda: dist.send(one, 1, group=pair) if rank == 0 else dist.recv(one, 0, group=pair),
    }
    found = []
    for name, call in calls.items():
        with census() as seen:
            call()
        assert all(ranks == (0, 1) for _, ranks in seen)
        found.append((name, seen.total()))
    with census() as seen:
        pass
    dist.barrier()
    assert not seen, "counts after its end"
    return found


def test_census_misses_no_collective(ranks: GetRanks) -> None:
    for found in ranks(2).run(take_the_census):
        assert {name for name, count in found if count == 0} == {"point to point"}


def collectives_of_train_batch(
    rank: int, world_size: int, stages: int, micro_batches: int, ddg: dict[str, Any]
) -> tuple[float, int, int]:
    """Gradient clipping, and collectives across and inside stages in calls of the filled pipeline."""

    def with_default_clipping(config: dict[str, Any], **kwargs: Any) -> Any:
        import ds_ddg

        del config["gradient_clipping"]
        return ds_ddg.initialize(config=config, **kwargs)

    scheduler = {"type": "WarmupLR", "params": {}}
    engine = toy.engine(stages, micro_batches, "adam", ddg, initialize=with_default_clipping, scheduler=scheduler)
    stage_of = [engine.grid.topology().get_coord(r).pipe for r in range(world_size)]
    data = toy.batches(12 * micro_batches, seed=engine.grid.get_data_parallel_rank())
    for _ in range(6):
        engine.train_batch(data)
    with census() as seen:
        for _ in range(6):
            engine.train_batch(data)
    engine.drain()
    across = {key: count for key, count in seen.items() if len({stage_of[r] for r in key[1]}) > 1}
    print(across)
    return engine.gradient_clipping(), sum(across.values()), seen.total() - sum(across.values())


LAYOUTS = [(2, 4, 1), (2, 4, 2), (3, 3, 1)]
"""Stages, ranks, micro-batches."""


@pytest.mark.parametrize("ddg", [{}, {"weights": "current", "activations": "recompute", "slack": 1, "loss": "exact"}])
@pytest.mark.parametrize(("stages", "world_size", "micro_batches"), LAYOUTS)
def test_no_collective_crosses_stages(
    ranks: GetRanks, stages: int, world_size: int, micro_batches: int, ddg: dict[str, Any]
) -> None:
    for clip, across, inside in ranks(world_size).run(collectives_of_train_batch, stages, micro_batches, ddg):
        assert clip == 1.0, "DeepSpeed's default, which is what all-reduces the norm over the stages"
        assert across == 0
        # Replicas reduce their gradients; a stage without one has nothing to reduce.
        assert (inside > 0) == (world_size > stages)


def messages_of_train_batch(rank: int, world_size: int, micro_batches: int, ddg: dict[str, Any]) -> list[int]:
    """Messages that this stage sends in each call of the filled pipeline."""
    from ds_ddg.comm.sender import Sender

    engine = toy.engine(world_size, micro_batches, ddg=ddg)
    data = toy.batches(12 * micro_batches)
    counts, post = [0], Sender.post

    def counting(*args: Any, **kwargs: Any) -> None:
        counts[-1] += 1
        post(*args, **kwargs)

    for _ in range(6):
        engine.train_batch(data)
    Sender.post = counting  # type: ignore[method-assign]
    try:
        for _ in range(6):
            engine.train_batch(data)
            counts.append(0)
    finally:
        Sender.post = post  # type: ignore[method-assign]
    engine.drain()
    return counts[:-1]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_stage_sends_one_message_each_way_per_micro_batch(ranks: GetRanks, micro_batches: int) -> None:
    """Losses and measurements ride on them; a message costs as much as all the arithmetic of a small stage."""
    expected = [[ways * micro_batches] * 6 for ways in (1, 2, 1)]
    assert ranks(3).run(messages_of_train_batch, micro_batches, {}) == expected
    exact = [[ways * micro_batches] * 6 for ways in (1, 2)] + [[micro_batches + 2] * 6]
    assert ranks(3).run(messages_of_train_batch, micro_batches, {"loss": "exact"}) == exact


@pytest.mark.parametrize(("stages", "world_size", "micro_batches"), LAYOUTS)
def test_deepspeeds_own_schedule_is_caught(ranks: GetRanks, stages: int, world_size: int, micro_batches: int) -> None:
    ddg = {"enabled": False}
    for clip, across, _ in ranks(world_size).run(collectives_of_train_batch, stages, micro_batches, ddg):
        assert clip == 1.0
        assert across >= 2 * 6, "the loss and the norm, in each call"


# -- what is alive ----------------------------------------------------------------------------------------------------

WIDTH = 11
"""Of every layer; no batch is as large, so weights are told by their shape."""


class Graph:
    """Lives as long as the autograd graph of one forward."""


_GRAPHS: weakref.WeakSet[Graph] = weakref.WeakSet()


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if any(ctx.needs_input_grad):
            ctx.graph = Graph()
            _GRAPHS.add(ctx.graph)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Watched(nn.Module):
    """One weight and one graph a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return _Watch.apply(torch.tanh(self.linear(x)))


def tiny_engine(stages: int, micro_batches: int, ddg: dict[str, Any]) -> Any:
    """One layer a stage."""
    from deepspeed.pipe import LayerSpec, PipelineModule

    import ds_ddg

    specs = [LayerSpec(Watched) for _ in range(stages)]  # layers of other stages would be counted with its own
    net = PipelineModule(specs, num_stages=stages, loss_fn=nn.functional.mse_loss)
    engine, *_ = ds_ddg.initialize(
        model=net,
        config=toy.config(micro_batches, ddg),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
        model_parameters=net.parameters(),
    )
    return engine


def tiny_batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(count):
        yield torch.randn(4, WIDTH), torch.randn(4, WIDTH)


def live_tensors() -> list[Tensor]:
    return [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]


def weights_in_memory(engine: Any) -> int:
    """Counted by the memory they take, not by the engine's word."""
    found = {t.untyped_storage().data_ptr() for t in live_tensors() if t.shape == (WIDTH, WIDTH)}
    gradients = {p.grad.untyped_storage().data_ptr() for p in engine.module.parameters() if p.grad is not None}
    return len(found - gradients)


def sample_every_instruction(
    rank: int, world_size: int, micro_batches: int, ddg: dict[str, Any]
) -> dict[str, tuple[int, int]]:
    """The most that was alive after any instruction, and after a drain."""
    engine = tiny_engine(world_size, micro_batches, ddg)
    samples: dict[str, list[int]] = {"weights": [], "versions": [], "inputs": [], "in flight": [], "graphs": []}

    def sample() -> None:
        samples["weights"].append(weights_in_memory(engine))
        samples["versions"].append(engine.versions.alive)
        samples["inputs"].append(sum(slot is not None for slot in engine.pipe_buffers["inputs"]))
        samples["in flight"].append(engine.versions.in_flight)
        samples["graphs"].append(len(_GRAPHS))

    def sampled(execute: Callable[..., None]) -> Callable[..., None]:
        def method(self: Any, **kwargs: Any) -> None:
            execute(self, **kwargs)
            sample()

        return method

    engine._INSTRUCTION_MAP = {kind: sampled(execute) for kind, execute in engine._INSTRUCTION_MAP.items()}
    data = tiny_batches(100)
    for calls in (8, 5):  # the second time from an empty pipeline
        for _ in range(calls):
            engine.train_batch(data)
        engine.drain()
    gc.collect()
    sample()
    return {name: (max(values), values[-1]) for name, values in samples.items()}


@pytest.mark.parametrize(
    ("micro_batches", "slack", "weights", "activations"),
    [
        (1, 0, "stash", "keep"),
        (2, 1, "stash", "keep"),
        (4, 0, "stash", "recompute"),
        (1, 1, "stash", "recompute"),
        (1, 1, "current", "keep"),
        (2, 0, "current", "recompute"),
    ],
)
def test_no_more_is_alive_than_the_plan_says(
    ranks: GetRanks, micro_batches: int, slack: int, weights: str, activations: str
) -> None:
    """The bounds of the paper's Table 1, in its terms ceil(d_k / M) + 1 and d_k + 1; and they are reached."""
    ddg = {"slack": slack, "weights": weights, "activations": activations}
    for stage, alive in enumerate(ranks(3).run(sample_every_instruction, micro_batches, ddg)):
        delay = (2 - stage) * (1 + slack)
        versions = -(-delay // micro_batches) + 1 if weights == "stash" else 1
        graphs = delay + 1 if activations == "keep" or stage == 2 else 0
        assert alive == {
            "weights": (versions, 1),
            "versions": (versions, 1),
            "inputs": (delay + 1, 0),
            "in flight": (delay + 1, 0),
            "graphs": (graphs, 0),
        }, f"stage {stage}"


def graphs() -> list[Tensor]:
    """Tensors that keep an autograd graph alive."""
    return [t for t in live_tensors() if t.grad_fn is not None]


def drain_and_look(rank: int, world_size: int, ddg: dict[str, Any], tuples: bool) -> list[str]:
    """What is still there after a drain."""
    before = graphs()  # this process has had other engines
    engine = toy.engine(world_size, 2, "adam", ddg, tuples)
    left = []
    for calls in (1, 6):
        data = toy.batches(2 * calls + 2)
        for _ in range(calls):
            engine.train_batch(data)
        engine.eval_batch(data)
        engine.drain()
        gc.collect()
        left += [f"{name} {slots}" for name, slots in engine.pipe_buffers.items() if any(s is not None for s in slots)]
        new = [t for t in graphs() if all(t is not other for other in before)]
        left += [f"graph of {tuple(t.shape)} {t.grad_fn}" for t in new]
        left += [f"gradient of {name}" for name, p in engine.module.named_parameters() if p.grad is not None]
        if engine._links.pending:
            left.append(f"{engine._links.pending} messages")
        if engine.versions.alive > 1:
            left.append(f"{engine.versions.alive} versions")
        engine.versions.assert_empty()
    return left


@pytest.mark.parametrize("tuples", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize("weights", ["stash", "current"])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_nothing_is_left_after_a_drain(ranks: GetRanks, weights: str, activations: str, tuples: bool) -> None:
    ddg = {"weights": weights, "activations": activations, "slack": 1}
    assert ranks(3).run(drain_and_look, ddg, tuples) == [[]] * 3


# -- a thousand calls -------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def use_of_memory(rank: int, world_size: int, name: str, calls: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """After so many calls: live tensors, live Python objects, pending messages, resident bytes."""
    engine = tiny_engine(world_size, 1, {})
    engine.schedule = name
    data = tiny_batches(max(calls) + 1)
    seen = []
    for t in range(1, max(calls) + 1):
        engine.train_batch(data)
        if t in calls:
            gc.collect()
            # Gloo's threads hold the loss that DeepSpeed's schedule broadcasts a moment longer than that takes.
            looks = []
            for _ in range(5):
                looks.append((len(live_tensors()), len(gc.get_objects())))
                time.sleep(0.02)
            tensors, objects = min(looks)
            seen.append((tensors, objects, engine._links.pending, resident_bytes()))
    engine.drain()
    return seen


@pytest.mark.parametrize("schedule", ["ddg", "1f1b"])
def test_memory_is_flat(ranks: GetRanks, schedule: str) -> None:
    for stage, (early, late) in enumerate(ranks(2).run(use_of_memory, schedule, (200, 1000), timeout=120)):
        where = f"stage {stage}: after 200 calls {early}, after 1000 {late}"
        assert late[0] <= early[0], f"tensors, {where}"
        assert abs(late[1] - early[1]) < 200, f"objects, {where}"
        assert abs(late[2] - early[2]) <= 1, f"messages, {where}"
        assert late[3] - early[3] < 3 * 2**20, f"bytes, {where}"  # the allocator settles within 2 MB


def count_threads(rank: int, world_size: int) -> int:
    engine = tiny_engine(world_size, 1, {})
    data = tiny_batches(4)
    for _ in range(4):
        engine.train_batch(data)
    engine.drain()
    return len(os.listdir("/proc/self/task"))


def test_engines_of_the_past_keep_no_threads(ranks: GetRanks) -> None:
    """A process group has a thread that wakes up a hundred times a second; links of destroyed ones let go of it."""
    ranks(2).run(count_threads)
    counts = [ranks(2).run(count_threads)[0] for _ in range(4)]
    assert max(counts) == min(counts), counts


# -- forked children --------------------------------------------------------------------------------------------------


def fork_beside_a_dropped_engine(rank: int, world_size: int) -> tuple[list[int], int]:
    """How children end that free what this process has dropped, and the calls of an engine that is trained after."""
    ends = []
    for _ in range(3):
        engine = tiny_engine(world_size, 1, {})
        data = tiny_batches(20)
        for _ in range(4):
            engine.train_batch(data)  # and no drain: messages are on their way
        del engine
        child = os.fork()
        if child == 0:
            gc.collect()
            os._exit(0)
        ends.append(os.waitpid(child, 0)[1])
    engine = tiny_engine(world_size, 1, {})
    for _ in range(4):
        engine.train_batch(data)
    return ends, engine.global_steps


def test_a_forked_child_leaves_its_parents_connections(ranks: GetRanks) -> None:
    """A DataLoader's worker is one. It has the same sockets, over which gloo would take back pending receives."""
    assert ranks(2).run(fork_beside_a_dropped_engine, timeout=60) == [([0, 0, 0], 4)] * 2
