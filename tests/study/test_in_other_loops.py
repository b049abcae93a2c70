"""``ds_ddg.delayed`` under transformers' Trainer and accelerate: as in a plain loop, to the last bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_ddg
from helpers.paths import LAUNCHER_VARIABLES

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("one_thread")

COUNT, BATCH, M = 18, 2, 2
STAGES = {"first": 0, "second": 1, "last": 2}


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test find accelerate as a new process does: its state is global, and other tests use it too."""
    from accelerate.state import AcceleratorState, GradientState

    for name in [*LAUNCHER_VARIABLES, *(name for name in os.environ if name.startswith("ACCELERATE_"))]:
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Model(nn.Module):
    """Three layers and their loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second, self.last = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.last(torch.tanh(self.second(self.first(x).tanh()))), labels)}


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(6)
    return [
        {"x": torch.randn(6, generator=generator), "labels": torch.randint(6, (), generator=generator)}
        for _ in range(COUNT)
    ]


def batches() -> list[dict[str, Tensor]]:
    data = samples()
    return [
        {name: torch.stack([sample[name] for sample in data[i : i + BATCH]]) for name in data[0]}
        for i in range(0, COUNT, BATCH)
    ]


def optimizer_of(model: nn.Module, late: bool = True) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return ds_ddg.delayed(optimizer, STAGES, model=model, micro_batches=M, rules="auto") if late else optimizer


def plain_loop(late: bool = True, epochs: int = 1, last: int = M) -> list[Tensor]:
    """The last step of an epoch has one micro-batch, whose loss is divided by `last`."""
    model = Model()
    optimizer = optimizer_of(model, late)
    data = batches()
    for _ in range(epochs):
        for i, batch in enumerate(data, 1):
            (model(**batch)["loss"] / (last if i == len(data) else M)).backward()
            if i % M == 0 or i == len(data):
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def accelerated(late: bool = True) -> list[Tensor]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=M)
    model = Model()
    loader = torch.utils.data.DataLoader(samples(), batch_size=BATCH)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer_of(model, late), loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def trainer(path: Path, late: bool = True, **more: Any) -> Any:
    import transformers

    model = Model()
    arguments = transformers.TrainingArguments(
        str(path),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=M,
        max_grad_norm=0.5,
        num_train_epochs=2,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **more,
    )
    return transformers.Trainer(
        model, arguments, train_dataset=samples(), optimizers=(optimizer_of(model, late), None)
    )


def test_accelerate_trains_as_a_loop_does() -> None:
    assert all(map(torch.equal, accelerated(), plain_loop()))
    assert all(map(torch.equal, accelerated(late=False), plain_loop(late=False)))


def test_the_trainer_trains_as_a_loop_does(tmp_path: Path) -> None:
    for late in (False, True):
        it = trainer(tmp_path, late, save_strategy="no")
        it.train()
        expected = plain_loop(late, epochs=2, last=1)  # by as many as there are
        gap = max(float((a - b).detach().abs().max()) for a, b in zip(it.model.parameters(), expected, strict=True))
        assert gap < 1e-6, late


def test_the_trainer_resumes_with_what_is_in_flight(tmp_path: Path) -> None:
    whole = trainer(tmp_path, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer(tmp_path, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))
