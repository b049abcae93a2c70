"""What is left if a save or a load goes wrong on one rank: a whole checkpoint, ranks that know, and none that waits.

`goes on`: every rank catches its error and stays, so that no rank can rely on a dying process to be woken up.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import toy
from helpers.distributed import GetRanks, Outcome

TIMEOUT = 60.0
SOON = 10.0  # generous: what is caught is a hang, and other processes may be busy on this machine
SCHEDULES = ("ddg", "1f1b", "not enabled")


def build(schedule: str = "ddg", num_stages: int = 2, **more: Any) -> Any:
    engine = toy.engine(num_stages, 2, "adamw", {"enabled": schedule != "not enabled"}, **more)
    if schedule == "1f1b":
        engine.schedule = schedule
    return engine


def train(engine: Any, calls: int = 2) -> None:
    data = toy.batches(2 * calls, seed=engine.global_rank // engine.num_stages)
    for _ in range(calls):
        engine.train_batch(data)


def said(action: Callable[[], Any]) -> str:
    """What it raises, with its kind; empty if nothing."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def latest(directory: str | Path) -> str:
    return (Path(directory) / "latest").read_text()


def assert_told(heard: list[str], culprits: list[int], *parts: str) -> None:
    """The culprits raise what is theirs, the others that and where it was."""
    for rank, text in enumerate(heard):
        for part in parts:
            assert part in text, heard
        if rank not in culprits:
            assert text.startswith("StageError: stage "), heard
            assert any(f"(rank {culprit}) failed in" in text for culprit in culprits), heard
        else:
            assert not text.startswith("StageError"), heard


# -- a save that fails ------------------------------------------------------------------------------------------------


@contextmanager
def full_disk(engine: Any) -> Iterator[None]:
    """Nothing fits but the beginning of a file."""
    writer = engine.checkpoint_engine
    real = writer.save

    def save(state_dict: Any, path: str) -> None:
        Path(path).write_bytes(bytes(100))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    writer.save = save
    try:
        yield
    finally:
        writer.save = real


def save_badly(engine: Any, what: str, directory: str) -> None:
    """One rank's part of a save that goes wrong there."""
    if what == "full disk":
        with full_disk(engine):
            engine.save_checkpoint(directory, tag="torn")
    elif what == "client state":
        engine.save_checkpoint(directory, tag="torn", client_state={"mine": lambda: 0})
    elif what == "not writable":
        (Path(directory) / f"file{engine.global_rank}").write_text("")
        engine.save_checkpoint(f"{directory}/file{engine.global_rank}", tag="torn")
    else:
        engine.save_checkpoint("", tag="torn")


SAVES = {
    "full disk": "No space left on device",
    "client state": "pickle",
    "not writable": "",
    "no directory": "save_dir",
}


def fail_to_save(rank: int, world_size: int, directory: str, schedule: str, culprits: Any) -> list[Any]:
    engine = build(schedule)
    train(engine)
    engine.save_checkpoint(directory, tag="whole")
    found: list[Any] = []
    for what in SAVES:
        for culprit in culprits:
            if culprit == rank:
                heard = said(lambda what=what: save_badly(engine, what, directory))
            else:
                heard = said(lambda: engine.save_checkpoint(directory, tag="torn"))
            found.append((what, culprit, heard, latest(directory)))
            train(engine, 1)
    engine.save_checkpoint(directory + "/elsewhere")
    before = toy.state(engine.module)
    train(engine)
    engine.load_checkpoint(directory + "/elsewhere")
    same = all(map(torch.equal, before, toy.state(engine.module)))
    train(engine)
    found.append((latest(directory + "/elsewhere"), same, engine.global_steps))
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("num_ranks", "culprits"), [(2, (0, 1)), (4, (0, 2))])
def test_a_save_that_fails_on_one_rank_fails_on_all(
    ranks: GetRanks, tmp_path: Path, schedule: str, num_ranks: int, culprits: tuple[int, ...]
) -> None:
    """Then training goes on, and is saved elsewhere. Of two replicas one writes."""
    results = ranks(num_ranks).run(fail_to_save, str(tmp_path), schedule, culprits, timeout=TIMEOUT)
    calls = 2 + len(SAVES) * len(culprits)
    for case in zip(*(found[:-1] for found in results), strict=True):
        what, culprit = case[0][:2]
        assert_told([heard for *_, heard, _ in case], [culprit], SAVES[what])
        assert {named for *_, named in case} == {"whole"}, case
    assert [found[-1] for found in results] == [(f"global_step{calls}", True, calls + 2)] * num_ranks


def fail_with_zero(rank: int, world_size: int, directory: str) -> tuple[str, str]:
    from helpers.resuming import zero_engine

    engine = zero_engine(2, "stash")
    train(engine)
    engine.save_checkpoint(directory)
    train(engine, 1)
    with full_disk(engine) if rank == 3 else nullcontext():
        heard = said(lambda: engine.save_checkpoint(directory))
    train(engine, 1)
    return heard, latest(directory)


def test_a_replicas_optimizer_state_that_cannot_be_saved(ranks: GetRanks, tmp_path: Path) -> None:
    results = ranks(4).run(fail_with_zero, str(tmp_path), timeout=TIMEOUT)
    assert_told([heard for heard, _ in results], [3], "No space left on device")
    assert {named for _, named in results} == {"global_step2"}


def name_differently(rank: int, world_size: int, directory: str) -> tuple[str, list[str]]:
    engine = build()
    train(engine)
    heard = said(lambda: engine.save_checkpoint(directory, tag=f"by{rank}"))
    train(engine, 1)
    return heard, sorted(path.name for path in Path(directory).iterdir())


def test_ranks_that_save_under_different_tags(ranks: GetRanks, tmp_path: Path) -> None:
    """No rank would have the files of the others, and `latest` name one of them."""
    for heard, files in ranks(2).run(name_differently, str(tmp_path), timeout=TIMEOUT):
        assert heard.startswith("ValueError: save_checkpoint needs the same tag on every rank, got 'by0' on ranks [0]")
        assert files == []


def overwrite(rank: int, world_size: int, directory: str) -> tuple[str, bool, str]:
    engine = build()
    train(engine)
    engine.save_checkpoint(directory, tag="best")
    with full_disk(engine) if rank == 1 else nullcontext():
        heard = said(lambda: engine.save_checkpoint(directory, tag="best"))
    named = (Path(directory) / "latest").exists()
    for save_latest in (True, False):
        engine.save_checkpoint(directory, tag="best", save_latest=save_latest)
    return heard, named, latest(directory)


def test_an_overwritten_checkpoint_is_not_latest_meanwhile(ranks: GetRanks, tmp_path: Path) -> None:
    results = ranks(2).run(overwrite, str(tmp_path), timeout=TIMEOUT)
    assert_told([heard for heard, *_ in results], [1], "No space left on device")
    assert [found for _, *found in results] == [[False, "best"]] * 2


def save_without_latest(rank: int, world_size: int, directory: str) -> list[str]:
    engine = build()
    engine.save_checkpoint(directory, tag="one")
    engine.save_checkpoint(directory, tag="two", save_latest=False)
    return sorted(path.name for path in Path(directory).iterdir())


def test_latest_is_written_only_if_asked_for(ranks: GetRanks, tmp_path: Path) -> None:
    assert ranks(2).run(save_without_latest, str(tmp_path), timeout=TIMEOUT) == [["latest", "one", "two"]] * 2
    assert latest(tmp_path) == "one"


# -- a rank that dies -------------------------------------------------------------------------------------------------


def die_while_saving(rank: int, world_size: int, directory: str, schedule: str, culprit: int) -> None:
    engine = build(schedule)
    train(engine)
    engine.save_checkpoint(directory, tag="whole")
    train(engine, 1)
    if rank == culprit:

        def die(state_dict: Any, path: str) -> None:
            time.sleep(0.5)  # the others are through with theirs
            os.kill(os.getpid(), signal.SIGKILL)

        engine.checkpoint_engine.save = die
    engine.save_checkpoint(directory, tag="torn")


def assert_lost(outcomes: list[Outcome], culprit: int, num_stages: int = 2) -> None:
    report = "\n".join(map(str, outcomes))
    replicas = len(outcomes) // num_stages
    name = f"stage {culprit // replicas} (rank {culprit}) is lost"
    for outcome in outcomes:
        if outcome.rank == culprit:
            assert outcome.state == "died", report
        else:
            assert (outcome.state, outcome.exc_type) == ("raised", "StageError"), report
            assert name in outcome.message, report


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("num_ranks", "culprit"), [(2, 0), (2, 1), (4, 2)])
def test_a_rank_that_dies_while_saving(
    ranks: GetRanks, tmp_path: Path, schedule: str, num_ranks: int, culprit: int
) -> None:
    outcomes = ranks(num_ranks).run(
        die_while_saving, str(tmp_path), schedule, culprit, timeout=TIMEOUT, grace=SOON, expect_failure=True
    )
    assert_lost(outcomes, culprit)
    assert latest(tmp_path) == "whole"


# -- a load -----------------------------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def reshape(path: Path) -> None:
    torch.save({name: torch.zeros(1) for name in torch.load(path)}, path)


SPOILT = {
    "remove": (remove, "ValueError: cannot load", "is missing"),
    "cut": (cut, "ValueError: cannot load", "is damaged (500 bytes"),
}


def load_spoilt(rank: int, world_size: int, directory: str, schedule: str) -> list[Any]:
    engine = build(schedule)
    train(engine)
    engine.save_checkpoint(directory, tag="whole")
    whole = toy.state(engine.module)
    found: list[Any] = []
    for what, (spoil, *_) in SPOILT.items():
        engine.save_checkpoint(directory, tag=what)
        if rank == 1:
            spoil(Path(engine.module.ckpt_layer_path(f"{directory}/{what}", 0)))
        train(engine, 1)
        engine.drain()
        before = toy.state(engine.module), engine.global_steps
        heard = said(lambda: engine.load_checkpoint(directory))
        same = all(map(torch.equal, before[0], toy.state(engine.module))) and before[1] == engine.global_steps
        train(engine, 1)
        found.append((heard, same))
    engine.load_checkpoint(directory, "whole")
    found.append(all(map(torch.equal, whole, toy.state(engine.module))))
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_checkpoint_unreadable_on_one_is_loaded_on_none(ranks: GetRanks, tmp_path: Path, schedule: str) -> None:
    """Training goes on as if nobody had asked for it."""
    results = ranks(2).run(load_spoilt, str(tmp_path), schedule, timeout=TIMEOUT)
    for index, (_, head, why) in enumerate(SPOILT.values()):
        heard = [found[index][0] for found in results]
        assert_told(heard, [1], head, why)
        assert all(text.endswith("; nothing was changed") for text in heard), heard
        assert all(found[index][1] for found in results), "nothing may have changed"
    assert [found[-1] for found in results] == [True, True]


def load_halfway(rank: int, world_size: int, directory: str) -> list[str]:
    engine = build()
    train(engine)
    for tag in ("whole", "other shapes"):
        engine.save_checkpoint(directory, tag=tag)
    if rank == 1:
        reshape(Path(engine.module.ckpt_layer_path(f"{directory}/other shapes", 0)))
    engine.save_checkpoint(directory, tag="once more")
    heard = [said(lambda: engine.load_checkpoint(directory, "other shapes"))]
    heard += [said(lambda: train(engine, 1)), said(lambda: engine.eval_batch(toy.batches(2)))]
    heard += [said(lambda: engine.save_checkpoint(directory))]
    heard += [said(lambda: engine.load_checkpoint(directory, "nowhere"))]
    heard += [said(lambda: engine.load_checkpoint(directory, "whole", load_module_only=True))]
    heard += [said(lambda: train(engine, 1))]
    heard += [said(lambda: engine.load_checkpoint(directory, "whole")), said(lambda: train(engine, 1))]
    return heard


def test_a_load_that_fails_halfway(ranks: GetRanks, tmp_path: Path) -> None:
    """Nothing can be done with what it leaves but to load another checkpoint."""
    for first, *refused, nowhere, weights, still, load, after in ranks(2).run(
        load_halfway, str(tmp_path), timeout=TIMEOUT
    ):
        assert first.startswith("StageError: stage 1 (rank 1) failed in load_checkpoint: RuntimeError"), first
        assert "size mismatch" in first
        assert first.endswith("the state of every engine is undefined now: load another checkpoint, or leave")
        why = "StageError: a load that failed has left {} undefined: load another checkpoint, or leave"
        assert refused == [why.format("module, optimizer, scheduler")] * 3
        assert "there is no checkpoint 'nowhere'" in nowhere
        assert weights == ""
        assert still == why.format("optimizer, scheduler")
        assert (load, after) == ("", "")
    assert latest(tmp_path) == "once more"


def load_latest(rank: int, world_size: int, directory: str) -> list[str]:
    """From a folder of this rank's own, as on machines that share none."""
    engine = build()
    heard = []
    path = Path(directory) / str(rank)
    path.mkdir()
    for content in ("gone", "", None):
        if content is not None:
            (path / "latest").write_text(content)
        elif rank == 0:
            (path / "latest").write_text("there")
            (path / "there").mkdir()
        else:
            (path / "latest").unlink()
        heard.append(said(lambda: engine.load_checkpoint(str(path))))
        train(engine, 1)
    return heard


def test_latest_that_names_nothing(ranks: GetRanks, tmp_path: Path) -> None:
    for gone, empty, differs in ranks(2).run(load_latest, str(tmp_path), timeout=TIMEOUT):
        for heard, named in ((gone, "gone"), (empty, "")):
            assert heard.startswith("FileNotFoundError: ")
            assert f"latest names {named!r}: there is no checkpoint {named!r} in" in heard
        assert differs == (
            "ValueError: load_checkpoint needs the same tag on every rank, got 'None' on ranks [1], 'there' on ranks "
            "[0]"
        )


# -- tied weights -----------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def tied_engine() -> Any:
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    import ds_ddg

    torch.manual_seed(7)
    layers = [TiedLayerSpec("tie", Wide), LayerSpec(nn.Linear, 6, 6), LayerSpec(nn.Linear, 6, 6)]
    net = PipelineModule(
        [*layers, TiedLayerSpec("tie", Wide)], num_stages=2, loss_fn=nn.functional.mse_loss, partition_method="uniform"
    )
    return ds_ddg.initialize(
        model=net, config=toy.config(2), optimizer=toy.OPTIMIZERS["adamw"], model_parameters=net.parameters()
    )[0]


def tied_data() -> Iterator[Any]:
    while True:
        yield torch.randn(4, 6), torch.randn(4, 6)


def fail_with_ties(rank: int, world_size: int, directory: str) -> list[str]:
    engine = tied_engine()
    for _ in range(2):
        engine.train_batch(tied_data())
    engine.save_checkpoint(directory, tag="whole")
    engine.save_checkpoint(directory, tag="other")
    heard = []
    if rank == 0:
        next(iter(engine.optimizer.state.values()))["mine"] = lambda: 0  # of the tied weight, which stage 0 owns
    heard.append(said(lambda: engine.save_checkpoint(directory, tag="torn")))
    if rank == 0:
        del next(iter(engine.optimizer.state.values()))["mine"]
    engine.train_batch(tied_data())
    if rank == 1:
        reshape(Path(engine.module.ckpt_layer_path(f"{directory}/other", 0)))
    heard.append(said(lambda: engine.load_checkpoint(directory, "other")))
    engine.load_checkpoint(directory, "whole")
    engine.train_batch(tied_data())
    return heard


def test_stages_with_ties_do_not_wait_for_one_that_failed(ranks: GetRanks, tmp_path: Path) -> None:
    """DeepSpeed broadcasts such weights in a load; their optimizer state travels in a save."""
    results = ranks(2).run(fail_with_ties, str(tmp_path), timeout=TIMEOUT)
    assert_told([saved for saved, _ in results], [0], "pickle")
    for _, loaded in results:
        assert loaded.startswith("StageError: stage 1 (rank 1) failed in load_checkpoint: RuntimeError"), loaded


# -- out of step ------------------------------------------------------------------------------------------------------


def save_alone(rank: int, world_size: int, directory: str, schedule: str, odd: int) -> str:
    engine = build(schedule)
    train(engine)
    engine.drain()
    if rank == odd:
        return said(lambda: engine.save_checkpoint(directory))
    return said(lambda: train(engine))


@pytest.mark.parametrize(("schedule", "odd"), [("ddg", 0), ("ddg", 1), ("1f1b", 0), ("not enabled", 0)])
def test_one_rank_saves_while_the_other_trains(ranks: GetRanks, tmp_path: Path, schedule: str, odd: int) -> None:
    """With DeepSpeed's schedule the first stage, waiting for others, only hears of it when a process ends."""
    heard = ranks(2).run(save_alone, str(tmp_path), schedule, odd, timeout=20.0)
    assert all("out of step" in text and "every rank" in text for text in heard), heard


def save_and_load(rank: int, world_size: int, directory: str) -> str:
    engine = build(num_stages=1)
    if rank == 1:
        return said(lambda: engine.save_checkpoint(directory))
    return said(lambda: engine.load_checkpoint(directory))


def test_one_replica_saves_while_the_other_loads(ranks: GetRanks, tmp_path: Path) -> None:
    for heard in ranks(2).run(save_and_load, str(tmp_path), timeout=20.0):
        assert "out of step" in heard
        assert "load_checkpoint" in heard
        assert "save_checkpoint" in heard
