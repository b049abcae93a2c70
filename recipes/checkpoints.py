"""Checkpoints of the recipes: they are saved when they are due, and a run with --resume goes on from the newest."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from tqdm import tqdm

import ds_ddg
from ds_ddg.checkpoint.folder import LATEST, latest, write_whole
from ds_ddg.comm.p2p import StageError
from ds_ddg.models.ranks import gather
from recipes.common import on_every_rank, seed_from
from recipes.progress import Progress
from recipes.settings import differences, recorded

KEPT_CHECKPOINTS = 2
"""Checkpoints that stay: the newest, and the one before in case a crash or a full disk has spoilt the newest."""

SETTINGS = "settings.json"

TAG = "global_step"
"""The name that DeepSpeed gives a checkpoint, without the number of calls that follows it."""


class Checkpoints:
    """Saves a run in DeepSpeed's layout, and goes on from the newest save as if it had never stopped, to the last bit.

    A resumed run equals one that was not interrupted and saved at the same calls: a save drains the pipeline. From
    each save on, PyTorch's random numbers (dropout) start from a seed of their own, so there is no state of generators
    to keep. Data must depend on the seed and the number of the call only.

    Args:
        args: the arguments that `common.add_arguments` has added.
        engine: made by ``ds_ddg.initialize``.
        progress: the record of the run, saved and restored with the engine.
        every: calls between two saves, unless --checkpoint-every says otherwise.
        **settings: settings that decide about the training, besides those of `progress`: the DeepSpeed `config`,
            arguments of the recipe. A checkpoint of a run with other settings is refused.
    """

    def __init__(
        self, args: argparse.Namespace, engine: ds_ddg.DDGEngine, progress: Progress, every: int, **settings: Any
    ) -> None:
        self._directory: Path | None = args.checkpoint_dir
        self._every = args.checkpoint_every or every
        self._resume = args.resume
        self._seed = args.seed
        self._trains = not getattr(args, "eval_only", False)
        # How it was trained does not matter to a run that only evaluates.
        self._settings = recorded({**progress.settings, **settings} if self._trains else progress.settings)
        self._engine, self._progress = engine, progress

    def restore(self) -> None:
        """Load the newest checkpoint with --resume, if there is one; to be called once, before the first call.

        Raises:
            SystemExit: there are checkpoints that --resume did not ask for, of another run or damaged; every rank
                raises it.
        """
        if self._directory is not None:
            with on_every_rank():
                tag = self._newest(self._directory)
            tags = gather(tag)
            if len(set(tags)) > 1:
                raise SystemExit(f"{self._directory} is not the same folder on all machines: by rank it has {tags}")
            if tag is not None:
                self._load(self._directory, tag)
            if self._trains and dist.get_rank() == 0:
                # Also when a run goes on: earlier versions recorded less, and it may be longer than planned.
                self._directory.mkdir(parents=True, exist_ok=True)
                write_whole(self._directory / SETTINGS, json.dumps(self._settings, indent=2) + "\n")
        self._reseed()

    def save_if_due(self) -> None:
        """Save when it is time, and at the end of the run; to be called after each call and its evaluation."""
        calls = self._progress.calls
        if self._directory is None or (calls % self._every and calls < self._progress.total_calls):
            return
        self._engine.save_checkpoint(str(self._directory), client_state={"progress": self._progress.state_dict()})
        if dist.get_rank() == 0:
            # A save of a later call is of a run that was given up, and torn perhaps: it is none of the newest.
            for old in _saved(self._directory, until=calls)[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old)
        self._reseed()

    def _newest(self, directory: Path) -> str | None:
        """Return the tag of the checkpoint to load; ValueError or OSError if that cannot be what the user wants."""
        tag = latest(directory)
        if tag is None:
            return None
        if not self._resume:
            raise ValueError(
                f"{directory} holds checkpoints of an earlier run ({tag}): add --resume to go on from there, or name "
                "another --checkpoint-dir"
            )
        if not tag or not (directory / tag).is_dir():
            raise FileNotFoundError(
                f"{directory / LATEST} names {tag!r}, which is not there; {_others(directory, tag)}"
            )
        try:
            then = json.loads((directory / SETTINGS).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{directory / SETTINGS}, which says what run the checkpoints are of, cannot be read: {error}; start "
                "anew in another --checkpoint-dir"
            ) from None
        if not self._trains:
            then = {key: value for key, value in then.items() if key in self._settings}
        other = differences(then, self._settings)
        if other:
            why = ' (they set the "auto" of the scheduler, so the learning rate of every call)'
            listed = "; ".join(words + why * (path == "epochs") for path, words in other.items())
            raise ValueError(
                f"the checkpoints in {directory} are of a run with {listed}: use the same, or start anew in another "
                "--checkpoint-dir"
            )
        return tag

    def _load(self, directory: Path, tag: str) -> None:
        try:
            _, client_state = self._engine.load_checkpoint(str(directory), tag)
        except (OSError, ValueError, StageError) as error:  # one of them on every rank, or none at all
            raise SystemExit(f"{error}; {_others(directory, tag)}") from error
        calls, planned = client_state["progress"]["calls"], self._progress.total_calls
        if self._trains and calls > planned:
            raise SystemExit(f"{directory / tag} is past the end of this run of {planned} calls: raise --epochs")
        self._progress.load_state_dict(client_state["progress"])
        if dist.get_rank() == 0:
            tqdm.write(f"going on from {directory / tag}, after {calls} calls")

    def _reseed(self) -> None:
        torch.manual_seed(seed_from(self._seed, self._progress.calls, dist.get_rank()))


def _saved(directory: Path, until: float = math.inf) -> list[Path]:
    """Return the checkpoints in `directory` up to call number `until`, oldest first."""
    calls_of = {path: path.name.removeprefix(TAG) for path in directory.glob(f"{TAG}*")}
    found = [path for path, calls in calls_of.items() if calls.isdecimal() and int(calls) <= until]
    return sorted(found, key=lambda path: int(calls_of[path]))


def _others(directory: Path, tag: str) -> str:
    """Return what to do if the checkpoint named `tag` cannot be loaded."""
    others = [path.name for path in _saved(directory) if path.name != tag]
    if not others:
        return "there is no other, start anew in another --checkpoint-dir"
    return f"there is also {others[-1]}: to go on from it, write its name into {directory / LATEST}"
