"""Delay-aware training: how the step of a stage changes with the age of its gradients.

Each rule is a function of the **staleness** s = d_k / M, the age of a stage's gradients in updates. At s = 0 none
changes anything. All that they change is what the optimizer finds in one step, so none makes a stage wait for another.

    learning_rate   discount of the learning rate, (1+s)^-p, for good or for the first calls (`anneal`), and for all of
                    s or for what is above a `tolerance`
    momentum        longer memory of the momentum, or of Adam's first moment
    extrapolation   the step (1+cs) u_t - cs u_{t-1}, where u_t is what the optimizer would have done
    clip            the norm of the stage's own gradient, on delayed stages alone
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from ds_ddg.schedules.ddg import DDGPlan

__all__ = ["FRESH", "Rules", "Settings", "Staleness"]

_Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_ASYNC_PP = 0.99
"""The momentum that AsyncPP's stages approach with their depth."""


class Staleness(NamedTuple):
    """How old the gradients of a stage are."""

    updates: float = 0.0
    """s = d_k / M: their age in updates of the stage."""
    share: float = 0.0
    """(K-1-k) / K: the stages behind this one, of all."""
    call: int = 0
    """The number of the present call."""

    @classmethod
    def of(cls, plan: DDGPlan, stage: int, call: int = 0) -> Staleness:
        """Return the staleness of `stage` in `plan`."""
        behind = plan.num_stages - 1 - stage
        return cls(plan.delay(stage) / plan.micro_batches, behind / plan.num_stages, call)


FRESH = Staleness()
"""Gradients of the present weights."""


class Rules(BaseModel):
    """What is done about the staleness of a stage; by default nothing."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    learning_rate: _Number = 0.0
    """p of the discount: the learning rate times (1+s)^-p. p = 1 is PipeMare's rule T1 without its end (Yang et al.,
    MLSys 2021), and what delayed SGD needs to be stable: the largest stable rate falls like 1/s."""

    tolerance: _Number = 0.0
    """s0, the staleness up to which the learning rate stays as it is: the discount is (1 + max(0, s - s0))^-p. At 1
    the factor is s^-p for s above 1, as in PipeMare, and 1 for gradients up to one update old."""

    anneal: int = Field(default=0, ge=0)
    """T, the number of calls in which the discount fades, as in PipeMare's T1: in call t its exponent is
    p (1 - min(t/T, 1)). 0: it stays."""

    momentum: Literal["keep", "stretch", "asyncpp"] = "keep"
    """What becomes of the momentum mu, or of Adam's beta1. "stretch": 1 - (1-mu)/(1+s), its memory 1/(1-mu) times
    (1+s), of which `extrapolation` needs the more the older the gradients are. "asyncpp": mu + (.99-mu)(K-1-k)/K
    (Ajanthan et al., ICML 2025). SGD's momentum is a sum, Adam's a mean: so that a gradient moves the weights as far
    in all as without the rule, "stretch" divides the rate of SGD by 1+s."""

    extrapolation: _Number = 0.0
    """c of the step (1+cs) u_t - cs u_{t-1}, with u_t what the optimizer has taken off the weights, weight decay
    included, and u_{-1} = 0. At c = s = 1 the error feedback for one update of delay (arXiv 2606.30634); at c = 1, for
    any s, the forward passes see what linear prediction by s steps would show them, without a second copy of the
    weights. With a stretched first moment it is quasi-hyperbolic momentum (Ma and Yarats, ICLR 2019): in the step that
    it comes in a gradient weighs (1+cs)(1-beta)/(1+s), about c times what it would without delay, and then little for
    a long time."""

    clip: _Number = 0.0
    """The largest norm of the gradient of a delayed stage, 0 for none. An absolute number, so it goes by the scale of
    the user's loss."""

    @property
    def steps(self) -> bool:
        """Whether any of them changes a step, and not only a gradient."""
        return self.learning_rate > 0 or self.momentum != "keep" or self.extrapolation > 0

    def rate_factor(self, age: Staleness, momentum_sums: bool = False) -> float:
        """Return the factor of the learning rate; `momentum_sums`: of an optimizer whose momentum is a sum."""
        left = 1 - min(age.call / self.anneal, 1.0) if self.anneal else 1.0
        factor = float((1 + max(0.0, age.updates - self.tolerance)) ** (-self.learning_rate * left))
        return factor / (1 + age.updates) if momentum_sums and self.momentum == "stretch" else factor

    def momentum_at(self, momentum: float, age: Staleness) -> float:
        """Return what takes the place of `momentum`."""
        if age.updates == 0:
            return momentum
        if self.momentum == "stretch":
            return 1 - (1 - momentum) / (1 + age.updates)
        if self.momentum == "asyncpp":
            return momentum + (_ASYNC_PP - momentum) * age.share
        return momentum

    def lead(self, age: Staleness) -> float:
        """Return the c s of the step (1+cs) u_t - cs u_{t-1}."""
        return self.extrapolation * age.updates

    def max_norm(self, gradient_clipping: float, age: Staleness) -> float:
        """Return the largest norm of a gradient, 0 for any, where all stages are clipped to `gradient_clipping`."""
        allowed = [norm for norm in (gradient_clipping, self.clip if age.updates > 0 else 0.0) if norm > 0]
        return min(allowed, default=0.0)

    def __str__(self) -> str:
        given = {name: value for name, value in self if value != type(self).model_fields[name].default}
        return ", ".join(f"{name} {value}" for name, value in given.items()) or "nothing"


class Settings(Rules):
    """The ``"staleness"`` block: what to begin with, and what to do otherwise."""

    rules: Literal["off", "auto"] = "off"
    """"auto": the rules that suit the optimizer (``choose.py``). "off": none but those that are named."""

    @property
    def named(self) -> dict[str, Any]:
        """The rules that the block names."""
        return {name: getattr(self, name) for name in self.model_fields_set - {"rules"}}
