"""Libraries that the package's extras bring: where one is missing, one line says how to install it."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_ddg
from ds_ddg import models
from ds_ddg.analysis.sweep_plot import save_curves
from ds_ddg.analysis.timeline_plot import save
from ds_ddg.cli import main
from ds_ddg.extras import _LIBRARIES, MissingExtraError, extra

PACKAGE = Path(ds_ddg.__file__).parent


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`without("matplotlib")`: from here on it cannot be imported."""

    def block(library: str) -> None:
        for name in [library, *(name for name in sys.modules if name.startswith(f"{library}."))]:
            monkeypatch.setitem(sys.modules, name, None)

    return block


class Anything:
    """Stands for a config: nothing looks at it before the library is asked for."""


CASES: list[tuple[str, str, str, Callable[[Path], Any]]] = [
    ("matplotlib", "plot", "a picture", lambda folder: save([], folder / "x.png")),
    ("matplotlib", "plot", "a picture", lambda folder: save_curves([], folder / "x.svg")),
    ("torchvision", "vision", "a ResNet of torchvision", lambda _: models.torchvision_resnet("resnet18")),
    ("transformers", "hf", "a model of transformers", lambda _: models.from_transformers(Anything())),
    ("transformers", "hf", "a model of transformers", lambda _: models.causal_lm(Anything())),
    ("transformers", "hf", "a model of transformers", lambda _: models.masked_lm(Anything())),
    ("transformers", "hf", "a model of transformers", lambda _: models.sequence_classification(Anything())),
    ("safetensors", "hf", "reading weights", models.read_state_dict),
]


@pytest.mark.parametrize(("library", "name", "what", "use"), CASES)
def test_a_missing_library_is_one_line(
    library: str, name: str, what: str, use: Callable[[Path], Any], tmp_path: Path, without: Callable[[str], None]
) -> None:
    (tmp_path / "model.safetensors").touch()
    without(library)
    with pytest.raises(MissingExtraError) as caught:
        use(tmp_path)
    assert str(caught.value) == f'{what} needs {library}: pip install "ds_ddg[{name}]"'


def test_weights_that_cannot_be_written_say_so_everywhere(tmp_path: Path, without: Callable[[str], None]) -> None:
    """Ranks tell each other what went wrong, so the message arrives inside of another error."""
    net = nn.Sequential(*(spec.build() for spec in models.torchvision_resnet("resnet18", num_classes=2)))
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    without("safetensors")
    with pytest.raises(models.WeightsError, match=r'^writing weights needs safetensors: pip install "ds_ddg\[hf\]"$'):
        models.save_pretrained(net, tmp_path)
    with pytest.raises(models.WeightsError, match=r'^reading weights needs safetensors: pip install "ds_ddg\[hf\]"$'):
        models.load_pretrained(net, tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("command", "computes"),
    [
        (["plan", "--stages", "2"], "plan.replay"),
        (["simulate", "--stages", "2", "--micro-batches", "1,2"], "simulate._replay"),
    ],
)
def test_commands_ask_before_they_compute(
    command: list[str],
    computes: str,
    tmp_path: Path,
    without: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without("matplotlib")
    monkeypatch.setattr(f"ds_ddg.cli.{computes}", None)
    path = str(tmp_path / "picture.png")
    assert main([*command, "--out", path]) == 2
    said = capsys.readouterr()
    assert said.err == f'ds-ddg: error: --out {path!r} needs matplotlib: pip install "ds_ddg[plot]"\n'
    assert said.out == ""


def test_a_trace_needs_no_library(tmp_path: Path, without: Callable[[str], None]) -> None:
    without("matplotlib")
    assert main(["plan", "--stages", "2", "--out", str(tmp_path / "trace.json")]) == 0


@pytest.mark.parametrize("library", _LIBRARIES["recipes"])
def test_recipes_say_which_library_is_missing(library: str, without: Callable[[str], None]) -> None:
    import recipes

    without(library)
    with pytest.raises(MissingExtraError, match=rf'^a recipe needs {library}: pip install "ds_ddg\[recipes\]"$'):
        importlib.reload(recipes)


def test_what_a_library_itself_lacks_is_not_renamed(tmp_path: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module") as caught, extra("plot", "a picture"):
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert not isinstance(caught.value, MissingExtraError)


def unguarded(node: ast.AST, guarded: bool = False) -> Iterator[str]:
    """Libraries of extras that are imported outside of a ``with extra(...)`` and of ``if TYPE_CHECKING``."""
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [node.module or ""]
    libraries = {name.partition(".")[0] for name in names}
    if not guarded:
        yield from libraries & {library for each in _LIBRARIES.values() for library in each}
    for child in ast.iter_child_nodes(node):
        head = ast.unparse(node.items[0]) if isinstance(node, ast.With) else ""
        checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        yield from unguarded(child, guarded or head.startswith("extra(") or checking)


def test_every_import_of_such_a_library_is_guarded() -> None:
    """But for the folder of transformers, in which `specs` runs first and asks for it."""
    found = {
        str(path.relative_to(PACKAGE)): libraries
        for path in PACKAGE.rglob("*.py")
        if (libraries := set(unguarded(ast.parse(path.read_text()))))
    }
    allowed = {f"models/transformers/{name}.py" for name in ("discovery", "model_parts", "stub_model")}
    assert set(found) <= allowed
    assert all(libraries == {"transformers"} for libraries in found.values())
