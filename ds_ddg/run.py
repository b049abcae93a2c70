"""Run an unchanged DeepSpeed script with the delayed schedule.

    deepspeed --module ds_ddg.run train.py --deepspeed_config ds.json
    torchrun --nproc-per-node 2 -m ds_ddg.run train.py ...
    accelerate launch --multi_gpu --num_processes 2 -m ds_ddg.run train.py ...
    python -m ds_ddg.run -m package.train ...

Every ``deepspeed.initialize`` of a ``PipelineModule`` in the script makes a ``DDGEngine``, with the settings of the
``"ddg"`` block of its config, or the defaults.
"""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

__all__ = ["main"]

_USAGE = """\
usage: python -m ds_ddg.run script.py [arguments of the script]
       python -m ds_ddg.run -m package.module [arguments of the module]

Runs a DeepSpeed script with the delayed schedule, as python itself would run it. Options that a launcher puts before
the script's name, such as --local_rank=N, go to the script.
"""


_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
_STARTED_BY = ("OMPI_", "PMI", "MPI", "MV2_", "SLURM_", "AZUREML_", "SM_")


class _Command(NamedTuple):
    target: str
    is_module: bool
    arguments: list[str]
    """The script's arguments, with those of the launcher first."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script named by the first argument that is no option, as ``python script.py ...`` would.

    The ``deepspeed`` launcher puts ``--local_rank=N`` before the script's name; the script finds it among its own.

    Raises:
        SystemExit: there is no script to run; it has a message.
    """
    command = _parse(list(sys.argv[1:] if arguments is None else arguments))
    run = _run_module if command.is_module else _run_script
    if _alone():
        os.environ.update(_ALONE)
    with ExitStack() as until_the_end:
        _swap_once_imported(until_the_end)
        run(command.target, command.arguments)


def _parse(given: Sequence[str]) -> _Command:
    before: list[str] = []
    rest = list(given)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            print(_USAGE, end="")
            raise SystemExit(0)
        if word == "-m":
            if not rest:
                raise SystemExit(f"ds_ddg.run: -m needs the name of a module\n{_USAGE}")
            return _Command(rest[0], True, before + rest[1:])
        if not word.startswith("-"):
            return _Command(word, False, before + rest)
        before.append(word)
        if word in ("--local_rank", "--local-rank") and rest:
            before.append(rest.pop(0))
    raise SystemExit(_USAGE)


def _alone() -> bool:
    """Return whether no launcher started this process, and DeepSpeed could not ask MPI for the other processes."""
    launched = any(name in _ALONE or name.startswith(_STARTED_BY) for name in os.environ)
    return not launched and importlib.util.find_spec("mpi4py") is None


def _swap_once_imported(until_the_end: ExitStack) -> None:
    """Swap the engine once the script has imported DeepSpeed: before, it may still set DS_ACCELERATOR, say."""

    def enter() -> None:
        from ds_ddg.entry import swap

        until_the_end.enter_context(swap())

    if "deepspeed" in sys.modules:
        enter()
    else:
        hook = _AfterImport("deepspeed", enter)
        sys.meta_path.insert(0, hook)
        until_the_end.callback(hook.remove)


class _AfterImport(MetaPathFinder):
    """Calls `then` as soon as the module `name` has been imported for the first time."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name, self._then = name, then

    def remove(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        self.remove()
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_then(module: ModuleType) -> None:
                load(module)
                self._then()

            spec.loader.exec_module = load_then  # type: ignore[method-assign]
        return spec


def _run_script(script: str, arguments: list[str]) -> None:
    path = Path(script).absolute()
    if not path.is_file():
        raise SystemExit(f"ds_ddg.run: no script {script!r} in {Path.cwd()}; its own options go behind its name")
    with io.open_code(str(path)) as file:
        code = compile(file.read(), str(path), "exec", dont_inherit=True)
    module = ModuleType("__main__")
    module.__file__ = str(path)
    module.__dict__["__cached__"] = None
    if not getattr(sys.flags, "safe_path", False):  # else there is no entry for the directory of what is run
        sys.path[0] = str(path.resolve().parent)
    _run_as_main(module, code, [script, *arguments])


def _run_module(name: str, arguments: list[str]) -> None:
    spec = _find(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = _find(f"{name}.__main__")
    code = spec.loader.get_code(spec.name) if spec is not None and isinstance(spec.loader, InspectLoader) else None
    if spec is None or code is None:
        raise SystemExit(f"ds_ddg.run: no module {name!r} that can be run in {Path.cwd()} or elsewhere in sys.path")
    module = importlib.util.module_from_spec(spec)
    module.__name__ = "__main__"
    _run_as_main(module, code, [str(spec.origin), *arguments])


def _find(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise  # something that the package itself imports


def _run_as_main(module: ModuleType, code: CodeType, argv: list[str]) -> None:
    """Run the script as python itself does; ``runpy`` would remove the module before atexit functions have run."""
    module.__dict__["__builtins__"] = builtins
    sys.argv = argv
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


if __name__ == "__main__":
    main()
