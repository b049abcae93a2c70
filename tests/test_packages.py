"""The package as an index would have it: what is in it, that it installs and runs where nothing else is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import Distribution, entry_points
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import ds_ddg
from ds_ddg.extras import _LIBRARIES
from helpers.packages import ROOT, build, environment, run, shipped

DISTRIBUTIONS = {"sklearn": "scikit-learn"}
"""What brings a library, where that has another name."""


@dataclass(frozen=True)
class Built:
    """An sdist that is unpacked, and the wheel of it."""

    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(*build(tmp_path_factory.mktemp("built")))


@dataclass(frozen=True)
class Installed:
    """The wheel in an environment of its own, without extras."""

    binaries: Path
    folder: Path
    """An empty one."""

    def run(self, program: str, *arguments: str) -> str:
        return run([str(self.binaries / program), *arguments], self.folder, DS_ACCELERATOR="cpu")

    def fails(self, program: str, *arguments: str) -> str:
        """The last line of what it prints."""
        with pytest.raises(AssertionError) as caught:
            self.run(program, *arguments)
        return str(caught.value).strip().splitlines()[-1]

    @property
    def metadata(self) -> Distribution:
        (info,) = self.binaries.parent.glob("lib/python*/site-packages/ds_ddg-*.dist-info")
        return Distribution.at(info)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    return Installed(environment(folder / "environment", built.wheel), tmp_path_factory.mktemp("empty"))


# -- sdist ------------------------------------------------------------------------------------------------------------


def test_the_sdist_has_all_of_the_project(built: Built) -> None:
    assert shipped(ROOT) - shipped(built.sdist) == set()
    assert {"setup.py", "Makefile", ".ci/run", "tests/conftest.py", "docs/recipes.md"} <= shipped(built.sdist)


def test_the_sdist_runs_its_own_tests(built: Built) -> None:
    """All are collected, with what they import of recipes and benchmarks; some are run."""
    pytest_there = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-q"]
    page = built.sdist / "docs" / "support.md"
    run([*pytest_there, "--collect-only", f"--check-matrix={page}"], built.sdist)
    where = "import ds_ddg; print(ds_ddg.__file__)"
    assert run([sys.executable, "-c", where], built.sdist).strip() == str(built.sdist / "ds_ddg" / "__init__.py")
    files = [f"tests/{name}.py" for name in ("schedules/test_plan", "test_config", "test_extras", "test_architecture")]
    output = run([*pytest_there, "-m", "pure", *files], built.sdist)
    assert re.search(r"^\d{2,} passed", output, re.M), output


# -- wheel ------------------------------------------------------------------------------------------------------------


def test_the_wheel_has_the_package_alone(installed: Installed) -> None:
    package = installed.metadata
    assert package.version == ds_ddg.__version__
    files = {str(file) for file in package.files or ()}
    ours = {f"ds_ddg/{name}" for name in shipped(Path(ds_ddg.__file__).parent)}
    packed = {name for name in files if ".dist-info" not in name and "bin/" not in name and "__pycache__" not in name}
    assert packed == ours
    assert "ds_ddg/py.typed" in packed
    (command,) = entry_points(group="console_scripts", name="ds-ddg").select(module="ds_ddg.cli")
    assert [(each.name, each.value) for each in package.entry_points] == [(command.name, command.value)]


def test_each_extra_brings_what_is_imported_of_it(installed: Installed) -> None:
    requires = [Requirement(each) for each in installed.metadata.requires or ()]

    def brought(extra: str) -> set[str]:
        found = {each for each in requires if each.marker and each.marker.evaluate({"extra": extra})}
        nested = {name for each in found if each.name == "ds_ddg" for name in each.extras}
        return {each.name for each in found} | {name for extra in nested for name in brought(extra)}

    for extra, libraries in _LIBRARIES.items():
        assert {DISTRIBUTIONS.get(library, library) for library in libraries} <= brought(extra)
    assert {"ds_ddg", "pytest", "transformers", "matplotlib"} <= brought("test")


def test_it_runs_from_an_empty_folder(installed: Installed) -> None:
    where = installed.run("python", "-c", "import ds_ddg; print(ds_ddg.__file__, ds_ddg.initialize.__name__)")
    package = installed.binaries.parent / "lib"
    assert where.splitlines()[-1].startswith(str(package))
    assert where.strip().endswith("ds_ddg/__init__.py initialize")
    assert installed.run("ds-ddg", "--version") == f"ds_ddg {ds_ddg.__version__}\n"
    assert "simulate" in installed.run("ds-ddg", "--help")
    assert "stage 1 | .  F0 B0--- F1 B1---" in installed.run("ds-ddg", "plan", "--stages", "2", "--clock")


def test_it_says_which_extra_is_missing(installed: Installed) -> None:
    """In an environment that really has none of their libraries."""
    picture = installed.fails("ds-ddg", "plan", "--stages", "2", "--out", "x.png")
    assert picture == """ds-ddg: error: --out 'x.png' needs matplotlib: pip install "ds_ddg[plot]\""""
    for code, what, library, extra in (
        ("causal_lm('.')", "a model of transformers", "transformers", "hf"),
        ("torchvision_resnet('resnet18')", "a ResNet of torchvision", "torchvision", "vision"),
    ):
        said = installed.fails("python", "-c", f"import ds_ddg; ds_ddg.models.{code}")
        assert said == f'ds_ddg.extras.MissingExtraError: {what} needs {library}: pip install "ds_ddg[{extra}]"'


# -- both -------------------------------------------------------------------------------------------------------------


def test_hosted_ci_runs_the_ends_of_what_is_supported(installed: Installed) -> None:
    """The oldest and the newest Python that the package names, the lowest torch and one that its bounds allow."""
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
    rows = job["strategy"]["matrix"]["include"]
    classifiers = installed.metadata.metadata.get_all("Classifier") or []
    pythons = [name for each in classifiers if re.fullmatch(r"3\.\d+", name := each.rpartition(" ")[2])]
    assert [row["python"] for row in rows] == [pythons[0], pythons[-1]]
    assert installed.metadata.metadata["Requires-Python"] == f">={pythons[0]}"
    (torch,) = (each for each in map(Requirement, installed.metadata.requires or ()) if each.name == "torch")
    lowest = next(bound.version for bound in SpecifierSet(str(torch.specifier)) if bound.operator == ">=")
    assert rows[0]["torch"] == f"{lowest}.*"
    assert torch.specifier.contains(rows[-1]["torch"].replace("*", "0"))
    assert [step for step in job["steps"] if step.get("run") == ".ci/run"]


def test_a_new_users_first_minutes() -> None:
    """tests/scripts/new_user.py, which builds, installs, trains and generates in an empty folder."""
    script = ROOT / "tests" / "scripts" / "new_user.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "/environment/lib/" in done.stdout.partition("print(ds_ddg.__file__)\n")[2].splitlines()[0]
    assert re.search(r"^loss of call 98, counted from 0: 0\.\d+$", done.stdout, re.M), done.stdout
    assert re.search(r"^generated: the opposite of hot is cold$", done.stdout, re.M), done.stdout
    assert done.stdout.rstrip().endswith("the opposite of old is new")
