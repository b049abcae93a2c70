"""Stages on a GPU: several share one over gloo, against the oracle on the same device, or the engine on CPU.

    python -m pytest tests/gpu                                         # first thing on a machine with a GPU
    python -m pytest tests/gpu -n 8 --dist loadgroup                   # the same in parallel

Nothing but one GPU is needed. `devices.py` says how these tests are tried without one.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from helpers import toy
from helpers.devices import DEVICE, device, launch, needs_kernels, random_state_of_the_device
from helpers.exact_runs import Case, Course, train, train_oracle

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(600)]


def split(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`toy.Split` on the device; the integers stay on the host, as a layer may return them."""
    return x, x.new_ones(x.shape[0], 1), torch.arange(x.shape[0])


# -- the oracle on the same device ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceCase(Case):
    """A case whose oracle computes where the engine does."""

    def reference(self) -> Any:
        oracle = super().reference()
        for stage in oracle.stages:
            stage.to(device())
        return oracle


CASES = [
    DeviceCase(stages, m, slack, weights, activations, (m + stages) % 2 == 1, "sgd" if m == 1 else "adamw", clip)
    for stages, (m, slack, clip) in itertools.product((2, 3), ((1, 0, 0.0), (2, 1, 0.05)))
    for weights, activations in itertools.product(("stash", "current"), ("keep", "recompute"))
]


def train_cases(rank: int, world_size: int, cases: list[DeviceCase]) -> list[tuple[Course, int, str]]:
    """Of every case: how it went, what is left after the drain, and where its weights are."""
    results = []
    for case in cases:
        with mock.patch.object(toy.Split, "forward", split):
            engine = case.engine()
            (course,) = train(engine, case.data(), [(engine.module, engine.optimizer)])
        engine.versions.assert_empty()
        left = engine._links.pending + engine.versions.alive - 1
        results.append((course, left, engine.device.type))
    return results


def train_oracles(rank: int, world_size: int, cases: list[DeviceCase]) -> list[list[Course]]:
    """Of every case, by stage."""
    with random_state_of_the_device(), mock.patch.object(toy.Split, "forward", split):
        return [train_oracle(case, data=((x.to(device()), y.to(device())) for x, y in case.data())) for case in cases]


@pytest.fixture(scope="module")
def trained() -> dict[DeviceCase, list[tuple[Course, int, str]]]:
    """By case and stage."""
    made = {}
    for stages in (2, 3):
        cases = [case for case in CASES if case.stages == stages]
        made.update(zip(cases, zip(*launch(train_cases, stages, cases), strict=True), strict=True))
    return made


@pytest.fixture(scope="module")
def oracles() -> dict[DeviceCase, list[Course]]:
    return dict(zip(CASES, launch(train_oracles, 1, CASES)[0], strict=True))


def assert_close(ours: Course, its: Course, losses: list[Tensor]) -> None:
    """To rounding: the device may add up in another order than in one process."""
    for t, (a, b) in enumerate(zip(ours.losses, losses, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, t=t: f"loss of call {t}: {m}")
    for moment, state in its.states.items():
        for i, (a, b) in enumerate(zip(ours.states[moment], state, strict=True)):
            torch.testing.assert_close(
                a, b, rtol=1e-3, atol=1e-4, msg=lambda m, i=i, at=moment: f"{at}, tensor {i}: {m}"
            )


@pytest.mark.xdist_group("oracles")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.proves("GPU stages that share one device over gloo, fp32", exact=False, modes="case.ddg")
def test_engine_equals_the_oracle(trained: Any, oracles: Any, case: DeviceCase) -> None:
    expected = oracles[case]
    for stage, (course, left, where) in enumerate(trained[case]):
        assert where == DEVICE
        assert left == 0, "messages or versions after the drain"
        assert_close(course, expected[stage], case.known(expected[stage].losses))
        first, last = (list(course.states.values())[i] for i in (0, -1))
        assert any(not torch.equal(a, b) for a, b in zip(first, last, strict=True)), f"stage {stage} does not train"


@needs_kernels
@pytest.mark.xdist_group("oracles")
def test_dropout_has_the_random_numbers_of_the_device(oracles: Any) -> None:
    """Without them "recompute" would agree with anything."""
    keep, recompute = (
        oracles[DeviceCase(2, 1, 0, "current", activations, True, "sgd")] for activations in ("keep", "recompute")
    )
    assert [float(loss) for loss in keep[0].losses] != [float(loss) for loss in recompute[0].losses]


# -- what it costs ----------------------------------------------------------------------------------------------------


def wide_engine(stages: int, width: int, ddg: dict[str, Any]) -> tuple[Any, Iterator[Any]]:
    """Stages of two layers each, so that the work grows with their number; micro-batches of 64 rows."""
    from deepspeed.pipe import LayerSpec, PipelineModule

    import ds_ddg

    torch.manual_seed(1)
    specs = [LayerSpec(nn.Linear, width, width) for _ in range(2 * stages)]
    net = PipelineModule(specs, num_stages=stages, loss_fn=nn.functional.mse_loss, partition_method="uniform")
    optimizer = {"type": "SGD", "params": {"lr": 1e-4, "momentum": 0.9}}
    settings = {"train_micro_batch_size_per_gpu": 64, "optimizer": optimizer}
    engine, *_ = ds_ddg.initialize(
        model=net,
        config={**toy.config(2, ddg), **settings},
        model_parameters=list(net.parameters()),
    )
    return engine, itertools.repeat((torch.ones(64, width), torch.zeros(64, width)))


def read_back(rank: int, world_size: int, ddg: dict[str, Any]) -> list[str]:
    """What made the host wait for the device in ten calls of a full pipeline, one line for each time."""
    engine, data = wide_engine(world_size, 64, ddg)
    for _ in range(10):
        engine.train_batch(data)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(10):
            engine.train_batch(data)
        torch.cuda.set_sync_debug_mode("default")
    engine.drain()
    return [f"{w.filename}:{w.lineno}" for w in seen if "called a synchronizing" in str(w.message)]


@needs_kernels
@pytest.mark.parametrize("ddg", [{}, {"activations": "recompute"}, {"weights": "current"}], ids=str)
def test_nothing_is_read_back_but_the_loss(ddg: dict[str, Any]) -> None:
    *others, last = launch(read_back, 3, ddg)
    assert others == [[], []], "stages before the last have nothing to read"
    assert len(last) <= 10, "the loss, once a call"


def memory(rank: int, world_size: int) -> list[tuple[int, int]]:
    """Bytes reserved on the device, and of pinned memory, after 100 and after 300 calls."""
    engine, data = wide_engine(world_size, 256, {"slack": 1})
    seen = []
    for call in range(1, 301):
        engine.train_batch(data)
        if call in (100, 300):
            pinned = torch.cuda.host_memory_stats()["allocated_bytes.current"]
            seen.append((torch.cuda.memory_reserved(), int(pinned)))
    engine.drain()
    return seen


@needs_kernels
def test_memory_is_flat() -> None:
    for stage, (early, late) in enumerate(launch(memory, 2)):
        assert late[0] <= early[0] + 2**21, f"stage {stage}: device memory grows"
        assert late[1] <= early[1] + 2**21, f"stage {stage}: pinned memory grows"
