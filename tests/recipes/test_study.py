"""The recipes as problems of ``ds-ddg study``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ds_ddg.study.training import train
from recipes import study
from recipes.resnet.model import layer_specs

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = Path(study.ROOT) / "configs"
SMALL = ["--layers", "2", "--hidden", "16", "--heads", "2", "--length", "16", "--vocabulary", "300"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Have the language recipes train small networks on a small text."""
    words = ["delay", "stage", "weight", "gradient", "update", "pipeline", "batch", "loss", "rate", "step"]
    text = "\n\n".join(" ".join(words[(i * j) % 10] for j in range(1, 40)) for i in range(1, 300))
    (tmp_path / "text.txt").write_text(text)
    arguments = study._arguments
    monkeypatch.setattr(study, "_arguments", lambda name: [*arguments(name), *SMALL, "--text", str(tmp_path)])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["bert", "gpt"])
def test_language_recipes_train_late(name: str) -> None:
    problem = replace(getattr(study, name)(0), calls=3)
    result = train(problem, stages=2, micro_batches=2, rules="auto")
    assert 1 < result["perplexity"] < 1000
    again = replace(getattr(study, name)(0), calls=3)
    assert train(again, 2, 2, "auto")["perplexity"] == result["perplexity"], "the same seed trained otherwise"


@pytest.mark.usefixtures("small")
def test_tied_weights_stay_one() -> None:
    net = nn.Sequential(*study.gpt(0).layers)
    names = [name for name, _ in net.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(net.parameters())) + 1


def test_resnet_is_that_of_its_config() -> None:
    """Layers from the seeds of the pipeline, an epoch of the config's batches, its rate after the warm-up."""
    config = json.loads((CONFIGS / "resnet20_digits.json").read_text())
    problem = study.resnet(3)
    torch.manual_seed(3000)
    expected = layer_specs("cifar_resnet20", 10)[0].build()
    assert all(map(torch.equal, problem.layers[0].parameters(), expected.parameters()))
    inputs, labels = next(problem.batches(4))
    assert len(inputs) == len(labels) == 8
    assert problem.calls == 10 * (1437 // 32)
    optimizer = problem.optimizer(nn.Sequential(*problem.layers))
    assert isinstance(optimizer, torch.optim.SGD)
    assert problem.scheduler is not None
    scheduler = problem.scheduler(optimizer)
    for _ in range(45):
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(config["optimizer"]["params"]["lr"], rel=0.01)
    result = train(replace(problem, calls=2), stages=4, micro_batches=2)
    assert set(result) == {"train_loss", "test_loss", "test_accuracy", "seconds"}


def test_a_batch_has_micro_batches_of_one_size() -> None:
    with pytest.raises(ValueError, match="a batch of 32 cannot be divided into 5"):
        next(study.resnet(0).batches(5))
