"""Balanced stages: the split against brute force, what a profile measures and leaves alone, ranks, the command."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import random
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy
import pytest
import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn
from torch.nn import functional as F

import ds_ddg
from ds_ddg.analysis.balance import Balance, LayerCost, balance, load, save
from ds_ddg.cli import main
from ds_ddg.partition import PipelineModule, profile
from helpers import toy
from helpers.distributed import GetRanks
from helpers.paths import ROOT

# -- the split --------------------------------------------------------------------------------------------------------


def costs(*times: float) -> list[LayerCost]:
    return [LayerCost(f"layer{i}", time, 0) for i, time in enumerate(times)]


def merit(split: Balance) -> tuple[float, int, int]:
    """What counts, in this order: pace, bytes between stages, largest memory."""
    memory = [sum(layer.parameter_bytes + layer.activation_bytes for layer in stage) for stage in split.stages]
    return split.pace_ms, sum(stage[-1].output_bytes for stage in split.stages[:-1]), max(memory)


def every_split(layers: list[LayerCost], num_stages: int) -> Iterator[Balance]:
    for cuts in itertools.combinations(range(1, len(layers)), num_stages - 1):
        yield Balance(tuple(layers), (0, *cuts, len(layers)))


def test_no_split_is_better() -> None:
    """Small whole numbers, so that many splits tie."""
    draw = random.Random(5)
    for _ in range(400):
        layers = [
            LayerCost("", *(draw.choice([0, 1, 2, 3, 7]) for _ in range(2)), *(draw.randrange(4) for _ in range(3)))
            for _ in range(draw.randint(1, 9))
        ]
        num_stages = draw.randint(1, len(layers))
        found = balance(layers, num_stages)
        assert all(first < end for first, end in itertools.pairwise(found.parts)), "an empty stage"
        assert merit(found) == min(map(merit, every_split(layers, num_stages)))
        assert balance(layers, num_stages) == found


def test_no_split_is_faster_for_any_times() -> None:
    draw = random.Random(6)
    for _ in range(100):
        layers = costs(*(draw.expovariate(1) for _ in range(draw.randint(2, 9))))
        num_stages = draw.randint(2, len(layers))
        fastest = min(split.pace_ms for split in every_split(layers, num_stages))
        assert balance(layers, num_stages).pace_ms == pytest.approx(fastest, rel=1e-12)


def test_rounding_does_not_break_a_tie() -> None:
    """Both cuts of a, b, a are equally fast, so the traffic decides, whatever rounding makes of a + b."""
    draw = random.Random(8)
    for _ in range(200):
        a, b = draw.random(), draw.random()
        for traffic, parts in [((1, 9), (0, 1, 3)), ((9, 1), (0, 2, 3))]:
            layers = [
                LayerCost("", time, 0, output_bytes=out) for time, out in zip((a, b, a), (*traffic, 0), strict=True)
            ]
            assert balance(layers, 2).parts == parts


def test_hundreds_of_layers() -> None:
    draw = random.Random(7)
    assert balance(costs(*(draw.random() for _ in range(400))), 32).efficiency > 0.85


def test_layers_that_cost_nothing() -> None:
    found = balance(costs(0, 0, 0), 2)
    assert (found.parts, found.pace_ms, found.efficiency) == ((0, 1, 3), 0, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: balance(costs(1, 1), 3), "3 stages for 2 layers; use 1 to 2 stages"),
        (lambda: balance(costs(1, 1), 0), "0 stages for 2 layers"),
        (lambda: balance([], 1), "1 stages for 0 layers"),
        (lambda: LayerCost("Linear", -1, 0), "layer 'Linear': forward_ms must be finite and 0 or more, got -1"),
        (lambda: LayerCost("Linear", 1, 0, output_bytes=float("nan")), "output_bytes must be finite"),
    ],
)
def test_what_cannot_be_split(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


def test_prediction_as_a_table_and_as_data() -> None:
    layers = [
        LayerCost("Stem", 1, 2, 1200, 3_000_000, 400),
        LayerCost("Block", 2, 4, 5_000_000, 1_000_000, 400),
        LayerCost("Head", 1, 1, 10, 20, 4),
    ]
    assert (
        str(Balance(tuple(layers), (0, 2, 3)))
        == """\
stage             layers  forward ms  backward ms  parameters  memory   share
    0  0 Stem .. 1 Block       3.000        6.000      5.0 MB  9.0 MB  100.0%
    1             2 Head       1.000        1.000        10 B    30 B   22.2%

pace: 9.000 ms per micro-batch; efficiency (mean / slowest): 61.1%
memory: parameters and the activations of one micro-batch; share: of the slowest stage's time"""
    )
    record = balance(layers, 2).record()
    assert record["parts"] == [0, 1, 3]
    assert record["per_stage"][1] == {
        "stage": 1,
        "layers": ["Block", "Head"],
        "forward_ms": 3,
        "backward_ms": 5,
        "parameter_bytes": 5_000_010,
        "memory_bytes": 6_000_030,
        "share": 1,
    }


# -- what is measured -------------------------------------------------------------------------------------------------


class Add(nn.Module):
    """A second input and an integer pass by."""

    def forward(self, values: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y, order = values
        return x + y, order


class Sleeper(nn.Module):
    def __init__(self, forward: float = 0.0, width: int = 4) -> None:
        super().__init__()
        self.seconds, self.linear = forward, nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.linear(x)


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        time.sleep(0.05)
        return gradient


def scripted(*durations: float) -> Callable[[], float]:
    """A clock that lets `durations` pass between its 1st and 2nd, its 3rd and 4th, ... reading."""
    readings = itertools.chain.from_iterable((0.0, duration) for duration in durations)
    return lambda: next(readings)


def test_the_median_of_the_runs_after_the_first_counts() -> None:
    runs = [(9, 9), (1, 20), (3, 40), (2, 30)]
    clock = scripted(*(second for run in runs for second in run))
    (cost,) = profile([LayerSpec(nn.Linear, 2, 2)], (torch.ones(1, 2), None), repetitions=3, clock=clock)
    assert (cost.name, cost.forward_ms, cost.backward_ms) == ("Linear", 2000, 30000)


def test_the_loss_counts_for_the_last_layer() -> None:
    # Linear, then ReLU, then the loss: an untimed run and a timed one of each, forward and backward.
    clock = scripted(0, 0, 1, 2, 0, 0, 3, 4, 0, 0, 10, 20)
    sample = torch.ones(4, 3), torch.zeros(4, dtype=torch.long)
    found = profile([nn.Linear(3, 5), F.relu], sample, F.cross_entropy, repetitions=1, clock=clock)
    assert [(c.name, c.forward_ms, c.backward_ms) for c in found] == [
        ("Linear", 1000, 2000),
        ("relu + cross_entropy", 13000, 24000),
    ]


def test_memory_of_each_layer() -> None:
    """Parameters; what is kept besides the input; the output. The input of a layer is the output of another."""
    layers = [
        nn.Linear(3, 5),
        nn.Tanh(),
        nn.Flatten(),
        nn.BatchNorm1d(5),
        lambda x: x * x.exp(),
        nn.ReLU(inplace=True),
    ]
    found = profile(layers, (torch.ones(4, 3), None), repetitions=1)
    out = 4 * 5 * 4
    assert [(c.parameter_bytes, c.activation_bytes, c.output_bytes) for c in found] == [
        (4 * (15 + 5), out, out),
        (0, out, out),
        (0, 0, out),
        (4 * 10, out + 2 * 5 * 4, out),  # mean and deviation of the batch
        (0, 2 * out, out),
        (0, 0, out),
    ]


def test_every_kind_of_layer() -> None:
    embed = functools.partial(TiedLayerSpec, "embed", nn.Embedding, 11, 6)
    layers = [
        lambda tokens: tokens.clamp(min=1),  # integers to integers: nothing to differentiate
        embed(),
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True)),
        lambda x: (x, x.detach().sum(-1, keepdim=True), torch.arange(len(x))),
        Add(),
        lambda values: values[0],
        embed(forward_fn=lambda module, x: F.linear(x, module.weight)),
    ]
    sample = torch.randint(11, (3, 5)), torch.randint(11, (3, 5))
    found = profile(layers, sample, lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    names = ["<lambda>", "Embedding", "Sequential", "<lambda>", "Add", "<lambda>", "Embedding + <lambda>"]
    assert [c.name for c in found] == names
    assert found[0].backward_ms == 0
    assert all(c.backward_ms > 0 for c in found[1:])
    assert found[1].parameter_bytes == found[6].parameter_bytes == 11 * 6 * 4
    assert found[3].output_bytes == 4 * (3 * 5 * 6 + 3 * 5) + 8 * 3


def test_a_frozen_stem_has_no_backward() -> None:
    stem = nn.Linear(3, 3).requires_grad_(False)
    found = profile([stem, nn.Linear(3, 3)], (torch.ones(2, 3), None))
    assert found[0].backward_ms == 0 < found[1].backward_ms


class Counting:
    """A loss that counts, as that of the ResNet recipe."""

    def __init__(self) -> None:
        self.calls = torch.zeros(())

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return (x - y).square().mean()


def frozen(*tensors: Tensor | None) -> list[bytes | None]:
    """As bytes: equal means equal to the last bit."""
    return [None if t is None else t.detach().numpy().tobytes() for t in tensors]


def randomness() -> list[Any]:
    return [random.getstate(), numpy.random.get_state()[1].tolist(), frozen(torch.get_rng_state())]


@pytest.mark.parametrize("fails", [False, True])
def test_a_profile_leaves_everything_as_it_was(fails: bool) -> None:
    last = nn.Linear(8, 5)
    net = nn.ModuleList(
        [nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2).eval(), nn.Dropout(), nn.ReLU(True), nn.Flatten(), last]
    )
    for parameter in net[:2].parameters():
        parameter.grad = torch.randn_like(parameter)
    noise = [lambda x: x * random.random() + numpy.random.rand(), LayerSpec(nn.Linear, 5, 5)]
    sample, loss = (torch.randn(4, 3, 4, 4), torch.randn(4, 4 if fails else 5)), Counting()

    def everything() -> list[Any]:
        parameters = list(net.parameters())
        tensors = [*net.state_dict().values(), *(p.grad for p in parameters), *sample, loss.calls]
        return [frozen(*tensors), [id(p) for p in parameters], [module.training for module in net.modules()]]

    before = everything(), randomness()
    with torch.no_grad():
        if fails:
            with pytest.raises(RuntimeError, match=r"loss_fn \(Counting\)"):
                profile([*net, *noise], sample, loss)
        else:
            profile([*net, *noise], sample, loss)
        assert not torch.is_grad_enabled()
    assert (everything(), randomness()) == before


def test_gradients_of_tensors_from_outside_are_put_back() -> None:
    with_gradient, without = torch.ones(3, requires_grad=True), nn.Linear(3, 3)
    with_gradient.grad = torch.full((3,), 7.0)
    (cost,) = profile([lambda x: without(x * with_gradient)], (torch.ones(2, 3), None))
    assert cost.backward_ms > 0
    assert with_gradient.grad.tolist() == [7, 7, 7]
    assert without.weight.grad is None


class Census(nn.Module):
    """Counts how many of its kind are alive."""

    alive: ClassVar[weakref.WeakSet[nn.Module]] = weakref.WeakSet()
    most: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        Census.alive.add(self)
        Census.most = max(Census.most, len(Census.alive))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_no_more_than_two_layers_are_alive_at_once() -> None:
    gc.collect()
    gc.disable()
    try:
        profile([LayerSpec(Census) for _ in range(6)], (torch.ones(2, 3), None), lambda x, _: x.sum())
        assert 1 <= Census.most <= 2
        assert not Census.alive
    finally:
        gc.enable()


@pytest.mark.parametrize("slow", [LayerSpec(Sleeper, 0.05), SlowBackward.apply])
def test_a_slow_layer_ends_alone_on_its_stage(slow: Any) -> None:
    layers = [Sleeper(), Sleeper(), slow, Sleeper(), Sleeper()]
    found = profile(layers, (torch.ones(2, 4), torch.ones(2, 4)), F.mse_loss, repetitions=3)
    assert balance(found, 3).parts == (0, 2, 3, 5)
    assert found[2].total_ms >= 50


class NoCopy(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("holds a socket")


BATCH = torch.ones(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: profile([nn.Linear(3, 3)], torch.ones(2, 3)),
            ValueError,
            r"(inputs, labels) .*got (2, 3) torch.float32",
        ),
        (lambda: profile([], BATCH), ValueError, "no layers to profile"),
        (lambda: profile(["relu"], BATCH), ValueError, "layer 0 (str) must be a LayerSpec, a module or a function"),
        (lambda: profile([F.relu], BATCH, repetitions=0), ValueError, "repetitions must be 1 or more, got 0"),
        (
            lambda: profile([F.relu, nn.Linear(4, 4)], BATCH),
            RuntimeError,
            "layer 1 (Linear) failed on (2, 3) torch.float32: .*shapes cannot be multiplied.*; the sample must be",
        ),
        (lambda: profile([F.relu], BATCH, nn.NLLLoss()), RuntimeError, "loss_fn (NLLLoss) failed on"),
        (
            lambda: profile([NoCopy(3, 3)], BATCH),
            RuntimeError,
            "layer 0 (NoCopy) cannot be copied.*holds a socket; pass it as a LayerSpec",
        ),
    ],
)
def test_what_cannot_be_profiled(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message.replace("(", r"\(").replace(")", r"\)")):
        call()


# -- ranks ------------------------------------------------------------------------------------------------------------


def train_profiled(rank: int, world_size: int) -> dict[str, Any]:
    """Only rank 0 has a sample; the slow layer is the first of five."""
    specs = [LayerSpec(Sleeper, 0.05 * (i == 0)) for i in range(4)] + [LayerSpec(nn.Linear, 4, 5)]
    data = [(torch.randn(4, 4), torch.randint(5, (4,))) for _ in range(8)]
    where = {"sample": data[0]} if rank == 0 else {"partition_method": "profile"}
    torch.manual_seed(3)
    net = PipelineModule(specs, num_stages=world_size, loss_fn=toy.loss_fn, **where)
    torch.manual_seed(3)
    expected = nn.ModuleList([spec.build() for spec in specs[net.parts[rank] : net.parts[rank + 1]]])
    initial = all(map(torch.equal, toy.state(net), toy.state(expected)))
    engine, *_ = ds_ddg.initialize(
        model=net,
        config=toy.config(2),
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        model_parameters=list(net.parameters()),
    )
    losses = [float(engine.train_batch(iter(data))) for _ in range(2)]
    engine.drain()
    moved = not any(map(torch.equal, toy.state(net), toy.state(expected)))
    assert net.balance is not None
    assert not hasattr(net, "_sample")
    return {"parts": net.parts, "pace": net.balance.pace_ms, "losses": losses, "initial": initial, "moved": moved}


def test_ranks_agree_and_train(ranks: GetRanks) -> None:
    first, second = ranks(2).run(train_profiled)
    assert first == second
    assert first["parts"] == [0, 1, 5]
    assert first["initial"], "the profile took random numbers from the initialisation"
    assert first["moved"]
    assert all(loss > 0 for loss in first["losses"])


def build_wrongly(rank: int, world_size: int) -> list[str]:
    """What each wrong set-up raises; the last builds without a profile."""
    settings: list[dict[str, Any]] = [
        {"sample": (torch.ones(2, 99), None)},
        {"partition_method": "profile"},
        {"sample": (torch.ones(2, 3), None), "partition_method": "uniform"},
        {"sample": (torch.ones(2, 3), None), "layers": [nn.Linear(3, 3)]},
        {"partition_method": "uniform"},
    ]
    messages = []
    for setting in settings:
        arguments = {"layers": [nn.Linear(3, 3) for _ in range(5)], "num_stages": 2, **setting}
        try:
            messages.append(str(PipelineModule(**arguments).parts))
        except (ValueError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def test_a_failure_is_every_ranks(ranks: GetRanks) -> None:
    first, second = ranks(2).run(build_wrongly)
    for here, there, message in zip(
        first,
        second,
        [
            "RuntimeError: layer 0 (Linear) failed on (2, 99) torch.float32",
            'ValueError: partition_method="profile" measures the layers on rank 0, which has no micro-batch',
            "ValueError: sample has no meaning for partition_method='uniform', which measures nothing; leave it out",
            "ValueError: every stage needs a layer, and there must be a stage: 2 stages for 1 layers",
            "[0, 3, 5]",
        ],
        strict=True,
    ):
        assert here.startswith(message)
        assert there == here or there == f"RuntimeError: rank 0 could not profile the layers, see its log; {here}"


# -- files and the command line ---------------------------------------------------------------------------------------

SOURCE = """
import torch
from neighbour import WIDTH
from torch import nn

print("a word from the user's file")

def with_loss():
    return [nn.Linear(3, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 5)], (torch.ones(2, 3), torch.ones(2, 5)), nn.MSELoss()

def without_loss():
    return with_loss()[:2]

def wrong():
    return 7

def wide():
    return [nn.Linear(4, 4)], (torch.ones(2, 3), None)

class Own(nn.Module):
    def forward(self, x):
        return x.nothing

def own():
    return [Own()], (torch.ones(2, 3), None)

def takes(width):
    return without_loss()

def fails():
    return {}["a"]
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "neighbour.py").write_text("WIDTH = 4\n")
    (tmp_path / "layers_of_test.py").write_text(SOURCE)
    return str(tmp_path / "layers_of_test.py")


def run(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main(["partition", *arguments]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def test_command_measures_splits_and_saves(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = str(tmp_path / "profile.json")
    answer = json.loads(run(capsys, f"{source}:with_loss", "--stages", "2", "--json", "--out", saved))
    assert answer["stages"] == 2
    assert [name for stage in answer["per_stage"] for name in stage["layers"]] == [
        "Linear",
        "ReLU",
        "Linear + MSELoss",
    ]
    assert [c.parameter_bytes for c in load(saved)] == [64, 0, 100]
    assert json.loads(run(capsys, saved, "--stages", "2", "--json")) == answer
    assert run(capsys, saved, "--stages", "3") == f"{balance(load(saved), 3)}\n"
    assert "2 Linear\n" not in run(capsys, f"{source}:without_loss", "--stages", "1")


def test_costs_survive_a_file(tmp_path: Path) -> None:
    layers = [LayerCost("Überschicht", 0.1, 0.30000000000000004, 1, 2, 3), LayerCost("<lambda>", 0, 0)]
    save(layers, tmp_path / "profile.json")
    assert load(tmp_path / "profile.json") == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a profile of layers.*JSONDecodeError.*write one with ds-ddg partition"),
        ("[]", "is not a profile of layers.*keys name, forward_ms, backward_ms"),
        ('{"stages": []}', "is not a profile of layers.*KeyError"),
        ('{"layers": [{"name": "a"}]}', "missing 2 required positional arguments: 'forward_ms' and 'backward_ms'"),
        ('{"layers": [{"name": "a", "forward_ms": "1", "backward_ms": 1}]}', "is not a profile of layers"),
        ('{"layers": [{"name": "a", "forward_ms": -1, "backward_ms": 1}]}', "layer 'a': forward_ms must be finite"),
        ('{"layers": []}', "1 stages for 0 layers"),
    ],
)
def test_command_refuses_what_is_no_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    error = run(capsys, str(path), "--stages", "1", status=2)
    assert error.startswith("ds-ddg: error: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{source}:missing --stages 1", "has no function 'missing'; it has with_loss, without_loss, wrong, wide"),
        ("{source}:wrong --stages 1", "must return (layers, sample) or (layers, sample, loss_fn), got int"),
        ("{source}:with_loss --stages 4", "4 stages for 3 layers; use 1 to 3 stages"),
        ("{source}:with_loss --stages 0", "--stages must be 1 or more, got 0"),
        ("{source}:with_loss --stages 1 --out profile.txt", "--out 'profile.txt' must end in .json"),
        ("{source} --stages 1", "is neither FILE.py:FUNCTION nor a saved profile, which ends in .json"),
        ("/no/such.py:layers --stages 1", "No such file or directory"),
        ("/no/such.json --stages 1", "No such file or directory"),
    ],
)
def test_command_ends_with_a_message(
    source: str, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    error = run(capsys, *arguments.format(source=source).split(), status=2)
    assert "ds-ddg: error: " in error
    assert message in error


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("wide", r"layer 0 \(Linear\) failed on \(2, 3\) torch.float32: .*cannot be multiplied.*the sample must be"),
        ("own", r"layer 0 \(Own\) failed on .*no attribute 'nothing'.*layers_of_test.py, line \d+: return x.nothing"),
        ("takes", r"takes is called without arguments: missing a required argument: 'width'; give each a default"),
        (
            "fails",
            r'layers_of_test.py failed with KeyError: .a. \(.*_test.py, line \d+: return \{\}\["a"\]\)',
        ),
    ],
)
def test_an_error_of_the_users_function_is_one_message(
    source: str, capsys: pytest.CaptureFixture[str], function: str, message: str
) -> None:
    error = run(capsys, f"{source}:{function}", "--stages", "1", status=2).splitlines()[-1]
    assert error.startswith("ds-ddg: error: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def layers(:\n", "broken.py failed with SyntaxError: invalid syntax (broken.py, line 1)"),
        ("x = 1\nimport no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module' ("),
        ("x = 1\nimport no_such_module\n", "broken.py, line 2: import no_such_module)"),
    ],
)
def test_a_broken_file_is_named_before_deepspeed_is_loaded(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "broken.py").write_text(text)
    error, imported = imported_by(tmp_path, "broken.py:layers")
    assert message in error
    assert not {"torch", "deepspeed"} & imported


def test_nothing_is_measured_or_imported_for_missing_files(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(SOURCE)
    for arguments, message in (
        ("missing.py:layers", "No such file or directory: 'missing.py'"),
        ("model.py:wide --out no/profile.json", "--out 'no/profile.json': there is no folder 'no'; make it first"),
    ):
        error, imported = imported_by(tmp_path, arguments)
        assert message in error
        assert not {"torch", "deepspeed"} & imported


def imported_by(folder: Path, arguments: str) -> tuple[str, set[str]]:
    """The error that the command ends with, and every module that it has imported."""
    command = [sys.executable, "-X", "importtime", "-m", "ds_ddg", "partition", *arguments.split(), "--stages", "1"]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    return lines[-1], {line.split("|")[-1].strip() for line in lines}


def test_a_fresh_process_prints_nothing_but_the_answer(source: str) -> None:
    """DeepSpeed writes its own lines to stdout on import."""
    command = [sys.executable, "-m", "ds_ddg", "partition", f"{source}:with_loss", "--stages", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["parts"] == [0, 3]
    assert "a word from the user's file" in done.stderr


def test_a_saved_profile_is_split_without_torch(tmp_path: Path) -> None:
    save(costs(1, 2, 3), tmp_path / "profile.json")
    command = [sys.executable, "-X", "importtime", "-m", "ds_ddg", "partition", "profile.json", "--stages", "2"]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "efficiency (mean / slowest): 100.0%" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "ds_ddg.analysis.balance" in imported
    assert not {"torch", "deepspeed", "matplotlib", "numpy"} & imported
