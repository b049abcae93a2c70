"""DeepSpeed's own optimizers, compiled here: they write into weights through raw pointers, unseen by autograd.

So no late backward fails that finds the wrong weights; only the oracle tells. Compiling takes a minute.
"""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import toy
from helpers.distributed import GetRanks
from helpers.modes import DEFAULT, MODE_BLOCKS
from helpers.stale_runs import RULES, ByHand
from helpers.versus import Setup, gaps, run_engine, run_oracle, versus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("one_thread")]

SETTINGS = {"lr": 0.01, "weight_decay": 0.1}
Files = dict[str, str]
"""The shared library of each op."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")  # of this environment's ninja
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        missing = [tool for tool in ("c++", "ninja") if shutil.which(tool) is None]
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            missing.append("Python.h")
        if missing:
            pytest.skip(f"compiles DeepSpeed's optimizers, which needs {' and '.join(missing)}")
        yield compiled(patch)


def compiled(patch: pytest.MonkeyPatch) -> Files:
    from deepspeed.ops import op_builder

    patch.setattr(op_builder.builder.OpBuilder, "_loaded_ops", {})
    fused, cpu = op_builder.FusedAdamBuilder(), op_builder.CPUAdamBuilder()
    for builder in (fused, cpu):
        quick = [flag for flag in builder.cxx_args() if flag not in ("-g", "-O3")]
        builder.cxx_args = partial(list, [*quick, "-O1"])
    first = Path(fused.load(verbose=False).__file__)
    # Most of the time goes into what both have in common.
    common = first.parent / "cpu_adam_impl.o"
    cpu.sources = partial(list, [source for source in cpu.sources() if Path(source).stem != common.stem])
    cpu.extra_ldflags = partial(list, [*cpu.extra_ldflags(), str(common)])
    return {fused.name: str(first), cpu.name: cpu.load(verbose=False).__file__}


def load(files: Files) -> None:
    """Have DeepSpeed find the ops, each a copy with state of its own, in a process that need not compile.

    The CPU's FusedAdam counts the steps of all optimizers of a process in one place, and the oracle has several.
    """
    from deepspeed.ops.op_builder.builder import OpBuilder

    for name, path in files.items():
        with tempfile.TemporaryDirectory() as directory:
            # pybind11 keeps modules by their name, of which only the end has to be that of the op.
            unique = f"{Path(directory).name}.{name}"
            spec = importlib.util.spec_from_file_location(unique, shutil.copy(path, directory))
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        OpBuilder._loaded_ops[name] = module


def fused_adam(files: Files, decoupled: bool, parameters: Any) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import FusedAdam

    load(files)
    return FusedAdam(parameters, adam_w_mode=decoupled, **SETTINGS)


def cpu_adam(files: Files, decoupled: bool, parameters: Any) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    load(files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cpuinfo.get_cpu_info", dict)  # it asks who made the CPU, which takes a second
        return DeepSpeedCPUAdam(parameters, adamw_mode=decoupled, **SETTINGS)


def from_json(files: Files, net: nn.Module, setup: Setup) -> dict[str, Any]:
    load(files)
    return {"model_parameters": setup.parameters(net)}


def from_script(make: Callable[[Any], torch.optim.Optimizer], net: nn.Module, setup: Setup) -> dict[str, Any]:
    return {"optimizer": make, "model_parameters": setup.parameters(net)}


def setup_of(files: Files, given: str, decoupled: bool, **more: Any) -> Setup:
    """A run with FusedAdam as the JSON asks for it, or with a script's DeepSpeedCPUAdam."""
    common = Setup(toy.layers, pictures, loss_fn=toy.loss_fn, **more)
    if given == "DeepSpeedCPUAdam":
        make = partial(cpu_adam, files, decoupled)
        return replace(common, optimizer=make, arguments=partial(from_script, make))
    params = {**SETTINGS, "adam_w_mode": decoupled}
    return replace(
        common,
        optimizer=partial(fused_adam, files, decoupled),
        arguments=partial(from_json, files),
        config={"optimizer": {"type": "AdamW" if decoupled else "Adam", "params": params}},
    )


def pictures() -> Iterator[Any]:
    return toy.batches(60)


class InOnePiece:
    """A stage's weights as ZeRO hands them to its optimizer: where a vector instruction ends decides the rounding."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer], parameters: Any) -> None:
        self.weights = list(parameters)
        self.flat = nn.Parameter(self.joined(weight.detach() for weight in self.weights))
        self.inner = make([self.flat])

    def joined(self, tensors: Iterable[Tensor]) -> Tensor:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        return torch.cat([flat, flat.new_zeros(flat.numel() % 2)])

    def step(self) -> None:
        self.flat.grad = self.joined(weight.grad for weight in self.weights if weight.grad is not None)
        self.inner.step()
        sizes = [weight.numel() for weight in self.weights]
        for weight, part in zip(self.weights, self.flat.detach()[: sum(sizes)].split(sizes), strict=True):
            weight.data.copy_(part.view_as(weight))

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.grad = None


@pytest.mark.parametrize("ddg", MODE_BLOCKS, ids=lambda ddg: "-".join(ddg.values()))
@pytest.mark.parametrize("given", ["FusedAdam", "DeepSpeedCPUAdam"])
@pytest.mark.parametrize(("stages", "micro_batches", "decoupled"), [(2, 1, True), (3, 2, False)])
@pytest.mark.proves("DeepSpeed's FusedAdam (the JSON's Adam and AdamW) and DeepSpeedCPUAdam", modes="ddg")
def test_equals_the_oracle(
    ranks: GetRanks, files: Files, stages: int, micro_batches: int, decoupled: bool, given: str, ddg: dict[str, Any]
) -> None:
    setup = setup_of(files, given, decoupled, stages=stages, micro_batches=micro_batches, ddg=ddg)
    versus(ranks, setup)


@pytest.mark.parametrize("ddg", MODE_BLOCKS, ids=lambda ddg: "-".join(ddg.values()))
@pytest.mark.parametrize("given", ["FusedAdam", "DeepSpeedCPUAdam"])
@pytest.mark.proves("DeepSpeed's FusedAdam and DeepSpeedCPUAdam, ZeRO-1", modes="ddg")
def test_equals_the_oracle_with_zero(ranks: GetRanks, files: Files, given: str, ddg: dict[str, Any]) -> None:
    setup = setup_of(files, given, True, ddg=ddg)
    config = {**setup.config, "zero_optimization": {"stage": 1}}
    versus(ranks, replace(setup, config=config, optimizer=partial(InOnePiece, setup.optimizer)))


@pytest.mark.parametrize("given", ["FusedAdam", "DeepSpeedCPUAdam"])
@pytest.mark.proves('"staleness": "auto" with DeepSpeed\'s FusedAdam and DeepSpeedCPUAdam', modes=DEFAULT)
def test_steps_by_the_rules_for_stale_gradients(ranks: GetRanks, files: Files, given: str) -> None:
    """Their kernels are given the learning rate and the betas of each step."""
    setup = setup_of(files, given, True, stages=3, micro_batches=1)
    delays = itertools.count(2, -1)
    by_hand = lambda parameters: ByHand(setup.optimizer(parameters), RULES["A"], float(next(delays)))  # noqa: E731
    expected = run_oracle(replace(setup, optimizer=by_hand))
    by_rank = ranks(3).run(run_engine, replace(setup, ddg={"staleness": "auto"}))
    for stage, (ours, its) in enumerate(zip(by_rank, expected, strict=True)):
        assert not gaps(ours, its), f"stage {stage}"


@pytest.mark.parametrize("make", [fused_adam, cpu_adam])
def test_autograd_does_not_see_these_writes(files: Files, make: Callable[..., torch.optim.Optimizer]) -> None:
    """Or the test above would be one of a case that other optimizers cover."""
    weight = nn.Parameter(torch.ones(5))
    optimizer = make(files, True, [weight])
    weight.sum().backward()
    version = weight._version
    optimizer.step()
    assert weight._version == version
    assert float(weight.detach().max()) < 1
