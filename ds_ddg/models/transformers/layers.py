"""The layers of a pipeline that runs a transformers model, from the library's modules; `language` lists them."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn
from torch.func import functional_call

from ds_ddg.models.library_layer import Piece
from ds_ddg.models.transformers.model_parts import Blueprint
from ds_ddg.models.transformers.stub_model import Enough, Skeleton

__all__ = [
    "Embeddings",
    "Head",
    "TransformerLayer",
    "Unembed",
    "WordEmbedding",
]


class WordEmbedding(Piece):
    """The library's input embedding, of which another layer uses the weight as well."""

    def __init__(self, blueprint: Blueprint) -> None:
        assert blueprint.structure.tie is not None
        self._path = blueprint.structure.tie[0]
        super().__init__(blueprint, {self._path: blueprint.part(self._path)})

    @property
    def weight(self) -> Tensor:
        """The tied weight, (vocabulary, width)."""
        return self.part(self._path).weight  # type: ignore[return-value]

    def forward(self, values: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Embed words: (B, S) words, other inputs... -> (B, S, width), words, other inputs..."""
        inputs = values if isinstance(values, tuple) else (values,)
        return self.part(self._path)(inputs[0]), *inputs


class Embeddings(Piece):
    """The part of the model before its first layer."""

    def __init__(self, blueprint: Blueprint) -> None:
        structure = blueprint.structure
        self._named = blueprint.named
        self._first = structure.layers[0]
        self._tied = structure.tie[0] if structure.tie else None
        elsewhere = {self._tied: blueprint.stub(self._tied)} if self._tied else {}
        parts = {}
        for path in structure.before:
            if path != self._tied:
                inside = {key: stub for key, stub in elsewhere.items() if key.startswith(f"{path}.")}
                parts[path] = blueprint.part(path, inside)
        super().__init__(blueprint, parts)
        self._skeleton = blueprint.skeleton(parts)

    def forward(self, values: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run the part: (embedded words, if tied,) inputs... -> hidden states (B, S, width), inputs..."""
        inputs = list(values) if isinstance(values, tuple) else [values]
        answers: dict[str, Any] = {self._first: _first_argument}
        if self._tied:
            answers[self._tied] = _Once(inputs.pop(0))
        self._skeleton.train(self.training)
        return self._skeleton.run(self._named(inputs), None, answers), *inputs


class TransformerLayer(Piece):
    """One layer of the model."""

    def __init__(self, blueprint: Blueprint, index: int) -> None:
        self._path = blueprint.structure.layers[index]
        self._blueprint, self._index = blueprint, index
        super().__init__(blueprint, {self._path: blueprint.part(self._path)})

    def forward(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run the layer: hidden states (B, S, width), inputs... -> the same."""
        hidden, *inputs = values
        args, kwargs = self._blueprint.call(self._index, hidden, inputs)
        output = self.part(self._path)(hidden, *args, **kwargs)
        return output[0] if self._blueprint.structure.wraps else output, *inputs


class Head(Piece):
    """The part of the model after its last layer; where the output embedding is tied, up to that."""

    def __init__(self, blueprint: Blueprint) -> None:
        structure = blueprint.structure
        self._named = blueprint.named
        self._layers, self._wraps = structure.layers, structure.wraps
        self._decoder = structure.tie[1] if structure.tie else None
        parts = {}
        for path in structure.after:
            if self._decoder and f"{self._decoder}.".startswith(f"{path}."):
                parts[path] = _without_weight(blueprint, path, self._decoder)
            else:
                parts[path] = blueprint.part(path)
        super().__init__(blueprint, parts)
        self._skeleton = blueprint.skeleton(parts)

    def forward(self, values: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Run the part: hidden states (B, S, width), inputs... -> logits.

        If the output embedding is tied: -> (B, S, width), the bias of the output embedding if it has one, inputs...
        """
        hidden, *inputs = values
        answer = (hidden,) if self._wraps else hidden
        answers: dict[str, Any] = {path: lambda *_, **__: answer for path in self._layers}
        if self._decoder:
            answers[self._decoder] = _first_argument
        self._skeleton.train(self.training)
        result = self._skeleton.run(self._named(inputs), hidden, answers)
        if not self._decoder:
            return result.logits
        # Another stage may multiply by the tied weight, but the bias is trained here: it travels like an activation.
        bias: Any = self._skeleton.model.get_submodule(self._decoder).bias
        return (result, *inputs) if bias is None else (result, bias * 1, *inputs)


class Unembed:
    """The tied output embedding and what the model does after it."""

    def __init__(self, blueprint: Blueprint) -> None:
        assert blueprint.structure.tie is not None
        self._path = blueprint.structure.tie[1]
        self._linear = blueprint.model.get_submodule(self._path)
        self._has_bias = getattr(self._linear, "bias", None) is not None
        self._blueprint = blueprint
        self._skeleton: Skeleton | None = None

    def __call__(self, embedding: WordEmbedding, values: tuple[Tensor, ...]) -> Tensor:
        """Run the part: (B, S, width), bias if it has one, inputs... -> logits (B, S, vocabulary)."""
        hidden, *inputs = values
        weights = {"weight": embedding.weight}
        if self._has_bias:
            bias, *inputs = inputs
            weights["bias"] = bias
        logits = functional_call(self._linear, weights, (hidden,))
        self._skeleton = self._skeleton or self._blueprint.skeleton({}, keep=self._path)
        return self._skeleton.run(self._blueprint.named(inputs), hidden, {self._path: _Once(logits)}).logits


class _Once:
    """Answers with a value that is already there."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def __call__(self, *_: Any, **__: Any) -> Tensor:
        return self._value


def _first_argument(hidden_states: Tensor, *_: Any, **__: Any) -> NoReturn:
    raise Enough(hidden_states)


def _without_weight(blueprint: Blueprint, path: str, decoder: str) -> nn.Module:
    """Build the module at `path` with a stub for the output embedding in it, which keeps the bias."""
    original: Any = blueprint.model.get_submodule(decoder)
    weight, original.weight = original.weight, None
    try:
        module = blueprint.part(path)
    finally:
        original.weight = weight
    inside = decoder.removeprefix(path).lstrip(".")
    stub = blueprint.stub(decoder)
    # Not by register_parameter, which takes the original's for one of the stub's own.
    stub._parameters["bias"] = module.get_submodule(inside).bias  # type: ignore[assignment]
    if not inside:
        return stub
    module.set_submodule(inside, stub)
    return module
