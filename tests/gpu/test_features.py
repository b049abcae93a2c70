"""What works on CPU works on stages that share a GPU: as on CPU to rounding, or as on the same GPU to the last bit."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_ddg.analysis.trace_reader import read
from helpers import failing, fp16_runs, resuming, tied_runs, toy, wire_layers
from helpers.devices import DEVICE, device, launch, needs_kernels, random_state_of_the_device
from helpers.formats import FORMATS, train_replicas
from helpers.formats import train_engine as train_format
from helpers.model_features import JSON, REPLAY, STASH, checkpointing, from_json, pictures
from helpers.modes import DEFAULT
from helpers.paths import ROOT
from helpers.versus import Made, Setup, adamw, gaps, run_engine

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(600)]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}


# -- against the engine on CPU ----------------------------------------------------------------------------------------


def train_without_dropout(rank: int, world_size: int, what: str) -> tuple[list[float], list[Tensor]]:
    """Losses and the state of the stage; other devices have other random numbers, so there are none."""
    with mock.patch.object(nn.Dropout, "forward", lambda _, x: x):
        if what == "tied":
            setting = {"three": world_size == 3, "micro_batches": 2, "ddg": {}, "optimizer": "sgd", "evaluate": True}
            tied = tied_runs.train_engine(rank, world_size, setting, world_size, {})
            return [*tied.losses, *tied.evaluated], tied.states
        result = train_format(rank, world_size, what, 2, "sgd", {}, 1.0)
    return [float(loss) for loss in result.losses], result.states


def assert_as_on_the_cpu(there: Any, here: Any, tolerance: float) -> None:
    """By rank, losses and tensors of a run."""
    for (losses, states), (expected_losses, expected) in zip(there, here, strict=True):
        assert losses == pytest.approx(expected_losses, rel=tolerance, abs=tolerance)
        for a, b in zip(states, expected, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance)
    first, last = there[0][0][0], there[0][0][-1]
    assert abs(first - last) > 2 * tolerance, "it does not train"


def tolerance_of(name: str) -> float:
    return TOLERANCE[torch.bfloat16 if FORMATS[name].autocast else FORMATS[name].weights]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.proves(f"GPU stages: {name}", exact=False, modes=DEFAULT))
        for name in FORMATS
    ],
)
def test_formats(name: str) -> None:
    there, here = (launch(train_without_dropout, 2, name, device=where) for where in (DEVICE, "cpu"))
    assert_as_on_the_cpu(there, here, tolerance_of(name))


@pytest.mark.proves("GPU stages: tied weights", exact=False, modes=DEFAULT)
def test_tied_weights() -> None:
    there, here = (launch(train_without_dropout, 3, "tied", device=where) for where in (DEVICE, "cpu"))
    assert_as_on_the_cpu(there, here, TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["fp32, ZeRO-1", "bf16, ZeRO-1"])
@pytest.mark.proves("GPU stages: data x pipeline, ZeRO-1", exact=False, modes=DEFAULT)
def test_replicas(name: str) -> None:
    """All four ranks on one device, their collectives over gloo."""
    there, here = (launch(train_replicas, 4, name, device=where) for where in (DEVICE, "cpu"))
    for ours, expected in zip(there, here, strict=True):
        for a, b in zip(ours.states, expected.states, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=tolerance_of(name), atol=tolerance_of(name))


def train_kinds(rank: int, world_size: int, setup: Setup) -> Made:
    """Without dropout; the layer that makes tensors of its own makes them on the device."""
    enter = wire_layers.Enter.forward

    def there(self: Any, values: Any) -> Any:
        with device():
            return enter(self, values)

    with (
        mock.patch.object(nn.Dropout, "forward", lambda _, x: x),
        mock.patch.object(wire_layers.Enter, "forward", there),
    ):
        return run_engine(rank, world_size, setup)


@pytest.mark.parametrize("ddg", [*STASH, REPLAY], ids=str)
@pytest.mark.proves("GPU stages: bool, integer, complex, 0-dim and empty tensors in tuples", exact=False, modes="ddg")
def test_every_kind_of_tensor(ddg: dict[str, Any]) -> None:
    setup = Setup(
        wire_layers.every_kind, wire_layers.labelled_by_two, stages=3, ddg=ddg, loss_fn=wire_layers.loss_of_two
    )
    there, here = (launch(train_kinds, 3, setup, device=where) for where in (DEVICE, "cpu"))
    assert_close(there, here)


@pytest.mark.proves("GPU stages: changing shapes", exact=False, modes=DEFAULT)
def test_shapes_change_with_micro_batches_in_flight() -> None:
    data = partial(wire_layers.sequences, (20, 33, 50), each=3)
    setup = Setup(wire_layers.any_length, data, stages=3, micro_batches=1, before=wire_layers.say_so)
    there, here = (launch(train_kinds, 3, setup, device=where) for where in (DEVICE, "cpu"))
    assert_close(there, here)


def assert_close(there: list[Made], here: list[Made]) -> None:
    for (losses, moments), (expected_losses, expected) in zip(there, here, strict=True):
        assert [call for call, _ in losses] == [call for call, _ in expected_losses]
        assert [x for _, x in losses] == pytest.approx([x for _, x in expected_losses], rel=1e-4, abs=1e-4)
        for state, its in zip(moments, expected, strict=True):
            for a, b in zip(state, its, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# -- on the device alone ----------------------------------------------------------------------------------------------

FP16 = [
    pytest.param(
        config, id=name, marks=pytest.mark.proves(f"GPU stages: {name}, dynamic scale", modes=DEFAULT, exact=False)
    )
    for name, config in fp16_runs.OPTIMIZERS.items()
]


@pytest.mark.parametrize("config", FP16)
def test_loss_scales(config: dict[str, Any]) -> None:
    """DeepSpeed's fp16 as it is meant to run: one stage overflows, and scales that differ change nothing."""
    job = fp16_runs.train
    fp16_runs.assert_overflow_is_its_own(launch(job, 3, config, [24, 10, 10], 1, {}))
    same, differing = (launch(job, 3, config, powers, 2, {}) for powers in ([10, 10, 10], [12, 9, 11]))
    fp16_runs.assert_scales_change_nothing(same, differing)


def train_all(rank: int, world_size: int, setups: list[Setup]) -> list[Made]:
    return [run_engine(rank, world_size, setup) for setup in setups]


@pytest.mark.parametrize("ddg", [*STASH, REPLAY], ids=str)
@pytest.mark.proves("GPU stages: activation checkpointing, reentrant and not", modes="ddg")
def test_checkpointing_changes_no_number(ddg: dict[str, Any]) -> None:
    common = {"stages": 2, "loss_fn": toy.loss_fn, "optimizer": adamw, "ddg": ddg}
    plain = Setup(partial(pictures, False), toy_batches, **common)  # type: ignore[arg-type]
    setups = [plain, *(replace(plain, **checkpointing(kind, 1)) for kind in ("reentrant", "not reentrant", "torch"))]
    for stage, (expected, *others) in enumerate(launch(train_all, 2, setups)):
        for other in others:
            assert not gaps(other, expected), f"stage {stage}"


def toy_batches() -> Iterator[Any]:
    return toy.batches(1000)


def go_on(rank: int, world_size: int, directory: str, forms: Any) -> list[Any]:
    with random_state_of_the_device():
        return resuming.go_on(rank, world_size, directory, world_size, forms, {})


@pytest.mark.proves("GPU stages: resuming from a checkpoint", modes=[("stash", "keep"), ("current", "keep")])
def test_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    forms = ((1, "stash", "adamw"), (4, "current", "sgd"))
    resuming.assert_resumed(launch(go_on, 2, str(tmp_path), forms), len(forms))


def plain_layers() -> list[nn.Module]:
    torch.manual_seed(7)
    blocks = [toy.Residual(12) for _ in range(2)]
    for block in blocks:
        block.drop.p = 0.0
    return [nn.Flatten(1), nn.Linear(48, 12), *blocks, nn.Linear(12, 5)]


@pytest.mark.skipif(shutil.which("nvcc") is None and DEVICE != "cpu", reason="DeepSpeed compiles FusedAdam with nvcc")
@pytest.mark.proves("GPU stages: DeepSpeed's FusedAdam (the JSON's AdamW)", exact=False, modes=DEFAULT)
def test_fused_adam() -> None:
    """It does what torch's does, in a kernel that autograd does not see."""
    torchs = Setup(plain_layers, toy_batches, loss_fn=toy.loss_fn, arguments=from_json, config=JSON)
    params = {k: v for k, v in JSON["optimizer"]["params"].items() if k != "torch_adam"}
    fused = replace(torchs, config={"optimizer": {**JSON["optimizer"], "params": params}})
    ninja = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # DeepSpeed asks the device instead; it does not understand an architecture such as "9.0a".
    with mock.patch.dict(os.environ, PATH=ninja, TORCH_CUDA_ARCH_LIST=""):
        for expected, ours in launch(train_all, 2, [torchs, fused]):
            assert_close([ours], [expected])


# -- what is measured -------------------------------------------------------------------------------------------------

CYCLES = 40_000_000
"""Of the GPU's clock, tens of milliseconds."""


class Slow(nn.Linear):
    """Keeps the device busy, not the host."""

    def forward(self, x: Tensor) -> Tensor:
        torch.cuda._sleep(CYCLES)
        return super().forward(x)


def train_slow(rank: int, world_size: int, folder: str) -> tuple[float, str, float]:
    """Milliseconds of a `Slow` alone, what ``"slack": "auto"`` said, and the busy share at the end."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(world_size):
        if turn == rank:
            for event in (first, last):
                torch.cuda._sleep(CYCLES)
                event.record()
            last.synchronize()
        dist.barrier()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        width = failing.WIDTH
        ddg = {"slack": "auto", "trace": folder}
        engine = failing.build(world_size, [Slow(width, width) for _ in range(world_size)], ddg=ddg)
        data = failing.batches()
        for _ in range(30):
            engine.train_batch(data)
        busy = engine.ddg_stats()["busy"]
        engine.drain()
    return first.elapsed_time(last), said.getvalue(), busy


@needs_kernels
@pytest.mark.proves('GPU stages: "slack": "auto" and "trace" by the time of the device', exact=False, modes=DEFAULT)
def test_times_are_those_of_the_device(tmp_path: Path) -> None:
    """The host launches a forward in a fraction of a millisecond; the other stage's turns may double what it takes."""
    made = launch(train_slow, 2, str(tmp_path))
    alone = min(milliseconds for milliseconds, *_ in made)
    run = read(tmp_path)
    for (_, _, busy), share in zip(made, run.shares(), strict=True):
        assert 0.9 * alone < share.milliseconds["F"] < 3 * alone
        assert share.busy > 0.3
        assert 0.3 < busy <= 1
    assert run.disorder < 1e-3
    hop, tick = map(float, re.findall(r"takes ([\d.]+) ms.*slowest stage ([\d.]+) ms", made[0][1])[0])
    assert 0.9 * alone < tick < 3 * alone
    assert hop > 0


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.proves("GPU stages: an error of one stage is told by all", exact=False, modes=DEFAULT)
def test_an_error_is_told_by_all() -> None:
    ends = launch(failing.train_bad_loss, 3)
    failing.assert_told(ends, 2, "ArithmeticError", "no forward for you")


class OutOfRange(nn.Linear):
    """From micro-batch 6 on it looks up what is not there; a GPU finds that out later, and is then lost for good."""

    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        index = torch.full((1,), 10**6 if self.seen > 6 else 0, device=x.device)
        return super().forward(x) + self.weight.index_select(0, index).sum()


def fail_on_the_device(rank: int, world_size: int) -> failing.End:
    width = failing.WIDTH
    layers = [OutOfRange(width, width) if i == 2 else nn.Linear(width, width) for i in range(2 * world_size)]
    engine = failing.build(world_size, layers)
    data = failing.batches()
    return failing.catch(lambda: [engine.train_batch(data) for _ in range(20)])


def test_a_device_that_fails_is_told_by_all() -> None:
    ends = launch(fail_on_the_device, 3, dying=[1])
    for rank, end in enumerate(ends):
        assert end.kind, f"rank {rank} has heard nothing: {ends}"
        assert abs(end.at - ends[1].at) < failing.SOON, ends
        assert re.search("device-side assert|index out of range", end.text), ends
    for rank in (0, 2):
        assert ends[rank].kind == "StageError", ends
        assert "rank 1" in ends[rank].text, ends


# -- as users start it ------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_recipe_on_a_shared_device(launcher: str, tmp_path: Path) -> None:
    """Two stages, one GPU: what `make demo` trains comes to the accuracy that it comes to on CPU."""
    module = (
        "deepspeed.launcher.runner --quiet --num_gpus 2"
        if launcher == "deepspeed"
        else ("torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0")
    )
    recipe = ROOT / "recipes" / "resnet" / "train.py"
    command = [sys.executable, "-m", *module.split(), str(recipe), "--deepspeed_config"]
    command += [str(ROOT / "configs" / "resnet20_digits.json"), "--output-dir", str(tmp_path)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "DS_ACCELERATOR": DEVICE, "PYTHONPATH": os.pathsep.join(paths)}
    environment["CUDA_VISIBLE_DEVICES"] = "0"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "share" in done.stdout + done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["stages"] == 2
    assert result["test_accuracy"] >= 0.97


def test_stages_with_devices_of_their_own() -> None:
    """DeepSpeed's collectives go over NCCL then; what travels between stages still goes over gloo."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    there, here = (
        launch(train_without_dropout, 2, "tied", backend="nccl"),
        launch(train_without_dropout, 2, "tied", device="cpu"),
    )
    assert_as_on_the_cpu(there, here, TOLERANCE[torch.float32])


def alone_on_the_device(rank: int, world_size: int) -> list[int]:
    """The devices on which this process has a context, when it has sent and received."""
    torch.cuda.set_device(rank)
    train_without_dropout(rank, world_size, "tied")
    return [index for index in range(torch.cuda.device_count()) if torch._C._cuda_hasPrimaryContext(index)]


def test_no_stage_has_a_context_on_the_device_of_another() -> None:
    """It would take hundreds of megabytes of the first device for each stage."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    assert launch(alone_on_the_device, 2, backend="nccl") == [[0], [1]]


class Elsewhere(nn.Module):
    """Puts out what is on the other device."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(f"cuda:{1 - x.device.index}")


def send_from_elsewhere(rank: int, world_size: int) -> failing.End:
    width = failing.WIDTH
    layers = [nn.Linear(width, width), Elsewhere(), nn.Identity(), nn.Linear(width, width)]
    engine = failing.build(world_size, layers)
    return failing.catch(lambda: engine.train_batch(failing.batches()))


def test_output_on_another_device_is_told_by_all() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for end in launch(send_from_elsewhere, 2):
        assert "is on cuda:1, and the stage computes on cuda:0" in end.text


# -- memory that is used again ----------------------------------------------------------------------------------------

WIDE = 2**20
"""Floats of a message that is still on its way when the next one is made."""


class Captured(nn.Module):
    """Without gradients the run of a captured graph, whose output is always in the same memory."""

    eager = False

    def forward(self, x: Tensor) -> Tensor:
        if self.eager or torch.is_grad_enabled():
            return x * 3
        if not hasattr(self, "graph"):
            self.x = x.clone()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.y = self.x * 3
        self.x.copy_(x)
        self.graph.replay()
        return self.y


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :8] * self.factor + x[:, -8:]


def wide_engine() -> Any:
    from deepspeed.pipe import PipelineModule

    import ds_ddg

    net = PipelineModule(
        [nn.Identity(), Captured(), Narrow(), nn.Identity()],
        num_stages=2,
        loss_fn=nn.functional.mse_loss,
        partition_method="uniform",
    )
    settings = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 1e-3}}}
    parameters = [p for p in net.parameters() if p.requires_grad] or None
    engine, *_ = ds_ddg.initialize(model=net, config={**toy.config(1), **settings}, model_parameters=parameters)
    return engine


def evaluate_captured(rank: int, world_size: int) -> list[list[float]]:
    """Losses of many micro-batches, without and with a captured graph."""
    engine = wide_engine()
    losses = []
    for Captured.eager in (True, False):
        data = iter([(torch.full((1, WIDE), float(n)), torch.zeros(1, 8)) for n in range(30)])
        outputs = engine.eval_batch(data, reduce_output=None, bcast_loss=False, num_micro_batches=30)
        losses.append([float(loss) for loss in outputs or ()])
    return losses


@needs_kernels
def test_output_of_a_captured_graph_is_sent_as_it_was() -> None:
    _, (eager, captured) = launch(evaluate_captured, 2)
    assert len(set(eager)) == 30
    assert captured == eager


def refill(rank: int, world_size: int) -> list[list[float]]:
    """Losses with batches of their own, and with two in pinned memory that are filled again after each call."""
    losses = []
    for pinned in (False, True):
        engine = wide_engine()
        inputs = torch.zeros(1, WIDE, pin_memory=pinned)
        seen = []
        for call in range(30):
            batch = inputs if pinned else inputs.clone()
            batch.fill_(float(call % 7))
            seen.append(float(engine.train_batch(iter([(batch, torch.zeros(1, 8))]))))
        engine.drain()
        losses.append(seen)
    return losses


@needs_kernels
def test_pinned_batch_may_be_filled_again_after_its_call() -> None:
    for own, pinned in launch(refill, 2):
        assert pinned == own
