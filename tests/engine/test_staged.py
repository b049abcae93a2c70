"""Stages that compute on a device, without one: a stand-in copies, the engine trains as it does on CPU.

What only differs on a device is here, too. On a GPU: tests/gpu.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_ddg.comm.p2p import StageError
from ds_ddg.engine.compatibility import refuse_unsupported
from ds_ddg.host import without_greetings
from ds_ddg.weights.recompute import ForwardState
from helpers import tied_runs as tied
from helpers import toy
from helpers.distributed import GetRanks
from helpers.exact_runs import Case, Course, assert_exact, train_oracle
from helpers.exact_runs import train_engine as train_exactly
from helpers.paths import TESTS
from helpers.script_runs import NOISE, launch
from helpers.slow_copies import CPU, TIMEOUT, senders, staged

pytestmark = pytest.mark.usefixtures("one_thread")


# -- the engine -------------------------------------------------------------------------------------------------------


def train_staged(rank: int, world_size: int, case: Case) -> tuple[Course, int]:
    with staged() as made:
        course = train_exactly(rank, world_size, case, {})
    return course, sum("copy to the host" in line for line in made.log)


@pytest.mark.parametrize(
    "case",
    [
        Case(3, 1),
        Case(3, 2, activations="recompute", tuples=True, optimizer="adamw"),
        Case(3, 1, slack=1, weights="current", tuples=True),
        Case(2, 2, weights="current", activations="recompute", clip=0.05),
    ],
    ids=str,
)
def test_engine_equals_the_oracle(ranks: GetRanks, case: Case) -> None:
    made = ranks(case.stages).run(train_staged, case, timeout=TIMEOUT)
    assert all(copies for _, copies in made), "every stage sends something"
    assert_exact(case, [course for course, _ in made], train_oracle(case))


def train_tied(rank: int, world_size: int, setting: dict[str, Any]) -> tied.Result:
    with staged():
        return tied.train_engine(rank, world_size, setting, world_size, {})


def test_tied_weights_equal_the_oracle(ranks: GetRanks) -> None:
    setting = {"three": True, "micro_batches": 2, "ddg": {}, "optimizer": "adamw"}
    tied.assert_exact(ranks(3).run(train_tied, setting, timeout=TIMEOUT), setting, 3)


def drain_and_evaluate(rank: int, world_size: int) -> tuple[int, int, int, float]:
    """Messages and versions after a drain, threads then, and the loss of an evaluation with calls in flight."""
    with staged():
        engine = toy.engine(world_size, 1, ddg={"slack": 1})
        data = toy.batches(20)
        for _ in range(6):
            engine.train_batch(data)
        loss = float(engine.eval_batch(toy.batches(1, seed=5)))
        engine.drain()
        left = engine._links.pending, engine.versions.alive
        engine.versions.assert_empty()
        return *left, senders(), loss


def test_drain_leaves_nothing(ranks: GetRanks) -> None:
    made = ranks(3).run(drain_and_evaluate, timeout=TIMEOUT)
    assert [row[:3] for row in made] == [(0, 1, 1)] * 3
    assert len({row[3] for row in made}) == 1


def wait_for_pinned(rank: int, world_size: int) -> int:
    """How often the host waited for its data in five calls of training and one of evaluation."""
    with staged() as made, mock.patch.object(torch.Tensor, "is_pinned", return_value=True):
        engine = toy.engine(world_size, 2)
        data = toy.batches(10)
        for _ in range(5):
            engine.train_batch(data)
        engine.eval_batch(toy.batches(2))
        engine.drain()
    return made.waits


def test_stages_with_data_wait_for_it(ranks: GetRanks) -> None:
    assert ranks(3).run(wait_for_pinned, timeout=TIMEOUT) == [6, 0, 6]


class Elsewhere(torch.nn.Module):
    """Puts out what is on another device."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to("meta")


def send_from_elsewhere(rank: int, world_size: int) -> str:
    layers = [torch.nn.Flatten(), Elsewhere(), *toy_head()]
    with mock.patch.object(toy, "layers", return_value=layers):
        engine = toy.engine(world_size, 1)
    with pytest.raises((ValueError, StageError)) as caught:
        engine.train_batch(toy.batches(1))
    return str(caught.value)


def toy_head() -> list[torch.nn.Module]:
    return [torch.nn.Linear(48, 5), torch.nn.Identity()]


def test_output_on_another_device_ends_every_stage(ranks: GetRanks) -> None:
    for said in ranks(2).run(send_from_elsewhere, timeout=TIMEOUT):
        assert "tensor 0 of those that leave this stage is on meta, and the stage computes on cpu" in said


def break_the_device(rank: int, world_size: int, broken: int) -> tuple[str, bool]:
    """What is raised, and whether the engine outlives its script's last use of it."""
    text = "nothing"
    with staged() as made:
        engine = toy.engine(world_size, 1)
        reference = weakref.ref(engine)
        data = toy.batches(200)
        for call in range(200):
            made.defect = "out of magic" if (rank, call >= 5) == (broken, True) else ""
            try:
                engine.train_batch(data)
            except StageError as error:
                text = str(error)
                break
        del engine
        gc.collect()
    return text, reference() is not None


@pytest.mark.parametrize("broken", [1, 2])
def test_broken_device_ends_every_stage(ranks: GetRanks, broken: int) -> None:
    ends = ranks(3).run(break_the_device, broken, timeout=30.0)
    for text, _ in ends:
        assert text.startswith(f"rank {broken}: a message to stage ")
        assert text.endswith("could not be copied to the host: out of magic")
    # Only of the last stage: elsewhere the activations in flight hold DeepSpeed's hooks, and those the engine.
    assert ends[2][1] == (broken == 2), "memory of a lost device must not be freed, all else must be"


SCRIPT = """
import sys

sys.path.insert(0, {tests!r})
import torch
from helpers import slow_copies, toy

import deepspeed

stays = slow_copies.staged(0.05)
stays.__enter__()
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed()
engine = toy.engine(2, 1, ddg={{"slack": 1}})
data = toy.batches(10)
for _ in range(10):
    engine.train_batch(data)
print(f"rank {{engine.global_rank}} trained {{engine.global_steps}} calls", flush=True)
"""


def test_script_ends_with_messages_on_their_way(tmp_path: Path) -> None:
    """The sender's thread ends before the stages take leave of each other, which must do without it."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(TESTS)))
    status, output, _ = launch(script, "just end")
    assert status == 0, output
    for rank in range(2):
        assert f"rank {rank} trained 10 calls" in output
    assert not NOISE.search(output), output


# -- what differs on a device -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [False, True])
def test_forward_runs_again_under_the_same_circumstances(enabled: bool) -> None:
    layer, dropout, x = torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.randn(4, 8)
    with torch.autocast("cpu", enabled=enabled):
        forward_state = ForwardState(CPU)
        first = dropout(layer(x))
    after = torch.get_rng_state()
    with torch.autocast("cpu", enabled=not enabled), forward_state.restored():
        second = dropout(layer(x))
    assert first.dtype == (torch.bfloat16 if enabled else torch.float32)
    assert torch.equal(first, second)
    assert first.dtype == second.dtype
    assert torch.equal(torch.get_rng_state(), after)


def peers(rank: int, world_size: int) -> tuple[list[list[int]], list[int], float]:
    """Ranks of the groups in which the ranks of a stage agree, with GPUs; what one of them agrees on on the CPU."""
    from deepspeed.pipe import PipelineModule

    from ds_ddg.engine.assembly import groups_of_stage

    net = PipelineModule(toy.layers(), num_stages=2, loss_fn=toy.loss_fn)
    host: Any = SimpleNamespace(device=torch.device("cuda:0"), grid=net.mpu(), global_rank=rank)
    groups = groups_of_stage(host)
    total = torch.tensor(float(rank))
    dist.all_reduce(total, group=groups[0])
    replicas = dist.get_process_group_ranks(net.mpu().get_data_parallel_group())
    return [dist.get_process_group_ranks(group) for group in groups], replicas, float(total)


def test_ranks_of_a_stage_agree_without_their_devices(ranks: GetRanks) -> None:
    for groups, replicas, total in ranks(4).run(peers):
        assert groups == [replicas]
        assert total == sum(replicas)


def accelerator(name: str) -> Any:
    """Inside this block DeepSpeed's accelerator has another name, and nothing else."""
    named = mock.Mock(spec=["device_name"])
    named.device_name.return_value = name
    return mock.patch("deepspeed.accelerator.get_accelerator", return_value=named)


def settings(rank: int, world_size: int, name: str, block: dict[str, Any]) -> str:
    """What is refused of a set-up on the accelerator `name`."""
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.config import DeepSpeedConfig

    net = PipelineModule(toy.layers(), num_stages=world_size, loss_fn=toy.loss_fn)
    config = DeepSpeedConfig(toy.config(1, block), mpu=net.mpu())
    with accelerator(name):
        try:
            refuse_unsupported(config, net, block.get("enabled", True))
        except ValueError as error:
            return str(error)
    return ""


def test_other_accelerators_are_refused_by_name(ranks: GetRanks) -> None:
    for text in ranks(2).run(settings, "xpu", {}):
        assert "accelerator 'xpu': not supported" in text
    assert ranks(2).run(settings, "cuda", {}) == ["", ""]


@pytest.mark.parametrize("block", [{"sync_steps": 2}, {"enabled": False}], ids=str)
def test_deepspeeds_schedule_is_refused_if_it_cannot_send(ranks: GetRanks, block: dict[str, Any]) -> None:
    for text in ranks(2).run(settings, "cuda", block):
        assert text.startswith("DDG cannot" if block.get("enabled", True) else "DeepSpeed's schedule cannot")
        assert "1F1B of GPU stages over gloo" in text
        assert "nccl" in text


def greet(rank: int, world_size: int, name: str) -> tuple[bool, bool]:
    """Whether DeepSpeed's sends are left out inside the block, and after an error in it."""
    from deepspeed.runtime.pipe import p2p

    send, inside = p2p.send, []

    def fail() -> None:
        with accelerator(name), without_greetings():
            inside.append(p2p.send is not send)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    return inside[0], p2p.send is not send


def test_greetings_are_left_out_on_a_device_alone(ranks: GetRanks) -> None:
    assert ranks(2).run(greet, "cuda") == [(True, False)] * 2
    assert ranks(2).run(greet, "cpu") == [(False, False)] * 2
