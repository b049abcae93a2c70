"""Run an unchanged DeepSpeed script with the delayed schedule.

    deepspeed --module ds_ddg.run train.py --deepspeed_config ds.json
    torchrun --nproc-per-node 2 -m ds_ddg.run train.py ...
    accelerate launch --multi_gpu --num_processes 2 -m ds_ddg.run train.py ...
    python -m ds_ddg.run -m package.train ...

Every ``deepspeed.initialize`` of a ``PipelineModule`` in the script makes a ``DDGEngine``, with the settings of the
``"ddg"`` block of its config, or the defaults.
"""

from __future__ import annotations

import importlib.util
import io
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ds_ddg.enable import swap

__all__ = ["main"]

_USAGE = """\
usage: python -m ds_ddg.run script.py [arguments of the script]
       python -m ds_ddg.run -m package.module [arguments of the module]

Runs a DeepSpeed script with the delayed schedule, as python itself would run it. Options that a launcher puts before
the script's name, such as --local_rank=N, go to the script.
"""


class _Command(NamedTuple):
    target: str
    is_module: bool
    arguments: list[str]
    """The script's own, those of the launcher first."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script named by the first argument that is no option, as ``python script.py ...`` would.

    The ``deepspeed`` launcher puts ``--local_rank=N`` before the script's name; the script finds it among its own.

    Raises:
        SystemExit: with a message, if there is no script to run.
    """
    command = _parse(list(sys.argv[1:] if arguments is None else arguments))
    run = _run_module if command.is_module else _run_script
    with swap():
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


def _run_script(script: str, arguments: list[str]) -> None:
    """What ``python script.py`` does; ``runpy.run_path`` would make ``sys.argv[0]`` or ``__file__`` another path."""
    path = Path(script).absolute()
    if not path.is_file():
        raise SystemExit(f"ds_ddg.run: no script {script!r} in {Path.cwd()}; its own options go behind its name")
    with io.open_code(str(path)) as file:
        code = compile(file.read(), str(path), "exec", dont_inherit=True)
    sys.argv = [script, *arguments]
    if not sys.flags.safe_path:  # else there is no entry for the directory of what is run
        sys.path[0] = str(path.resolve().parent)
    module = ModuleType("__main__")
    module.__file__ = str(path)
    vars(module).update(__builtins__=__builtins__, __cached__=None)
    # It stays there, as the script's threads, pickles and atexit functions expect.
    sys.modules["__main__"] = module
    exec(code, vars(module))


def _run_module(name: str, arguments: list[str]) -> None:
    """What ``python -m name`` does."""
    try:
        found = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the package itself imports
        found = False
    if not found:
        raise SystemExit(f"ds_ddg.run: no module {name!r}; it is looked for in {Path.cwd()} and in sys.path")
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
