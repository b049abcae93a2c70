"""The ResNet recipe on two stages: from files to weights that torchvision loads; interrupted, resumed, refused."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from helpers.distributed import GetRanks
from recipes.resnet import data, model
from recipes.resnet.images import Split

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.02, "momentum": 0.9}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": "auto", "warmup_num_steps": 2, "warmup_type": "linear"},
    },
    "steps_per_print": 10**9,
}


HELD_OUT = ["test_loss", "test_accuracy", "test_top5_accuracy"]


class Interrupted(Exception):  # noqa: N818
    """What ends a run early in these tests."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in folders and a config: two classes that are easy to tell apart, 24 images to train on."""
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("val", 5)):
        for label in range(2):
            (folder / split / f"class{label}").mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 100, (40, 40, 3), generator=generator, dtype=torch.uint8)
                pixels[:, :, 2 * label] += 120
                Image.fromarray(pixels.numpy()).save(folder / split / f"class{label}" / f"{i}.png")
    monitor = {"enabled": True, "output_path": str(folder / "csv"), "job_name": "all"}
    (folder / "ds.json").write_text(json.dumps({**CONFIG, "csv_monitor": monitor}))
    return folder


def run(folder: Path, *arguments: str, interrupt_at: int | None = None) -> dict[str, Any] | None:
    """The recipe's main program, in a process that has its process group; the metrics on rank 0."""
    from recipes.progress import Progress
    from recipes.resnet import train

    usual, made = Progress.update, 0

    def update(self: Progress, *args: Any) -> None:
        nonlocal made
        usual(self, *args)
        made += 1
        if made == interrupt_at:
            raise Interrupted

    # These processes come from a fork server, so the recipe's loaders would start one of their own for their workers.
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = ["train.py", "--deepspeed_config", str(folder / "ds.json"), *arguments]
    printed = io.StringIO()
    Progress.update = update  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(printed):
            train.main()
    finally:
        Progress.update = usual  # type: ignore[method-assign]
    lines = printed.getvalue().splitlines()
    return json.loads(lines[-1]) if lines and lines[-1].startswith('{"schedule"') else None


def state_of(checkpoint: Path) -> dict[str, Any]:
    """Every value in the files of a checkpoint by its place, but for the time that was measured."""
    values: dict[str, Any] = {}

    def walk(place: str, value: Any) -> None:
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        for key, inner in inside or ():
            walk(f"{place}/{key}", inner)
        if inside is None:
            values[place] = value.tolist() if torch.is_tensor(value) else value

    for file in sorted(checkpoint.iterdir()):
        walk(file.name, torch.load(file, weights_only=False))
    timed = ("/progress/seconds", "/progress/loss_seconds")
    return {place: value for place, value in values.items() if not place.endswith(timed)}


def interrupted_and_resumed(rank: int, world_size: int, folder: str, schedule: str) -> tuple[Any, Any]:
    """Metrics of one run in one go and of one in two parts."""
    here = Path(folder)
    common = [
        *("--dataset", "imagefolder", "--data-dir", folder, "--image-size", "32", "--workers", "2"),
        *("--model", "cifar_resnet8", "--epochs", "2", "--schedule", schedule, "--checkpoint-every", "2"),
    ]

    def paths(name: str) -> list[str]:
        return ["--output-dir", str(here / schedule / name), "--checkpoint-dir", str(here / schedule / f"{name}_ckpt")]

    whole = run(here, *common, *paths("whole"))
    with contextlib.suppress(Interrupted):
        run(here, *common, *paths("parts"), interrupt_at=5)
    return whole, run(here, *common, *paths("parts"), "--resume")


@pytest.mark.parametrize("schedule", ["ddg", "1f1b"])
def test_a_resumed_run_equals_one_in_one_go(ranks: GetRanks, files: Path, schedule: str) -> None:
    whole, resumed = ranks(2).run(interrupted_and_resumed, str(files), schedule)[0]
    timed = {"seconds", "samples_per_second"}
    assert whole.keys() == resumed.keys() > timed
    assert {key: whole[key] for key in whole.keys() - timed} == {key: resumed[key] for key in whole.keys() - timed}
    assert [whole[key] for key in ("schedule", "stages", "micro_batches", "batch_size")] == [schedule, 2, 2, 8]
    for name in ("whole_ckpt", "parts_ckpt"):
        saved = {path.name for path in (files / schedule / name).iterdir()}
        assert saved == {"global_step4", "global_step6", "latest", "settings.json"}, "the newest two"
    states = [state_of(files / schedule / name / "global_step6") for name in ("whole_ckpt", "parts_ckpt")]
    assert states[0] == states[1]
    assert any("running_var" in place for place in states[0])
    assert any("momentum_buffer" in place for place in states[0])
    curves = [(files / schedule / name / "curves.png").read_bytes() for name in ("whole", "parts")]
    assert curves[0] == curves[1]


def torchvision_weights(rank: int, world_size: int, folder: str) -> tuple[Any, Any]:
    """Metrics of a run, and of the evaluation of what it saved."""
    here = Path(folder)
    common = ["--dataset", "imagefolder", "--data-dir", folder, "--image-size", "64", "--model", "resnet18"]
    common += ["--workers", "0", "--output-dir", str(here / "resnet18")]
    trained = run(here, *common, "--epochs", "1", "--save", str(here / "resnet18"))
    return trained, run(here, *common, "--eval-only", "--load", str(here / "resnet18"))


def test_torchvision_resnet_weights_load_in_torchvision(ranks: GetRanks, files: Path, one_thread: None) -> None:
    from torchvision.models import resnet18

    from ds_ddg.models import read_state_dict

    trained, evaluated = ranks(2).run(torchvision_weights, str(files))[0]
    assert evaluated["train_loss"] is None
    assert [evaluated[name] for name in HELD_OUT] == [trained[name] for name in HELD_OUT]
    net = resnet18(num_classes=2)
    net.load_state_dict(read_state_dict(files / "resnet18"))
    _, test = data.load("imagefolder", files, image_size=64)
    assert_same_metrics(trained, net, test)


def cifar_weights(rank: int, world_size: int, folder: str) -> dict[str, Any] | None:
    out = str(Path(folder) / "cifar")
    return run(Path(folder), "--model", "cifar_resnet8", "--epochs", "1", "--output-dir", out, "--save", out)


def test_weights_of_a_cifar_resnet_load_without_a_pipeline(ranks: GetRanks, files: Path, one_thread: None) -> None:
    from ds_ddg.models import cifar_resnet, read_state_dict

    metrics = ranks(2).run(cifar_weights, str(files))[0]
    assert metrics is not None
    net = torch.nn.Sequential(*[spec.build() for spec in cifar_resnet(8)])
    net.load_state_dict(read_state_dict(files / "cifar"))
    _, test = data.load("digits")
    assert_same_metrics(metrics, net, test)
    (monitored,) = (files / "csv").rglob("*test_accuracy.csv")
    assert str(metrics["test_accuracy"]) in monitored.read_text()


def no_room(rank: int, world_size: int, folder: str, name: str) -> str:
    """What a rank says if the first one cannot write the weights."""
    from deepspeed.pipe import PipelineModule

    from ds_ddg.models import WeightsError
    from recipes.resnet import model

    net = PipelineModule(model.layer_specs(name, 2), num_stages=world_size, loss_fn=torch.nn.functional.cross_entropy)
    with pytest.raises(WeightsError) as raised:
        model.save_weights(net, name, Path(folder))
    return str(raised.value)


@pytest.mark.parametrize("name", ["cifar_resnet8", "resnet18"])
def test_weights_that_cannot_be_written_end_every_rank(ranks: GetRanks, tmp_path: Path, name: str) -> None:
    (tmp_path / "weights").write_text("no directory")
    first, last = ranks(2).run(no_room, str(tmp_path / "weights"), name)
    assert last == f"rank 0: {first}"
    assert "weights" in first


def assert_same_metrics(metrics: dict[str, Any], net: torch.nn.Module, test: Split) -> None:
    """The pipeline's, over micro-batches that had to be filled up, are those of the network in one process."""
    with torch.no_grad():
        logits = net.eval()(test.read(torch.arange(len(test.labels)), None))
    hits = logits.topk(min(5, logits.shape[1])).indices == test.labels[:, None]
    expected = [hits[:, 0].double().mean(), hits.any(dim=1).double().mean()]
    assert [metrics[name] for name in HELD_OUT[1:]] == pytest.approx([float(share) for share in expected], abs=1e-9)
    assert metrics["test_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, test.labels)), 1e-5)


def refusals(rank: int, world_size: int, folder: str) -> list[str]:
    """What the recipe says to arguments that cannot work, some of them on one rank only."""
    here = Path(folder)
    empty = here / f"nothing{rank}"  # not the same folder on both ranks
    empty.mkdir(exist_ok=True)
    checkpoints = here / "refused"
    out = ["--output-dir", str(here / "refused_out")]
    checkpoints.mkdir(exist_ok=True)
    (checkpoints / "global_step3").mkdir(exist_ok=True)
    (checkpoints / "latest").write_text("global_step3")
    (checkpoints / "settings.json").write_text(json.dumps({"model": "cifar_resnet20"}))
    images = ["--dataset", "imagefolder", "--image-size", "32"]
    cases = [
        [*images, "--data-dir", folder if rank == 0 else str(empty)],
        ["--dataset", "cifar100", "--data-dir", str(empty)],
        ["--model", "resnet19"],
        ["--load", str(empty)],
        ["--checkpoint-dir", str(checkpoints)],
        ["--checkpoint-dir", str(checkpoints), "--resume"],
        ["--output-dir", "/proc/nope"],
        ["--save", "/proc/nope"],
        ["--stages", "3"],
    ]
    said = []
    for case in cases:
        with pytest.raises(SystemExit) as stopped:
            run(here, *out, *case, *(["--model", "cifar_resnet8"] if "--model" not in case else []))
        said.append(str(stopped.value))
    return said


def test_what_is_wrong_on_one_rank_stops_all(ranks: GetRanks, files: Path) -> None:
    said = ranks(2).run(refusals, str(files))
    assert said[0] == said[1]
    patterns = [
        rf"rank 1: {files}/nothing1/train is not there. Expected below {files}/nothing1: train/CLASS",
        r"rank 0, 1: CIFAR-100 is not complete: train, test missing in .*/nothing0/cifar-100-python",
        r"rank 0, 1: torchvision has no ResNet 'resnet19', it has .*resnet18.*; for images of 32x32 there is",
        r"rank 0, 1: .*/nothing0 has neither model.safetensors nor",
        r"rank 0, 1: .*/refused holds checkpoints of an earlier run \(global_step3\): add --resume",
        r"rank 0, 1: the checkpoints in .*/refused are of a run with model 'cifar_resnet20', now 'cifar_resnet8': use",
        r"rank 0: --output-dir: cannot write to '/proc/nope' \(No such file or directory\); name a folder",
        r"rank 0, 1: --save: cannot write to '/proc/nope' ",
        r"--stages 3 needs a multiple of 3 processes, .*, got 2; start as many .*, or use --stages 1 or 2",
    ]
    for text, pattern in zip(said[0], patterns, strict=True):
        assert re.match(pattern, text), text


def interfered_with(rank: int, world_size: int, folder: str, zero: bool) -> list[str]:
    """What is said when a run is to go on with another learning rate, or from files that were spoilt."""
    import torch.distributed as dist

    here = Path(folder) / f"interfered{zero}"
    here.mkdir(exist_ok=True)
    bf16_zero1 = {
        "bf16": {"enabled": True},
        "data_types": {"buffer_dtype": "bf16"},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    config = {**CONFIG, **(bf16_zero1 if zero else {})}
    checkpoints = here / "checkpoints"
    usual = ["--dataset", "imagefolder", "--data-dir", folder, "--image-size", "32", "--workers", "0", "--epochs", "1"]
    usual += ["--model", "cifar_resnet8", "--output-dir", str(here), "--checkpoint-dir", str(checkpoints)]

    def configured(lr: float) -> None:
        changed = {**config, "optimizer": {"type": "SGD", "params": {"lr": lr, "momentum": 0.9}}}
        dist.barrier()
        if rank == 0:
            (here / "ds.json").write_text(json.dumps(changed))
        dist.barrier()

    def refused() -> str:
        with pytest.raises(SystemExit) as stopped:
            run(here, *usual, "--resume")
        return str(stopped.value)

    configured(0.02)
    run(here, *usual, "--checkpoint-every", "1")
    configured(0.03)
    said = [refused()]
    configured(0.02)
    for file in sorted((checkpoints / "global_step3").iterdir()):
        content = file.read_bytes()
        dist.barrier()
        if rank == 0:
            file.write_bytes(content[: len(content) // 2])
        dist.barrier()
        said.append(refused())
        dist.barrier()
        if rank == 0:
            file.write_bytes(content)
        dist.barrier()
    run(here, *usual, "--resume")
    # A rank that could read its own files tells of the one that could not.
    told = re.compile(r"stage \d .*failed in load_checkpoint: ValueError: ")
    return [told.sub("", text.replace(str(checkpoints), "DIR")) for text in said]


@pytest.mark.parametrize("zero", [False, True], ids=["fp32", "bf16 with ZeRO-1"])
def test_a_run_goes_on_as_it_was_or_not_at_all(ranks: GetRanks, files: Path, zero: bool) -> None:
    """Each single file of a real checkpoint, cut off: both ranks stop before either has loaded anything."""
    first, second = ranks(2).run(interfered_with, str(files), zero)
    assert first == second
    assert first[0].startswith(
        "rank 0, 1: the checkpoints in DIR are of a run with config.optimizer.params.lr 0.02, now 0.03: use the same"
    )
    damaged = []
    for text in first[1:]:
        found = re.fullmatch(
            r"cannot load DIR/global_step3: (\S+\.pt) is damaged \(\d+ bytes, cut off or never written\); nothing was "
            r"changed; there is also global_step2: to go on from it, write its name into DIR/latest",
            text,
        )
        assert found, text
        damaged.append(found[1])
    expected = [f"layer_0{n}-model_states.pt" for n in range(5)] + [f"mp_rank_0{n}_model_states.pt" for n in range(2)]
    if zero:
        expected = sorted(expected + [f"bf16_zero_pp_rank_0_mp_rank_0{n}_optim_states.pt" for n in range(2)])
    assert damaged == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume and --checkpoint-every need --checkpoint-dir"),
        (["--stages", "0"], "argument --stages: must be at least 1, got 0"),
        (["--eval-only"], "--eval-only needs weights"),
        (["--dataset", "mnist"], "invalid choice: 'mnist'"),
    ],
)
def test_arguments_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    from recipes.resnet import train

    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit):
        train.parse_arguments()
    assert message in capsys.readouterr().err


def test_stages_have_the_same_number_of_blocks() -> None:
    for name, blocks in (("cifar_resnet20", 9), ("resnet18", 8), ("resnet50", 16)):
        specs = model.layer_specs(name, num_classes=7)
        counted = [spec for spec in specs if re.search(model.PARTITION.removeprefix("type:"), spec.typename.__name__)]
        assert len(counted) == blocks + 1
