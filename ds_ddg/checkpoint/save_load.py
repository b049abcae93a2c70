"""Checkpoints in DeepSpeed's layout, readable by its own engine, with what a delayed run needs to go on unbroken.

That is under a client key of its own, in the file of each stage: the newest loss and norm known, and what DeepSpeed
leaves out of tied modules. Optimizer states are DeepSpeed's own too, but for tied weights in wrapped optimizers.

If one rank fails in a save or a load, so do all (``agreement.py``); ``latest`` only ever names a checkpoint whose
files all ranks have written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from ds_ddg.checkpoint.folder import LATEST, damage, flush, latest, tag_to_load, write_latest
from ds_ddg.comm.agreement import Agreement
from ds_ddg.comm.failures import KnownToAllError
from ds_ddg.comm.p2p import StageError
from ds_ddg.host import Host, replaced
from ds_ddg.stage import RunState, Stage
from ds_ddg.telemetry.reporter import Reporter
from ds_ddg.weights.experts import expert_files
from ds_ddg.weights.stage_optimizer import StageOptimizer
from ds_ddg.weights.tied import TiedWeights, left_out_of_checkpoints

__all__ = ["CheckpointPart"]

_CHECKPOINT_KEY = "ds_ddg"


class CheckpointPart:
    """Saves and loads, as DeepSpeed does, on all ranks or on none.

    Args:
        stage: this stage.
        run: the place of the stage in its run.
        host: DeepSpeed's engine.
        agreement: makes a call succeed on all ranks or fail on all.
        tied_weights: the weights that this stage shares with others.
        updates: the updates; their last results are saved and loaded.
        reporter: the reports; the newest loss is saved and loaded.
        drain: empties the pipeline.
    """

    def __init__(
        self,
        stage: Stage,
        run: RunState,
        host: Host,
        agreement: Agreement,
        tied_weights: TiedWeights,
        updates: StageOptimizer,
        reporter: Reporter,
        drain: Callable[[], None],
    ) -> None:
        self._stage, self._run, self._host, self._agreement = stage, run, host, agreement
        self._tied_weights, self._updates, self._reporter, self._drain = tied_weights, updates, reporter, drain
        self._torn: frozenset[str] = frozenset()
        """The parts of the engine's state that a load has left half changed."""

    def save(
        self,
        save: Callable[..., Any],
        save_dir: str,
        tag: Any,
        client_state: dict[str, Any] | None,
        save_latest: bool,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Have DeepSpeed `save` after a drain: what is in flight belongs to no checkpoint."""
        self.refuse_torn()
        agreement = self._agreement
        agreement.begin("save_checkpoint")
        with agreement.all_or_none("save_checkpoint"):
            self._drain()
            tied = {key: module.state_dict() for key, module in left_out_of_checkpoints(self._host.module).items()}
            update = self._updates.pipeline_norm, tuple(self._updates.last)
            extrapolating = self._updates.rules.extrapolating(self._host.optimizer)
            mine = {"loss": self._reporter.losses.known(), "tied": tied, "update": update, "ahead": extrapolating}
            client_state = {**(client_state or {}), _CHECKPOINT_KEY: mine}
            with self._naming_the_latest(save_latest), self._as_deepspeeds(saving=True):
                result = save(save_dir, tag, client_state, False, *args, **kwargs)
                if self._host.checkpoint_engine.is_decoupled():
                    self._host._commit_decoupled_checkpoint()  # DeepSpeed does it in `step`, which no pipeline calls
        return result

    def load(
        self,
        load: Callable[..., tuple[Any, Any]],
        load_dir: str,
        tag: Any,
        load_module_strict: bool,
        load_optimizer_states: bool,
        load_lr_scheduler_states: bool,
        load_module_only: bool,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Have DeepSpeed `load` after a drain: gradients in flight belong to the weights that are given up."""
        host, agreement = self._host, self._agreement
        parts = {"optimizer": load_optimizer_states, "scheduler": load_lr_scheduler_states}
        loaded = frozenset(["module", *(part for part, on in parts.items() if on and not load_module_only)])
        agreement.begin("load_checkpoint")
        with agreement.all_or_none("load_checkpoint"):
            self._drain()
            tag = self._to_load(load_dir, tag, "optimizer" in loaded)
        undefined = "the state of every engine is undefined now: load another checkpoint, or leave"
        before, self._torn = self._torn, self._torn | loaded
        broadcast = host.module._synchronize_tied_weights

        def broadcast_once_all_are_here() -> None:
            agreement.meet("load_checkpoint", undefined)
            broadcast()

        with (
            agreement.all_or_none("load_checkpoint", undefined),
            self._as_deepspeeds(saving=False),
            replaced(host.module, "_synchronize_tied_weights", broadcast_once_all_are_here),
            torch.no_grad(),  # gloo writes tied weights of a GPU in place, which autograd would forbid
        ):
            path, client_state = load(
                load_dir,
                tag,
                load_module_strict,
                load_optimizer_states,
                load_lr_scheduler_states,
                load_module_only,
                *args,
                **kwargs,
            )
            if path is not None and host.has_moe_layers:
                broadcast_once_all_are_here()  # DeepSpeed loads a stage with experts as a whole, without that
            if path is not None:
                self._take_over(client_state, "optimizer" in loaded)
        self._torn = before if path is None else before - loaded
        return path, client_state

    def _take_over(self, client_state: dict[str, Any], optimizer: bool) -> None:
        """Take over the part of a checkpoint that DeepSpeed does not have."""
        mine = {
            "loss": None,
            "tied": {},
            "update": (),
            "ahead": False,
            **(client_state.pop(_CHECKPOINT_KEY, None) or {}),
        }
        if optimizer:
            ahead = mine["ahead"] and not self._host.load_universal_checkpoint()  # which leaves out what is not Adam's
            self._updates.rules.loaded(self._host.optimizer, ahead)
        for key, module in left_out_of_checkpoints(self._host.module).items():
            if key in mine["tied"]:
                module.load_state_dict(mine["tied"][key])
        if "global_steps" not in client_state:  # there is what DeepSpeed has not loaded: the weights alone
            self._run.resume(self._host.global_steps)
            self._reporter.restart(mine["loss"])
            self._updates.restart(*mine["update"])

    def refuse_torn(self) -> None:
        """Raise StageError on every rank after a load that failed halfway."""
        if self._torn:
            parts = ", ".join(sorted(self._torn))
            raise KnownToAllError(
                StageError(f"a load that failed has left {parts} undefined: load another checkpoint, or leave")
            )

    @contextmanager
    def _naming_the_latest(self, asked: bool) -> Iterator[None]:
        """Inside this block ``latest`` names no checkpoint whose files are not, or no longer, all there."""
        written: list[str] = []
        engine = self._host.checkpoint_engine
        save, create = engine.save, engine.create
        info: Any = None
        outdated = False

        def noting(state_dict: Any, path: str, *args: Any, **kwargs: Any) -> Any:
            result = save(state_dict, path, *args, **kwargs)
            written.append(path)
            return result

        def once_agreed(it: Any) -> Any:
            nonlocal info, outdated
            info = it
            self._agreement.agree_on("save_checkpoint", "tag", it.tag)
            if self._stage.rank == 0 and latest(it.save_dir) == it.tag:
                (Path(it.save_dir) / LATEST).unlink()  # until it has been written anew
                outdated = True
            self._agreement.meet("save_checkpoint")
            return create(it)

        with replaced(engine, "save", noting), replaced(engine, "create", once_agreed):
            yield
        flush(path for path in written if Path(path).is_file())
        self._agreement.meet("save_checkpoint")
        if self._stage.rank == 0 and info is not None and (asked or outdated):
            write_latest(info.save_dir, info.tag)

    def _to_load(self, directory: str, tag: Any, optimizer: bool) -> str | None:
        """Return the tag that all ranks load, and raise if this one could not read its files."""
        if self._host.load_universal_checkpoint():
            return None if tag is None else str(tag)
        tag = tag_to_load(directory, None if tag is None else str(tag))
        self._agreement.agree_on("load_checkpoint", "tag", tag)
        if tag is not None and type(self._host.checkpoint_engine) is TorchCheckpointEngine:
            wrong = [found for path in self._files(Path(directory), tag, optimizer) if (found := damage(path))]
            if wrong:
                raise ValueError(f"cannot load {Path(directory) / tag}: {', '.join(wrong[:4])}; nothing was changed")
        return tag

    def _files(self, directory: Path, tag: str, optimizer: bool) -> Iterator[Path]:
        """Yield the files that this rank reads, named as DeepSpeed does it."""
        yield Path(self._host._get_ckpt_name(str(directory), tag))
        if optimizer and self._host.zero_optimization() and hasattr(self._host.optimizer, "dp_process_group"):
            path = Path(self._host._get_zero_ckpt_name(str(directory), tag))
            old = path.with_name(path.name.replace("_optim_states.pt", "optim_states.pt"))
            yield old if old.is_file() else path
        if self._host.has_moe_layers:  # then DeepSpeed saves the stage as a whole, and experts one by one
            yield from map(Path, expert_files(self._host, str(directory), tag, optimizer))
            return
        for index, layer in enumerate(self._host.module.forward_funcs):
            if hasattr(layer, "load_state_dict"):
                folder = str(directory / tag)
                found = self._host.module.ckpt_layer_path_list(folder, index)
                yield from map(Path, found or [self._host.module.ckpt_layer_path(folder, index)])

    @contextmanager
    def _as_deepspeeds(self, saving: bool) -> Iterator[None]:
        """Inside this block the optimizer has what that of DeepSpeed's own engine has: the tied weights it holds too.

        Optimizers that DeepSpeed wraps have their weights in flat buffers, where nothing can be put in between.
        """
        if self._host.optimizer is None or isinstance(self._host.optimizer, DeepSpeedOptimizer):
            if saving:
                self._agreement.meet("save_checkpoint")  # as the stages do whose optimizer is not
            yield
            return
        with self._tied_weights.returned_to(self._host.optimizer):
            if saving:
                self._tied_weights.share_states(self._host.optimizer, lambda: self._agreement.meet("save_checkpoint"))
            yield
