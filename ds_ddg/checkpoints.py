"""Checkpoints in DeepSpeed's layout, readable by its own engine, with what a delayed run needs to go on unbroken.

That is under a client key of its own, in the file of each stage: the newest loss and norm known, and what DeepSpeed
leaves out of tied modules. Optimizer states are DeepSpeed's own too, but for tied weights in wrapped optimizers.

If one rank fails in a save or a load, so do all (``agreement.py``); ``latest`` only ever names a checkpoint whose
files all ranks have written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from ds_ddg.agreement import Agreement, replaced
from ds_ddg.experts import expert_files
from ds_ddg.folder import LATEST, damage, flush, latest, tag_to_load, write_latest
from ds_ddg.report import Reporter
from ds_ddg.tied import left_out_of_checkpoints
from ds_ddg.together import KnownToAllError, together
from ds_ddg.wire import StageError

__all__ = ["Checkpoints"]

_CHECKPOINT_KEY = "ds_ddg"


class Checkpoints(Agreement, Reporter):
    """Mixed into a ``PipelineEngine``: saving and loading."""

    _torn: frozenset[str] = frozenset()
    """What of this engine's state a load has left half changed."""

    @together
    def save_checkpoint(
        self,
        save_dir: str,
        tag: Any = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """DeepSpeed's, after a drain: what is in flight belongs to no checkpoint.

        Raises:
            Exception: what went wrong on this rank; training can go on, on all of them.
            StageError: the same, or worse, on another rank.
        """
        self._refuse_torn()
        self._begin_together("save_checkpoint")
        with self._all_or_none("save_checkpoint"):
            self.drain()
            tied = {key: module.state_dict() for key, module in left_out_of_checkpoints(self.module).items()}
            update = self._pipeline_norm, tuple(self._last_update)
            mine = {"loss": self._losses.known(), "tied": tied, "update": update}
            client_state = {**(client_state or {}), _CHECKPOINT_KEY: mine}
            with self._naming_the_latest(save_latest), self._as_deepspeeds(saving=True):
                result = super().save_checkpoint(save_dir, tag, client_state, False, *args, **kwargs)
                if self.checkpoint_engine.is_decoupled():
                    self._commit_decoupled_checkpoint()  # DeepSpeed does it in `step`, which no pipeline calls
        return result

    @together
    def load_checkpoint(
        self,
        load_dir: str,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
        **kwargs: Any,
    ) -> Any:
        """DeepSpeed's, after a drain: gradients in flight belong to the weights that are given up.

        Raises:
            OSError, ValueError: files of this rank are missing or damaged; nothing has been changed anywhere.
            StageError: so are another's; or a load has failed halfway, and all that can be done is another.
        """
        parts = {"optimizer": load_optimizer_states, "scheduler": load_lr_scheduler_states}
        loaded = frozenset(["module", *(part for part, on in parts.items() if on and not load_module_only)])
        self._begin_together("load_checkpoint")
        with self._all_or_none("load_checkpoint"):
            self.drain()
            tag = self._to_load(load_dir, tag, "optimizer" in loaded)
        undefined = "the state of every engine is undefined now: load another checkpoint, or leave"
        before, self._torn = self._torn, self._torn | loaded
        broadcast = self.module._synchronize_tied_weights

        def broadcast_once_all_are_here() -> None:
            self._meet("load_checkpoint", undefined)
            broadcast()

        with (
            self._all_or_none("load_checkpoint", undefined),
            self._as_deepspeeds(saving=False),
            replaced(self.module, "_synchronize_tied_weights", broadcast_once_all_are_here),
            torch.no_grad(),  # gloo writes tied weights of a GPU in place, which autograd would forbid
        ):
            path, client_state = super().load_checkpoint(
                load_dir,
                tag,
                load_module_strict,
                load_optimizer_states,
                load_lr_scheduler_states,
                load_module_only,
                custom_load_fn,
                **kwargs,
            )
            if path is not None and self.has_moe_layers:
                broadcast_once_all_are_here()  # DeepSpeed loads a stage with experts as a whole, without that
            if path is not None:
                self._take_over(client_state)
        self._torn = before if path is None else before - loaded
        return path, client_state

    def _take_over(self, client_state: dict[str, Any]) -> None:
        """What a checkpoint has beside DeepSpeed's own."""
        mine = {"loss": None, "tied": {}, "update": (), **(client_state.pop(_CHECKPOINT_KEY, None) or {})}
        for key, module in left_out_of_checkpoints(self.module).items():
            if key in mine["tied"]:
                module.load_state_dict(mine["tied"][key])
        if "global_steps" not in client_state:  # there is what DeepSpeed has not loaded: the weights alone
            self._restart_losses(mine["loss"])
            self._forget_updates(*mine["update"])

    def _refuse_torn(self) -> None:
        if self._torn:
            parts = ", ".join(sorted(self._torn))
            raise KnownToAllError(
                StageError(f"a load that failed has left {parts} undefined: load another checkpoint, or leave")
            )

    @contextmanager
    def _naming_the_latest(self, asked: bool) -> Iterator[None]:
        """Around DeepSpeed's save: ``latest`` names no checkpoint whose files are not, or no longer, all there."""
        written: list[str] = []
        save, create = self.checkpoint_engine.save, self.checkpoint_engine.create
        info: Any = None
        outdated = False

        def noting(state_dict: Any, path: str, *args: Any, **kwargs: Any) -> Any:
            result = save(state_dict, path, *args, **kwargs)
            written.append(path)
            return result

        def once_agreed(it: Any) -> Any:
            nonlocal info, outdated
            info = it
            self._agree_on("save_checkpoint", "tag", it.tag)
            if self.global_rank == 0 and latest(it.save_dir) == it.tag:
                (Path(it.save_dir) / LATEST).unlink()  # until it has been written anew
                outdated = True
            self._meet("save_checkpoint")
            return create(it)

        with replaced(self.checkpoint_engine, "save", noting), replaced(self.checkpoint_engine, "create", once_agreed):
            yield
        flush(path for path in written if Path(path).is_file())
        self._meet("save_checkpoint")
        if self.global_rank == 0 and info is not None and (asked or outdated):
            write_latest(info.save_dir, info.tag)

    def _to_load(self, directory: str, tag: Any, optimizer: bool) -> str | None:
        """The tag that all ranks load; raises if this one could not read its files."""
        if self.load_universal_checkpoint():
            return None if tag is None else str(tag)
        tag = tag_to_load(directory, None if tag is None else str(tag))
        self._agree_on("load_checkpoint", "tag", tag)
        if tag is not None and type(self.checkpoint_engine) is TorchCheckpointEngine:
            wrong = [found for path in self._files(Path(directory), tag, optimizer) if (found := damage(path))]
            if wrong:
                raise ValueError(f"cannot load {Path(directory) / tag}: {', '.join(wrong[:4])}; nothing was changed")
        return tag

    def _files(self, directory: Path, tag: str, optimizer: bool) -> Iterator[Path]:
        """Those that this rank reads, named as DeepSpeed does it."""
        yield Path(self._get_ckpt_name(str(directory), tag))
        if optimizer and self.zero_optimization() and hasattr(self.optimizer, "dp_process_group"):
            path = Path(self._get_zero_ckpt_name(str(directory), tag))
            old = path.with_name(path.name.replace("_optim_states.pt", "optim_states.pt"))
            yield old if old.is_file() else path
        if self.has_moe_layers:  # then DeepSpeed saves the stage as a whole, and experts one by one
            yield from map(Path, expert_files(self, str(directory), tag, optimizer))
            return
        for index, layer in enumerate(self.module.forward_funcs):
            if hasattr(layer, "load_state_dict"):
                folder = str(directory / tag)
                found = self.module.ckpt_layer_path_list(folder, index)
                yield from map(Path, found or [self.module.ckpt_layer_path(folder, index)])

    @contextmanager
    def _as_deepspeeds(self, saving: bool) -> Iterator[None]:
        """Inside this block the optimizer has what that of DeepSpeed's own engine has: the tied weights it holds too.

        Optimizers that DeepSpeed wraps have their weights in flat buffers, where nothing can be put in between.
        """
        if self.optimizer is None or isinstance(self.optimizer, DeepSpeedOptimizer):
            if saving:
                self._meet("save_checkpoint")  # as the stages do whose optimizer is not
            yield
            return
        with self._ties.returned_to(self.optimizer):
            if saving:
                self._ties.share_states(self.optimizer, lambda: self._meet("save_checkpoint"))
            yield
