"""What the recipes do around their training: ``--as-if-stages`` trains in one process as a pipeline does."""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.distributed import GetRanks

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}},
    "steps_per_print": 1000000,
}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


class Enough(Exception):  # noqa: N818 (no error)
    """Ends a training when there is enough to compare."""


def losses(rank: int, world_size: int, folder: str, *arguments: str) -> dict[int, float]:
    """Train a ResNet on noise for some calls; return their losses, by the number of the call."""
    from recipes.progress import Progress
    from recipes.resnet import train

    usual, found = Progress.update, {}

    def update(self: Progress, loss: Any, call: int) -> None:
        usual(self, loss, call)
        found[call] = float(loss)
        if len(found) == 6:
            raise Enough

    multiprocessing.set_start_method("fork", force=True)
    options = ["--dataset", "random", "--image-size", "8", "--model", "cifar_resnet8", "--epochs", "1"]
    sys.argv = ["train.py", "--deepspeed_config", f"{folder}/ds.json", "--output-dir", folder, *options, *arguments]
    Progress.update = update  # type: ignore[method-assign]
    try:
        train.main()
    except Enough:
        return found
    finally:
        Progress.update = usual  # type: ignore[method-assign]
    raise AssertionError("the training is over")


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_as_if_stages_trains_as_a_pipeline(ranks: GetRanks, tmp_path: Path, one_thread: None, clip: float) -> None:
    """To rounding: the kernels behind a border see another memory format, and training lets that grow."""
    (tmp_path / "ds.json").write_text(json.dumps({**CONFIG, "gradient_clipping": clip}))
    pipeline = ranks(2).run(losses, str(tmp_path))[0]
    alone = ranks(1).run(losses, str(tmp_path), "--as-if-stages", "2")[0]
    plain = ranks(1).run(losses, str(tmp_path))[0]
    assert alone == pytest.approx(pipeline, rel=1e-4)
    assert plain != pytest.approx(pipeline, rel=1e-4)


def refused(rank: int, world_size: int, folder: str) -> str:
    try:
        losses(rank, world_size, folder, "--as-if-stages", "2")
    except SystemExit as error:
        return str(error)
    raise AssertionError("it trained")


@pytest.mark.parametrize(
    ("ddg", "named"),
    [
        ({"weights": "current"}, "weights"),
        ({"clip": "global", "slack": "auto"}, "clip, slack"),
        ({"enabled": False}, "enabled"),
        ({"sync_steps": 3}, "sync_steps"),
    ],
)
def test_as_if_stages_refuses_what_it_cannot_imitate(
    ranks: GetRanks, tmp_path: Path, ddg: dict[str, Any], named: str
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({**CONFIG, "ddg": ddg}))
    (said,) = ranks(1).run(refused, str(tmp_path))
    assert said.startswith(f'--as-if-stages 2: "ddg" sets {named}, which one process cannot imitate')


@pytest.mark.parametrize(
    ("blocks", "wrapper"),
    [
        ({**BF16, "zero_optimization": {"stage": 1}}, "BF16_Optimizer"),
        ({"zero_optimization": {"stage": 1}}, "DeepSpeedZeroOptimizer"),
    ],
)
def test_as_if_stages_refuses_optimizers_of_deepspeed(
    ranks: GetRanks, tmp_path: Path, blocks: dict[str, Any], wrapper: str
) -> None:
    config = {**CONFIG, **blocks, "zero_allow_untested_optimizer": True}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    (said,) = ranks(1).run(refused, str(tmp_path))
    assert said.startswith(f"--as-if-stages 2: the config has bf16, fp16 or ZeRO, whose {wrapper} cannot be delayed")


def test_as_if_stages_needs_one_process(ranks: GetRanks, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG))
    for said in ranks(2).run(refused, str(tmp_path)):
        assert said == "--as-if-stages 2: needs one process, got 2; start it with --num_gpus 1"
