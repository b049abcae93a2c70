"""What a stage does about the staleness of its gradients: the rules of ``ds_ddg.staleness`` in its own steps.

A stage knows how old its gradients are without asking another, so no rule makes it wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.utils import logger

from ds_ddg.host import Host
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.stage import RunState, Stage
from ds_ddg.staleness.apply import DELAYED, PREVIOUS_STEP, StaleSteps, forget_previous_steps
from ds_ddg.staleness.choose import choose
from ds_ddg.staleness.rules import FRESH, Rules, Staleness
from ds_ddg.weights.optimizer_wrappers import innermost, states_of

__all__ = ["StageRules"]


class StageRules:
    """The rules of one stage.

    Args:
        stage: this stage.
        run: the place of the stage in its run.
        host: DeepSpeed's engine.
    """

    def __init__(self, stage: Stage, run: RunState, host: Host) -> None:
        self._stage, self._run, self._host = stage, run, host
        self._rules = Rules()
        self._steps: StaleSteps | None = None
        self._taken = 0
        """The number of steps by the rules when it was last checked."""

    @property
    def age(self) -> Staleness:
        """How old the gradients of this stage are: not at all on DeepSpeed's schedule, and on the last stage."""
        run = self._run
        return Staleness.of(run.plan, self._stage.stage_id, run.call) if run.delayed else FRESH

    def choose(self, optimizer: Any) -> None:
        """Choose what suits `optimizer`, which DeepSpeed has not wrapped yet; the first rank says what that is.

        Raises:
            ValueError: `optimizer` cannot follow the rules, or a number is needed; on every rank alike.
        """
        stage, host = self._stage, self._host
        clipping = host.gradient_clipping() if stage.config.clip == "stage" else 0.0
        plan = DDGPlan(stage.num_stages, host.gradient_accumulation_steps(), self._run.slack)
        self._rules, lines = choose(stage.config.staleness_settings, optimizer, plan, clipping)
        if stage.rank == 0:
            for line in lines:
                logger.warning(line)

    def attach(self, optimizer: Any) -> None:
        """Have the optimizer that updates the weights, wrapped in `optimizer` or not, step by the rules.

        Only now: DeepSpeed may have stepped it to make its state, or, as it does with Adagrad, have put another in
        its place.

        Raises:
            TypeError: it cannot follow them; on every rank alike.
        """
        if (inner := innermost(optimizer)) is None or DELAYED in vars(inner):  # that one has rules of its own
            return
        StaleSteps.remove_from(inner)  # those of an engine before
        if self._rules.steps and self._stage.num_stages > 1:
            self._steps, self._taken = StaleSteps(inner, self._rules, lambda all_of_it: {self.age: all_of_it}), 0
        else:
            self._steps = None

    def check(self) -> None:
        """After a step: raise RuntimeError if the optimizer has stepped past the rules."""
        if self._steps is None:
            return
        before, self._taken = self._taken, self._steps.taken
        if before == self._taken:
            name = type(innermost(self._host.optimizer)).__name__
            raise RuntimeError(
                f"{name} has stepped without the hooks of torch.optim.Optimizer, and so without the rules of "
                f'"staleness": its step has been replaced; leave {name}.step as it is, or set "staleness": "off"'
            )

    def extrapolating(self, optimizer: Any) -> bool:
        """Return whether the state of `optimizer` has the u_{t-1} that the next step needs."""
        return self._rules.extrapolation > 0 and any(PREVIOUS_STEP in state for state in states_of(optimizer))

    def loaded(self, optimizer: Any, extrapolating: bool) -> None:
        """Have `optimizer`, whose state has been loaded, begin its extrapolation anew unless it can go on.

        Args:
            optimizer: DeepSpeed's wrapper or the optimizer itself.
            extrapolating: whether the u_{t-1} in the checkpoint is that of its last step.
        """
        # With elastic_checkpoint ZeRO leaves in its state what the checkpoint does not have; DeepSpeed's own engine
        # carries along what it does not know.
        if not (extrapolating and self._rules.extrapolation > 0):
            forget_previous_steps(states_of(optimizer))

    @property
    def max_norm(self) -> float:
        """The largest norm of the gradient of this stage in the present call; 0 for any."""
        return self._rules.max_norm(self._host.gradient_clipping(), self.age)

    @property
    def clips_alone(self) -> bool:
        """Whether the rules clip, and DeepSpeed would not."""
        return self._rules.clip > 0 and self._host.gradient_clipping() <= 0 and self._run.delayed

    @contextmanager
    def clipping(self, wrapper: Any) -> Iterator[None]:
        """Inside this block an optimizer that DeepSpeed wraps clips by the norm of the rules, if it is smaller."""
        usual = wrapper.clip_grad
        wrapper.clip_grad = self._rules.max_norm(usual, self.age)
        try:
            yield
        finally:
            wrapper.clip_grad = usual
