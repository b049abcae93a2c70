"""Which rules suit an optimizer: what ``"staleness": "auto"`` stands for, and why.

The evidence is in docs/quality.md: small problems, few seeds. It ends with the optimizers that `kind_of` knows; for
any other nothing is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.staleness.rotation import BasisRotation
from ds_ddg.staleness.rules import Rules, Settings, Staleness

__all__ = ["Choice", "choose", "explain", "kind_of", "momentum_sums", "remedies"]

_RULES = {
    "SGD": Rules(learning_rate=1.75, tolerance=1.0, momentum="stretch", extrapolation=3.0),
    "Adam": Rules(learning_rate=0.5, tolerance=1.0, momentum="stretch", extrapolation=3.0),
    "BasisRotation": Rules(learning_rate=0.5, tolerance=1.0, extrapolation=1.0),
    "Muon": Rules(learning_rate=0.75, tolerance=1.0, extrapolation=1.0),
}
_CLIPPED_TO = 1.0
"""The norm to which the study clipped the gradients of SGD's delayed stages."""
_UNSURE = 4.0
"""The staleness above which the rules for Adam are no sure gain."""
_OF_DEEPSPEED = {"FusedAdam": "Adam", "DeepSpeedCPUAdam": "Adam", "MuonWithAuxAdam": "Muon"}


class Choice(NamedTuple):
    """What is done, and the lines that say so."""

    rules: Rules
    lines: tuple[str, ...] = ()


def kind_of(optimizer: Any) -> str | None:
    """Return the kind of `optimizer`, a key of the rules that are known; None: another."""
    for kind in type(optimizer).__mro__:
        if kind.__module__.startswith("deepspeed.") and kind.__name__ in _OF_DEEPSPEED:
            return _OF_DEEPSPEED[kind.__name__]
    if isinstance(optimizer, BasisRotation):
        return "BasisRotation"
    if isinstance(optimizer, torch.optim.SGD):
        return "SGD"
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return "Adam"
    muon = getattr(torch.optim, "Muon", None)  # since torch 2.9
    return "Muon" if muon is not None and isinstance(optimizer, muon) else None


def momentum_sums(optimizer: Any, group: Mapping[str, Any]) -> bool:
    """Return whether the momentum of a `group` of `optimizer` is a sum, as SGD's, and not a mean or a direction."""
    return "betas" not in group and "momentum" in group and kind_of(optimizer) != "Muon"


def choose(settings: Settings, optimizer: Any, plan: DDGPlan, gradient_clipping: float = 0.0) -> Choice:
    """Return the rules for `optimizer`.

    Args:
        settings: the ``"staleness"`` block, or what it is short for.
        optimizer: the innermost one.
        plan: says whether anything is stale.
        gradient_clipping: the norm of its own that each stage's gradients are clipped to in any case; 0 for none.

    Raises:
        ValueError: a rule needs a number that only the user can know, or `optimizer` cannot follow it.
    """
    stale = plan.delay(0) > 0
    kind = kind_of(optimizer)
    auto = settings.rules == "auto"
    base = _RULES.get(kind or "", Rules()) if auto else Rules()
    if auto and kind == "SGD" and stale and gradient_clipping == 0 and "clip" not in settings.named:
        raise ValueError(
            '"staleness": "auto" with SGD clips the gradients of delayed stages, and to which norm goes by the scale '
            'of your loss: set "gradient_clipping" (by the norm of the stage), or "staleness": '
            f'{{"rules": "auto", "clip": {_CLIPPED_TO}}}; the study behind the rule '
            f'clipped to {_CLIPPED_TO:g}, and "clip": 0 goes without'
        )
    rules = base.model_copy(update=settings.named)
    if stale:
        _refuse(rules, optimizer)
    if rules == Rules() and not auto:
        return Choice(rules)
    return Choice(rules, tuple(_lines(settings, rules, optimizer, plan)))


def explain(rules: Rules, plan: DDGPlan, optimizer: Any = None) -> str:
    """Say what `rules` come to on stage 0, the one with the oldest gradients."""
    age = Staleness.of(plan, 0)
    parts = []
    sums = any(momentum_sums(optimizer, group) for group in getattr(optimizer, "param_groups", ())[:1])
    if (factor := rules.rate_factor(age, sums)) != 1:
        fades = f", fading within {rules.anneal} call(s)" if rules.anneal else ""
        parts.append(f"learning rate times {factor:.3g}{fades}")
    if rules.momentum != "keep":
        momentum = _momentum(optimizer)
        known = f" {momentum:g} -> {rules.momentum_at(momentum, age):.4g}" if momentum is not None else ""
        parts.append(f"momentum{known} ({rules.momentum})")
    if rules.extrapolation:
        lead = rules.lead(age)
        parts.append(f"step {1 + lead:g} u_t - {lead:g} u_(t-1)")
    if rules.clip:
        parts.append(f"gradient clipped to {rules.clip:g} by the norm of the stage")
    what = "; ".join(parts) or "nothing is changed"
    return f"stage 0, whose gradients are {age.updates:g} update(s) old: {what}"


def remedies(settings: Settings, plan: DDGPlan) -> list[str]:
    """Return what else could be set in `plan`, under `settings`, for a training that suffers from stale gradients."""
    found = []
    if plan.micro_batches < (enough := plan.delay(0)):
        found.append(
            f'"gradient_accumulation_steps": {enough} or more, with which no gradient is older than one update'
        )
    if settings == Settings():
        found.append('"ddg": {"staleness": "auto"}, rules by stage for SGD, Adam and Muon')
    return [*found, "a smaller learning rate, or a longer warm-up of it"]


def _lines(settings: Settings, rules: Rules, optimizer: Any, plan: DDGPlan) -> list[str]:
    if plan.delay(0) == 0:
        return ["no gradient is stale, so nothing is done about staleness"]
    name, kind = type(optimizer).__name__, kind_of(optimizer)
    lines = []
    if settings.rules == "auto" and kind is None:
        lines.append(f"staleness: no rule has been tried with {name}, so nothing is done but what the config names")
    lines.append(f"staleness, {name}: {explain(rules, plan, optimizer)}; the last stage is as ever")
    enough = plan.delay(0)
    if plan.micro_batches < enough:
        lines.append(
            f"fewer stale updates are better than any rule: with {enough} micro-batches a call or more, not "
            f"{plan.micro_batches}, no gradient is older than one update, and the pipeline is as fast"
        )
    if settings.rules == "auto" and kind == "Adam" and Staleness.of(plan, 0).updates > _UNSURE:
        lines.append(
            f"with gradients more than {_UNSURE:g} updates old the rules for {name} helped in some trials and hurt in "
            'another (docs/quality.md): compare with "off", or have fewer stale updates'
        )
    if kind in ("SGD", "Adam"):
        lines.append(
            f"Muon ended ahead of {name} in nearly all trials with delay, small ones, and at worst half a point "
            "behind (docs/quality.md)"
        )
    return lines


def _refuse(rules: Rules, optimizer: Any) -> None:
    """Raise ValueError for an optimizer that cannot follow `rules`."""
    if rules.momentum == "keep":
        return
    name = type(optimizer).__name__
    if any(kind.__name__ == "MuonWithAuxAdam" for kind in type(optimizer).__mro__):
        raise ValueError(
            f'"staleness": {{"momentum": "{rules.momentum}"}} with {name}: DeepSpeed applies its momentum before the '
            'step in bf16 and ZeRO-1, where no rule reaches it; use "momentum": "keep"'
        )
    if _momentum(optimizer) is None:
        raise ValueError(
            f'"staleness": {{"momentum": "{rules.momentum}"}} with {name}: it has neither a momentum nor betas; '
            'use "momentum": "keep", or another optimizer'
        )
    momenta = [group.get("momentum") for group in optimizer.param_groups]
    if 0 in momenta and not isinstance(optimizer, torch.optim.SGD):
        raise ValueError(
            f'"staleness": {{"momentum": "{rules.momentum}"}} with {name} and a momentum of 0: its first step decides '
            'whether it has one at all, and may have no delay; give it a momentum, or use "momentum": "keep"'
        )


def _momentum(optimizer: Any) -> float | None:
    """Return the momentum, or beta1, of the first group; None where a group has neither."""
    found = []
    for group in getattr(optimizer, "param_groups", ()):
        value = group["betas"][0] if "betas" in group else group.get("momentum")
        if value is None:
            return None
        found.append(float(value))
    return found[0] if found else None
