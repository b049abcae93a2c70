"""Which parameters belong to which stage."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from ds_ddg.study.stages import parameters_by_stage


class Tied(nn.Module):
    """Three layers, the last of which shares the weight of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 4)
        self.head.weight = self.embed.weight


def names(model: nn.Module, stages: list[list[Any]]) -> list[list[str]]:
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[known[id(parameter)] for parameter in stage] for stage in stages]


def test_names_the_longest_counts_and_ties_go_first() -> None:
    model = Tied()
    found = parameters_by_stage({"embed": 0, "layers.": 1, "layers.1.": 2, "head": 2}, model)
    assert names(model, found) == [
        ["embed.weight"],
        ["layers.0.weight", "layers.0.bias"],
        ["layers.1.weight", "layers.1.bias", "head.bias"],
    ]


def test_by_modules_and_by_lists() -> None:
    model = Tied()
    found = parameters_by_stage([model.embed, [*model.layers.parameters(), *model.head.parameters()]])
    assert names(model, found)[0] == ["embed.weight"]
    assert len(found[1]) == 5


@pytest.mark.parametrize("kind", [list, nn.ModuleList, lambda layers: nn.Sequential(*layers)])
def test_a_list_of_layers_is_divided_evenly(kind: Any) -> None:
    layers = [nn.Linear(8, 8), nn.ReLU(), *(nn.Linear(4, 4) for _ in range(3))]
    found = parameters_by_stage(2, kind(layers))
    assert [len(stage) for stage in found] == [2, 6]


def test_the_layers_of_a_pipeline_module_are_found() -> None:
    class Pipeline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.forward_funcs = [nn.Linear(2, 2), lambda x: x, nn.Linear(2, 2)]

    assert [len(stage) for stage in parameters_by_stage(2, Pipeline())] == [2, 2]


@pytest.mark.parametrize(
    ("stages", "model", "error", "message"),
    [
        ({"embed": 0, "layers": 1}, Tied(), ValueError, "no stage is named for the parameter 'head.weight'"),
        ({"embed": 0, "layers": 2, "head": 2}, Tied(), ValueError, r"without a gap, got \[0, 2\]"),
        ({"embed": 0, "layer": 0, "head": 1, "tail": 1}, Tied(), ValueError, "begins with 'tail'"),
        ({"embed": 0}, None, TypeError, "names need the model"),
        (2, None, TypeError, "a number need the model"),
        (2, Tied(), TypeError, "got Tied; name the layers instead"),
        (3, [nn.Linear(2, 2)], ValueError, "3 stages for 1 layers"),
        ([[]], None, ValueError, r"without a parameter of their own: \[0\]"),
        ([], None, ValueError, "of their own: all"),
        ([nn.ReLU(), nn.Linear(2, 2)], None, ValueError, r"of their own: \[0\]"),
        ([nn.Linear(2, 2)], Tied(), TypeError, "leave it out"),
    ],
)
def test_refuses_what_divides_nothing(stages: Any, model: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parameters_by_stage(stages, model)
