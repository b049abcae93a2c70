"""The package as a user gets it: sdist, wheel, and an environment that has what the wheel requires and no more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
_NOT_SHIPPED = shutil.ignore_patterns(
    *(".git", ".gitattributes", ".gitignore", ".venv", ".whl", "build", "dist", "runs", "data", "site", "*.egg-info"),
    *("__pycache__", "*.py[cod]", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".coverage", ".deepspeed_env"),
)
_BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"


def build(folder: Path) -> tuple[Path, Path]:
    """Build the sdist from a copy of the project, and the wheel from the unpacked sdist, as an index would have them.

    Args:
        folder: for all that is made.

    Returns:
        The unpacked sdist, and the wheel.
    """
    copy, out = folder / "copy", folder / "dist"
    shutil.copytree(ROOT, copy, ignore=_NOT_SHIPPED)
    out.mkdir()
    run([sys.executable, "-c", _BUILD.format("sdist"), str(out)], copy)
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "sdist", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = (folder / "sdist").iterdir()
    run([sys.executable, "-c", _BUILD.format("wheel"), str(out)], unpacked)
    (wheel,) = out.glob("*.whl")
    return unpacked, wheel


def shipped(folder: Path) -> set[str]:
    """Files of a project that a copy of it would have."""
    found = set()
    for where, folders, files in os.walk(folder):
        left_out = _NOT_SHIPPED(where, [*folders, *files])
        folders[:] = [name for name in folders if name not in left_out]
        found |= {os.path.relpath(os.path.join(where, name), folder) for name in files if name not in left_out}
    return found


def environment(folder: Path, wheel: Path, extras: str = "") -> Path:
    """Make a virtual environment and install the wheel there, without a network.

    It shares this environment's copies of what the wheel requires, and has nothing else: what the wheel does not
    require cannot be imported.

    Args:
        folder: where to make it.
        wheel: the package.
        extras: of the package, with commas between them.

    Returns:
        The folder of its programs.
    """
    venv.create(folder, with_pip=False)
    binaries = folder / "bin"
    (packages,) = (folder / "lib").glob("python*/site-packages")
    named = f"{wheel}[{extras}]" if extras else str(wheel)
    target = ["--python", str(binaries / "python"), "--disable-pip-version-check", "--no-input"]
    pip = [sys.executable, "-m", "pip", *target, "install", "--quiet", "--no-index"]
    run([*pip, "--no-deps", named], folder)
    (info,) = packages.glob("ds_ddg-*.dist-info")
    for needed in _closure(Distribution.at(info), set(filter(None, extras.split(",")))):
        _share(needed, packages, binaries)
    run([*pip, named], folder)  # fails if something is missing or of another version
    return binaries


def run(command: list[str], folder: Path, **variables: str) -> str:
    """Run a program in `folder` without this project on its path; returns what it prints, or raises with that."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, cwd=folder, env=kept | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout}")
    return done.stdout


def _closure(package: Distribution, extras: set[str]) -> Iterator[Distribution]:
    """All that a distribution requires, directly and not, as far as it is installed here."""
    waiting: list[tuple[Distribution, frozenset[str]]] = [(package, frozenset(extras))]
    seen: set[tuple[str, frozenset[str]]] = set()
    found: dict[str, Distribution] = {}
    while waiting:
        current, wanted = waiting.pop()
        for requirement in map(Requirement, current.requires or ()):
            marker = requirement.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in wanted | {""}):
                continue
            own = requirement.name.replace("_", "-") == package.name.replace("_", "-")  # an extra of several
            try:
                needed = package if own else distribution(requirement.name)
            except PackageNotFoundError:
                continue  # pip says so
            key = needed.name, frozenset(requirement.extras)
            if key not in seen:
                seen.add(key)
                waiting.append((needed, key[1]))
            if not own:
                found[needed.name] = needed
    yield from found.values()


def _share(package: Distribution, packages: Path, binaries: Path) -> None:
    """Link a distribution's files into an environment, and give it the programs, which name its Python."""
    files = package.files or ()
    for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
        link = packages / top
        if not link.exists():
            link.symlink_to(Path(str(package.locate_file(top))).resolve())
    for file in files:
        if file.parts[0] == ".." and file.parts[-2] == "bin":
            first, _, rest = Path(str(package.locate_file(file))).read_bytes().partition(b"\n")
            if first.startswith(b"#!") and b"python" in first:
                program = binaries / file.name
                program.write_bytes(b"#!" + os.fsencode(binaries / "python") + b"\n" + rest)
                program.chmod(0o755)
