"""What tests claim for docs/support.md, and the check that the page says the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.matrix import NoModesError, StaleCheck, StalePageError, claimed, said_by
from helpers.modes import DEFAULT, MODES


def item(*marks: pytest.MarkDecorator, **parameters: Any) -> Any:
    """A collected test, as far as the matrix looks at it."""

    def iter_markers(name: str) -> list[pytest.Mark]:
        return [mark.mark for mark in marks if mark.name == name]

    return SimpleNamespace(
        nodeid="test_this.py::test_that",
        path=Path("test_this.py"),
        callspec=SimpleNamespace(params=parameters),
        iter_markers=iter_markers,
        get_closest_marker=lambda name: next(iter(iter_markers(name)), None),
    )


@pytest.mark.parametrize(
    ("modes", "parameters", "expected"),
    [
        (MODES[1:3], {}, MODES[1:3]),
        (DEFAULT, {"ddg": {"weights": "current"}}, [("stash", "keep")]),
        ("ddg", {"ddg": {}}, [("stash", "keep")]),
        ("block", {"block": {"weights": "current", "slack": 1}}, [("current", "keep")]),
        ("mode", {"mode": ("current", "recompute")}, [("current", "recompute")]),
        ("case.ddg", {"case": {"ddg": {"activations": "recompute"}}}, [("stash", "recompute")]),
        ("case.ddg", {"case": SimpleNamespace(ddg={"weights": "current"})}, [("current", "keep")]),
        (("weights",), {"weights": "current"}, [("current", "keep")]),
        (("weights", "activations"), {"weights": "stash", "activations": "recompute"}, [("stash", "recompute")]),
    ],
)
def test_marker_names_its_modes(modes: Any, parameters: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    mark = pytest.mark.proves("this", modes=modes)
    assert said_by(item(mark, **parameters)) == ("test_this", [("this", mode, True) for mode in expected], [])


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({}, "it names none"),
        ({"modes": []}, "it names none"),
        ({"modes": [("stash", "kept")]}, "it names none"),
        ({"modes": "mode"}, "KeyError: 'mode'"),
        ({"modes": ("weights",)}, "KeyError: 'weights'"),
        ({"modes": "ddg.block"}, "KeyError: 'block'"),
        ({"modes": "other"}, "ValueError: 3 is neither one of"),
    ],
)
def test_marker_without_modes_is_refused(more: dict[str, Any], why: str) -> None:
    """Where a parameter of another name has them, too: nothing is guessed."""
    with pytest.raises(NoModesError) as caught:
        said_by(item(pytest.mark.proves("this", **more), ddg={"weights": "current"}, other=3))
    assert str(caught.value).startswith("test_this.py::test_that: proves('this') needs its modes (")
    assert why in str(caught.value)


def test_page_is_stale_when_a_cell_or_a_refusal_is_another(tmp_path: Path) -> None:
    proof = item(pytest.mark.proves("this", modes=MODES[:2]))
    refusal = item(pytest.mark.refuses("that", "something else"))
    page = tmp_path / "support.md"
    page.write_text(str(claimed([proof, proof, refusal])))

    def check(*items: Any) -> None:
        StaleCheck(page).pytest_collection_finish(SimpleNamespace(items=items))  # type: ignore[arg-type]

    on_a_gpu = item(pytest.mark.gpu, pytest.mark.proves("another", modes=DEFAULT))
    check(proof, refusal, on_a_gpu)  # how many prove a thing does not matter
    others = {
        "| this | = | = | = | - | `test_this` |": [item(pytest.mark.proves("this", modes=MODES[:3])), refusal],
        "| this | ~ | ~ | - | - | `test_this` |": [
            item(pytest.mark.proves("this", modes=MODES[:2], exact=False)),
            refusal,
        ],
        "-| this | = | = | - | - | `test_this` |": [refusal],
        "| that | nothing |": [proof, item(pytest.mark.refuses("that", "nothing"))],
        "-| that | something else |": [proof],
    }
    for line, items in others.items():
        with pytest.raises(StalePageError, match="is stale: `make matrix` writes it anew") as caught:
            check(*items)
        assert line in str(caught.value)
