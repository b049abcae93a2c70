"""A transformers model that a rank knows as a whole but has in parts."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_ddg.models.transformers.discovery import learn
from ds_ddg.models.transformers.stub_model import Enough, Skeleton, Stub, materialise, splice

__all__ = ["Blueprint"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a layer besides the hidden states."""


class Blueprint:
    """The model's structure, and its parts with new weights of the library's initialisation.

    Args:
        config: a transformers config; it is copied.
        model_class: a model class, or one of the ``AutoModelFor...``.
        inputs: names of the model's inputs, in the order in which the data has them.
        dtype: type of the weights.

    Raises:
        ValueError: for a config of quantized weights, and for models that are not one stack of layers.
    """

    def __init__(self, config: Any, model_class: Any, inputs: Sequence[str], dtype: torch.dtype) -> None:
        if getattr(config, "quantization_config", None):
            raise ValueError(
                "the config has a quantization_config, by which transformers would read plain weights as quantized "
                "ones; dequantize the model once with transformers and save it, or delete that entry"
            )
        self.config = copy.deepcopy(config)
        self.inputs = tuple(inputs)
        plain = copy.deepcopy(config)
        # Nobody reads a cache or intermediate results here, and layers would get them as arguments.
        plain.use_cache = plain.output_attentions = plain.output_hidden_states = False
        plain.return_dict = True
        build = getattr(model_class, "from_config", None) or model_class._from_config
        with torch.device("meta"):
            self.model: Any = build(plain, dtype=dtype)
        self.name = type(self.model).__name__
        self.structure = learn(self.model)
        self._frames: _Frames | None = None

    def __repr__(self) -> str:
        return f"Blueprint({self.name})"  # DeepSpeed prints the arguments of specs

    def part(self, path: str, without: Mapping[str, nn.Module] | None = None) -> nn.Module:
        """Build the module at `path` with memory and initial weights, and other modules at some paths inside it."""
        inside = {key.removeprefix(f"{path}."): other for key, other in (without or {}).items()}
        return materialise(self.model, path, splice(self.model.get_submodule(path), inside))

    def skeleton(self, parts: Mapping[str, nn.Module], keep: str = "") -> Skeleton:
        """Build the model with `parts` at their paths and stubs elsewhere, see `Skeleton`."""
        return Skeleton(self.model, self.structure.layers, parts, keep)

    def named(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the model's inputs by name; ValueError if there are more than names."""
        if len(inputs) > len(self.inputs):
            raise ValueError(
                f"the data has {len(inputs)} inputs, the layers were built for {len(self.inputs)}: {self.inputs}; "
                "name them all in from_transformers(..., inputs=(...))"
            )
        return dict(zip(self.inputs, inputs, strict=False))

    def stub(self, path: str) -> Stub:
        """Return a module that stands in for the module at `path`."""
        return Stub(path, self.model.get_submodule(path))

    def call(self, index: int, hidden: Tensor, inputs: Sequence[Tensor]) -> Call:
        """Return the arguments of layer `index` besides the hidden states (B, S, width)."""
        # One per process: the layers of a stage run one after another on the same inputs.
        self._frames = self._frames or _Frames(self)
        return self._frames.of(index, hidden, inputs)

    # What files need, see `library_layer.Origin`.

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every key of the state dict with its shape, tied weights once."""
        aliases = self.structure.aliases
        return {key: tuple(t.shape) for key, t in self.model.state_dict().items() if key not in aliases}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return every key of `shapes` with the type that the model was built with."""
        aliases = self.structure.aliases
        return {key: tensor.dtype for key, tensor in self.model.state_dict().items() if key not in aliases}

    def aliases(self) -> dict[str, str]:
        """Map other keys of tied weights to the one in `shapes`."""
        return self.structure.aliases

    def rename(self, keys: list[str]) -> dict[str, str]:
        """Map keys in a file to keys of the model; ValueError if the library would compute weights from several."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key

        rules = get_model_conversion_mapping(self.model)
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        names = {}
        for key in keys:
            names[key], converted = rename_source_key(key, renamings, converters, prefix, state)
            if names[key] not in state and key in state:  # as the library does: it is no name of another version's
                names[key], converted = rename_source_key(key, [], [], prefix, state)
            if converted is not None and key not in state:
                raise ValueError(
                    f"{key!r} is in a format that transformers converts while it loads (to {names[key]!r}), which a "
                    f"stage cannot do tensor by tensor; write the weights once as {self.name} has "
                    "them, with safetensors.torch.save_file(model.state_dict(), ...)"
                )
        return names

    def ignored(self, key: str) -> bool:
        """Return whether `key` is one of those that the library drops silently."""
        patterns = self.model._keys_to_ignore_on_load_unexpected or ()
        return any(re.search(pattern, key) for pattern in patterns)

    def check(self, directory: Path) -> None:
        """Raise ValueError if a config.json in `directory` is another model type's."""
        from transformers import PreTrainedConfig

        if (directory / "config.json").is_file():
            found, _ = PreTrainedConfig.get_config_dict(directory, local_files_only=True)
            if found.get("model_type", self.config.model_type) != self.config.model_type:
                raise ValueError(
                    f"{directory} has the weights of a {found['model_type']!r} model, the layers are those of a "
                    f"{self.config.model_type!r}; build the specs from the same directory"
                )

    def save_config(self, directory: Path, dtype: torch.dtype) -> None:
        """Write config.json, from which the ``Auto`` classes know the model."""
        config = copy.deepcopy(self.config)
        config.architectures = [self.name]
        config.dtype = dtype
        config.save_pretrained(directory)


class _Frames:
    """The arguments of all layers, as the model's ``forward`` makes them from its inputs; the last ones are kept."""

    def __init__(self, blueprint: Blueprint) -> None:
        self._skeleton = blueprint.skeleton({})
        self._blueprint = blueprint
        self._layers = blueprint.structure.layers
        self._wraps = blueprint.structure.wraps
        self._name = blueprint.name
        self._index = -1
        self._inputs: tuple[Tensor, ...] = ()
        self._calls: list[Call] = []
        self._checked = False

    def of(self, index: int, hidden: Tensor, inputs: Sequence[Tensor]) -> Call:
        """Return the arguments of layer `index`."""
        # Only for the layer right after the last one: the first layer of a stage never is, and DeepSpeed may receive
        # the next micro-batch's inputs into the same tensors.
        same = len(inputs) == len(self._inputs) and all(a is b for a, b in zip(inputs, self._inputs, strict=True))
        if index != self._index + 1 or not same:
            self._calls, self._inputs = self._compute(hidden, inputs), tuple(inputs)
        self._index = index
        return self._calls[index]

    @torch.no_grad()
    def _compute(self, hidden: Tensor, inputs: Sequence[Tensor]) -> list[Call]:
        calls: list[Call] = []

        def record(path: str, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            if path == self._layers[-1]:
                raise Enough(None)
            return (hidden_states,) if self._wraps else hidden_states

        self._skeleton.run(
            self._blueprint.named(inputs), hidden, {path: partial(record, path) for path in self._layers}
        )
        if not self._checked:
            for args, kwargs in calls:
                self._check((args, kwargs))
            self._checked = True
        return calls

    def _check(self, value: Any) -> None:
        """Raise ValueError unless `value` is the same on every stage, whatever the hidden states are."""
        if isinstance(value, dict) and value:
            value = tuple(value.values())
        if isinstance(value, tuple | list):
            for entry in value:
                self._check(entry)
        elif isinstance(value, Tensor):
            if value.is_floating_point() and value.isnan().any():
                raise ValueError(f"{self._name} passes its layers what it computes from embeddings: no pipeline")
        elif not isinstance(value, bool | int | float | str | None):
            raise ValueError(f"{self._name} passes its layers a {type(value).__name__}, which no stage can send")
