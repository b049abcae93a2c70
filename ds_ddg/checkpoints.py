"""Checkpoints in DeepSpeed's layout, readable by its own engine, with what a delayed run needs to go on unbroken.

That is under a client key of its own, in the file of each stage: the newest loss and norm known, and what DeepSpeed
leaves out of tied modules. Optimizer states are DeepSpeed's own too, but for tied weights in wrapped optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer

from ds_ddg.report import Reporter
from ds_ddg.tied import left_out_of_checkpoints

__all__ = ["Checkpoints"]

_CHECKPOINT_KEY = "ds_ddg"


class Checkpoints(Reporter):
    """Mixed into a ``PipelineEngine``: saving and loading."""

    def save_checkpoint(
        self, save_dir: str, tag: Any = None, client_state: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """DeepSpeed's, after a drain: what is in flight belongs to no checkpoint."""
        self.drain()
        tied = {key: module.state_dict() for key, module in left_out_of_checkpoints(self.module).items()}
        update = self._pipeline_norm, tuple(self._last_update)
        mine = {"loss": self._losses.known(), "tied": tied, "update": update}
        client_state = {**(client_state or {}), _CHECKPOINT_KEY: mine}
        with self._as_deepspeeds(saving=True):
            return super().save_checkpoint(save_dir, tag, client_state, *args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's, after a drain: gradients in flight belong to the weights that are given up."""
        self.drain()
        # DeepSpeed broadcasts tied weights; gloo writes those of a GPU in place, which autograd would forbid.
        with self._as_deepspeeds(saving=False), torch.no_grad():
            path, client_state = super().load_checkpoint(*args, **kwargs)
        if path is not None:
            mine = {"loss": None, "tied": {}, "update": (), **(client_state.pop(_CHECKPOINT_KEY, None) or {})}
            for key, module in left_out_of_checkpoints(self.module).items():
                if key in mine["tied"]:
                    module.load_state_dict(mine["tied"][key])
            if "global_steps" not in client_state:  # there is what DeepSpeed has not loaded: the weights alone
                self._restart_losses(mine["loss"])
                self._forget_updates(*mine["update"])
        return path, client_state

    @contextmanager
    def _as_deepspeeds(self, saving: bool) -> Iterator[None]:
        """Inside this block the optimizer has what that of DeepSpeed's own engine has: the tied weights it holds too.

        Optimizers that DeepSpeed wraps have their weights in flat buffers, where nothing can be put in between.
        """
        if self.optimizer is None or isinstance(self.optimizer, DeepSpeedOptimizer):
            yield
            return
        with self._ties.returned_to(self.optimizer):
            if saving:
                self._ties.share_states(self.optimizer)
            yield
