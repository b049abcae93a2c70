"""A transformers model that runs its own ``forward`` though most of it is elsewhere: stubs stand in for that.

Nothing of a model is written again here. What its ``forward`` does before, between and after the layers (masks, rotary
embeddings, scaling) is therefore done exactly so in the pipeline.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Enough", "Skeleton", "Stub", "materialise", "splice", "topmost"]

Answer = Callable[..., Any]


class Enough(Exception):  # noqa: N818 - not an error
    """Raised by a stub when a skeleton has run as far as it is needed."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Stub(nn.Module):
    """A module that answers with the entry of `answers` for its path, else with the entry for ``""``.

    Args:
        path: path of the module that this one stands in for.
        original: that module, for plain attributes: some models ask their layers for a type or a window.
    """

    def __init__(self, path: str, original: nn.Module) -> None:
        super().__init__()
        self.path = path
        self.answers: dict[str, Answer] = {}
        self._original = (original,)  # in a tuple it is no child

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        answer = self.answers.get(self.path) or self.answers[""]
        return answer(*args, **kwargs)


def splice(model: nn.Module, others: dict[str, nn.Module]) -> nn.Module:
    """Return a deep copy of `model` with other modules at some paths; these themselves are not copied."""
    return copy.deepcopy(model, {id(model.get_submodule(path)): other for path, other in others.items()})


def topmost(model: nn.Module, inside: Iterable[str]) -> list[str]:
    """Return the paths that cover all of `model` except `inside` and what is above those."""
    inside = set(inside)
    above = {".".join(path.split(".")[:depth]) for path in inside for depth in range(path.count(".") + 1)}
    paths = []
    for path in sorted(above - inside):
        for name, _ in model.get_submodule(path).named_children():
            child = f"{path}.{name}".lstrip(".")
            if child not in above | inside:
                paths.append(child)
    return paths


def materialise(model: Any, path: str, module: nn.Module) -> nn.Module:
    """Give `module`, a copy of the one at `path` of `model`, memory on the default device and initial values."""
    shared: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    module.to_empty(device=torch.get_default_device())
    for first, *others in shared.values():  # to_empty separates them
        for name in others:
            holder, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(holder), leaf, module.get_parameter(first))
    values = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    with torch.no_grad():
        for value in values:
            value.fill_(torch.nan)
        _initialise(model, path, module)
    if any(value.isnan().any() for value in values if not value.is_meta):
        raise ValueError(f"{type(model).__name__} does not say how to initialise all weights of {path!r}")
    return module


def _initialise(model: nn.Module, path: str, module: nn.Module) -> None:
    """Initialise weights as the library does: children first, each by the innermost model that contains it."""
    from transformers import PreTrainedModel, initialization

    names = path.split(".")
    above = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
    owner = next(module for module in reversed(above) if isinstance(module, PreTrainedModel))

    def visit(module: nn.Module, owner: Any) -> None:
        owner = module if isinstance(module, PreTrainedModel) else owner
        for child in module.children():
            visit(child, owner)
        owner._initialize_weights(module)

    with initialization.guard_torch_init_functions():
        visit(module, owner)


class Skeleton:
    """A model that can run but for its stubs.

    Args:
        model: a model on the meta device.
        layers: paths of its transformer layers.
        parts: real modules by their path.
        keep: a module inside one of the others to which a stub is to be reached, by its path.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], parts: Mapping[str, nn.Module], keep: str = ""
    ) -> None:
        seen = [*layers, keep] if keep else layers
        tops = [path for path in topmost(model, seen) if model.get_submodule(path).state_dict()]
        stubs = {path: Stub(path, model.get_submodule(path)) for path in (*seen, *tops)}
        self.model = splice(model, {**stubs, **parts})
        self._answers: dict[str, Answer] = {}
        for module in self.model.modules():
            if isinstance(module, Stub):
                module.answers = self._answers
        real = {id(module) for part in parts.values() for module in part.modules()}
        self._own = [module for module in self.model.modules() if id(module) not in real]
        self._buffered: list[nn.Module] = []
        for path in topmost(model, [*stubs, *parts]):
            module = self.model.get_submodule(path)
            if any(True for _ in module.buffers()):
                self._buffered.append(materialise(model, path, module))
        self._device: torch.device | None = None
        self.train(False)

    def train(self, mode: bool) -> None:
        """Set training or evaluation mode for what is not real: dropout without weights is the skeleton's."""
        if self.model.training is not mode:
            for module in self._own:
                module.training = mode

    def run(self, inputs: Mapping[str, Tensor], like: Tensor | None, answers: Mapping[str, Answer]) -> Any:
        """Return the model's output, or what a stub raised `Enough` with.

        Args:
            inputs: inputs of the model, by name.
            like: hidden states (B, S, width). All other stubs answer NaN of that shape: it shows if it gets anywhere.
            answers: functions for stubs by path.
        """
        device = (next(iter(inputs.values())) if like is None else like).device
        if self._device != device:
            for module in self._buffered:
                module.to(device)
            self._device = device
        if like is not None:
            nothing = torch.full((), torch.nan, dtype=like.dtype, device=device).expand(like.shape)
            self._answers[""] = lambda *_, **__: nothing
        self._answers.update(answers)
        try:
            return self.model(**inputs)
        except Enough as enough:
            return enough.value
        finally:
            self._answers.clear()  # they hold on to tensors
