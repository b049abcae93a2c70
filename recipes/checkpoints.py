"""Checkpoints of the recipes: saved when they are due, and gone on from with --resume."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from deepspeed import comm as dist
from tqdm import tqdm

import ds_ddg
from recipes.common import gather, on_every_rank, seed_from
from recipes.progress import Progress

KEPT_CHECKPOINTS = 2
"""The newest, and the one before in case a crash or a full disk has spoilt the newest."""

SETTINGS = "settings.json"

TAG = "global_step"
"""What DeepSpeed calls a checkpoint, followed by the number of calls."""


class Checkpoints:
    """Saves in DeepSpeed's layout, and goes on from the newest as if the run had never stopped, to the last bit.

    A resumed run equals one that was not interrupted and saved at the same calls: a save drains the pipeline. From
    each save on, PyTorch's random numbers (dropout) start from a seed of their own, so there is no state of generators
    to keep. Data must depend on the seed and the number of the call only.

    Args:
        args: parsed from `add_arguments`.
        engine: made by ``ds_ddg.initialize``.
        progress: saved and restored with the engine.
        every: calls between two saves, unless --checkpoint-every says otherwise.
    """

    def __init__(self, args: argparse.Namespace, engine: ds_ddg.DDGEngine, progress: Progress, every: int) -> None:
        self._directory: Path | None = args.checkpoint_dir
        self._every = args.checkpoint_every or every
        self._resume = args.resume
        self._seed = args.seed
        self._engine, self._progress = engine, progress

    def restore(self) -> None:
        """Once, before the first call: load the newest checkpoint with --resume, if there is one.

        SystemExit on every rank if there are checkpoints that --resume did not ask for, or of another run.
        """
        if self._directory is not None:
            with on_every_rank():
                tag = self._newest(self._directory)
            tags = gather(tag)
            if len(set(tags)) > 1:
                raise SystemExit(f"{self._directory} is not the same folder on all machines: by rank it has {tags}")
            if tag is not None:
                self._load(self._directory, tag)
            elif dist.get_rank() == 0:
                self._directory.mkdir(parents=True, exist_ok=True)
                (self._directory / SETTINGS).write_text(json.dumps(self._progress.settings, indent=2) + "\n")
        self._reseed()

    def save_if_due(self) -> None:
        """After a call and what belongs to it (an evaluation): save when it is time, and at the end of the run."""
        calls = self._progress.calls
        if self._directory is None or (calls % self._every and calls < self._progress.total_calls):
            return
        self._engine.save_checkpoint(str(self._directory), client_state={"progress": self._progress.state_dict()})
        if dist.get_rank() == 0:
            calls_of = {path: path.name.removeprefix(TAG) for path in self._directory.glob(f"{TAG}*")}
            saved = sorted((int(calls), path) for path, calls in calls_of.items() if calls.isdecimal())
            for _, old in saved[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old)
        self._reseed()

    def _newest(self, directory: Path) -> str | None:
        """The tag of the checkpoint to load. ValueError or OSError if that cannot be what the user wants."""
        latest = directory / "latest"
        if not latest.is_file():
            return None
        tag = latest.read_text().strip()
        if not self._resume:
            raise ValueError(
                f"{directory} holds checkpoints of an earlier run ({tag}): add --resume to go on from there, or name "
                "another --checkpoint-dir"
            )
        if not (directory / tag).is_dir():
            raise FileNotFoundError(f"{latest} names {tag}, but {directory / tag} is not there; name another in it")
        then = json.loads((directory / SETTINGS).read_text())
        now = json.loads(json.dumps(self._progress.settings))
        keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        other = [f"{key} {then.get(key)!r}, now {now.get(key)!r}" for key in keys]
        if keys:
            raise ValueError(
                f"the checkpoints in {directory} are of a run with {'; '.join(other)}: use the same, or start anew in "
                "another --checkpoint-dir"
            )
        return tag

    def _load(self, directory: Path, tag: str) -> None:
        _, client_state = self._engine.load_checkpoint(str(directory), tag)
        self._progress.load_state_dict(client_state["progress"])
        if dist.get_rank() == 0:
            tqdm.write(f"going on from {directory / tag}, after {self._progress.calls} calls")

    def _reseed(self) -> None:
        torch.manual_seed(seed_from(self._seed, self._progress.calls, dist.get_rank()))
