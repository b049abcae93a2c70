"""The ``"ddg"`` block of a DeepSpeed config.

DeepSpeed ignores top-level keys that it does not know, and typos with them. Here an unknown key, a wrong type or a
value out of range is an error that names the key, the value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ds_ddg.staleness.rules import Settings

__all__ = ["DDGConfig"]


class DDGConfig(BaseModel):
    """Settings of the delayed schedule, frozen once read."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    enabled: bool = True
    """False: DeepSpeed's own 1F1B, for A/B runs of one script."""

    weights: Literal["stash", "current"] = "stash"
    """Weights a delayed backward sees: those of its own forward (the paper's equation) or the newest."""

    activations: Literal["keep", "recompute"] = "keep"
    """Keep the graph until its gradient arrives, or only the stage's input and run the forward again."""

    slack: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    """Extra micro-batches in flight per hop: hides the latency of the links, costs staleness. "auto": measured in the
    first calls, then the smallest that hides it."""

    clip: Literal["stage", "global"] = "stage"
    """``gradient_clipping`` by the stage's own norm, or by that of the whole pipeline in the newest call for which
    every stage can know it without a wait: call t - L - 2 in call t, with L = ceil(d_0 / M)."""

    loss: Literal["delayed", "exact"] = "delayed"
    """What train_batch returns: the newest loss known without a wait, or this call's own (costs the overlap)."""

    sync_steps: int = Field(default=0, ge=0)
    """Number of calls at the start that run DeepSpeed's 1F1B, before DDG begins."""

    trace: str | None = Field(default=None, min_length=1)
    """Folder to record in what each rank does and when, for ``ds-ddg trace``."""

    staleness: Literal["off", "auto"] | Settings = "off"
    """What is done about stale gradients: nothing (the paper's algorithm), what suits the optimizer, or what a block
    of rules says (docs/staleness.md)."""

    @property
    def staleness_settings(self) -> Settings:
        """The block that `staleness` stands for."""
        return self.staleness if isinstance(self.staleness, Settings) else Settings(rules=self.staleness)

    @property
    def timed(self) -> bool:
        """Whether the times of what computes are needed, and not only those of the host that launches it."""
        return self.slack == "auto" or self.trace is not None

    @classmethod
    def parse(cls, block: Mapping[str, Any] | None) -> DDGConfig:
        """Read the block of a DeepSpeed config (None: not there, all defaults).

        Raises:
            ValueError: names every offending key, the value found and what is allowed.
        """
        try:
            return cls.model_validate({} if block is None else block)
        except ValidationError as error:
            by_key = groupby(error.errors(), key=lambda problem: problem["loc"][:1])
            raise ValueError("\n".join(_explain(list(problems)) for _, problems in by_key)) from None


def _explain(problems: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with the value of one key, which may be of several types."""
    problem = problems[0]
    if not problem["loc"]:
        return f'"ddg" must be a block of settings such as {{"enabled": true}}, got {problem["input"]!r}'
    key = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        return _unknown('"ddg"', key, problem["input"], DDGConfig)
    if inside := [problem for problem in problems if len(problem["loc"]) > 2]:  # it is a block of its own
        return "\n".join(
            _unknown(f'"ddg": "{key}"', problem["loc"][-1], problem["input"], Settings)
            if problem["type"] == "extra_forbidden"
            else _invalid(f'{{"{key}": {{"{problem["loc"][-1]}": {problem["input"]!r}}}}}', [problem])
            for problem in inside
        )
    return _invalid(f'{{"{key}": {problem["input"]!r}}}', problems)


def _unknown(where: str, key: Any, value: Any, model: type[BaseModel]) -> str:
    return f"{where}: unknown key {key!r} (value {value!r}); known keys: {', '.join(model.model_fields)}"


def _invalid(what: str, problems: Sequence[Mapping[str, Any]]) -> str:
    reasons = " or ".join(
        "a block of rules" if problem["type"] == "model_type" else str(problem["msg"]) for problem in problems
    )
    return f'"ddg": {what} is not valid: {reasons}'
