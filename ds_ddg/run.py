"""Run an unchanged DeepSpeed script with the delayed schedule.

    deepspeed --module ds_ddg.run train.py --deepspeed_config ds.json
    torchrun --nproc-per-node 2 -m ds_ddg.run train.py ...
    accelerate launch -m ds_ddg.run train.py ...

Every ``deepspeed.initialize`` of a ``PipelineModule`` in the script makes a ``DDGEngine``, with the settings of the
``"ddg"`` block of its config, or the defaults.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_ddg.enable import swap

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script named by the first argument that is no option, as ``python script.py ...`` would.

    The ``deepspeed`` launcher puts ``--local_rank=N`` before the script's name; the script finds it among its own.

    Raises:
        SystemExit: with a message, if there is no script to run.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    place = next((i for i, argument in enumerate(given) if not argument.startswith("-")), None)
    if place is None:
        raise SystemExit("usage: python -m ds_ddg.run script.py [arguments of the script]")
    script = given[place]
    if not Path(script).is_file():
        raise SystemExit(f"ds_ddg.run: no script {script!r} in {Path.cwd()}")
    sys.argv = [script, *given[:place], *given[place + 1 :]]
    sys.path[0] = str(Path(script).resolve().parent)
    with swap():
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
