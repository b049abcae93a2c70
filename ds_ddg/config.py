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

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    enabled: bool = True
    """Whether the delayed schedule runs. If not, DeepSpeed's own 1F1B runs, for A/B runs of one script."""

    weights: Literal["stash", "current"] = "stash"
    """The weights that a delayed backward sees. "stash": those of its own forward, the paper's equation. "current":
    the newest ones, as in the authors' code of 2018, without copies of weights."""

    activations: Literal["keep", "recompute"] = "keep"
    """What waits for a gradient. "keep": the graph of the forward. "recompute": the stage's input alone, and the
    forward runs again; with ``"weights": "current"`` this is Features Replay."""

    slack: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    """Extra micro-batches in flight per hop: they hide the latency of the network and cost staleness. "auto": the
    first calls run at slack 0 and are timed; then all ranks take the smallest slack that hides the latency (8 at
    most), print why, and go on from a drained pipeline. Set the number printed to repeat such a run exactly."""

    clip: Literal["stage", "global"] = "stage"
    """The norm that ``gradient_clipping`` goes by. "stage": the stage's own, as waiting for the others would bring
    the bubble back. "global": that of the whole pipeline, in the newest call for which every stage knows it without
    a wait: call t - L - 2 in call t, with L = ceil(d_0 / M)."""

    loss: Literal["delayed", "exact"] = "delayed"
    """The loss that ``train_batch`` returns. "delayed": the newest one known without a wait. "exact": that of the
    same call, which costs the overlap."""

    sync_steps: int = Field(default=0, ge=0)
    """The number of calls at the start that run DeepSpeed's 1F1B, before the delayed schedule begins."""

    trace: str | None = Field(default=None, min_length=1)
    """A folder where each rank records what it does and when, for ``ds-ddg trace``; at most 16 MB a rank, the end
    of a long run."""

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
    """Say what is wrong with the value of one key, which may be of several types."""
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
