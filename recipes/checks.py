"""Checks before the training of what would fail late, or at length; each error is a line that says what to do."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

from ds_ddg.config import DDGConfig
from ds_ddg.engine.compatibility import refuse_unsupported
from recipes.common import on_every_rank


def stages(asked: int | None) -> int:
    """Return the number of stages: `asked`, or one per process.

    Raises:
        SystemExit: the processes do not make whole pipelines of `asked` stages.
    """
    processes = dist.get_world_size()
    if asked is None or processes % asked == 0:
        return asked or processes
    possible = " or ".join(str(n) for n in range(1, processes + 1) if processes % n == 0)
    raise SystemExit(
        f"--stages {asked} needs a multiple of {asked} processes, one for each stage of a pipeline, got {processes}; "
        f"start as many (--num_gpus {asked}), or use --stages {possible}"
    )


def folders(
    config: Mapping[str, Any], of_all_ranks: Mapping[str, Path | None], of_the_first: Mapping[str, Path | None]
) -> None:
    """Make the folders that results go to, and see that they can be written.

    Args:
        config: DeepSpeed's, as `common.read_config` returns it; its "ddg" block may name one.
        of_all_ranks: option -> folder, None if it was not given; every rank writes there.
        of_the_first: options and folders that only rank 0 writes to.

    Raises:
        SystemExit: a folder cannot be made or written; every rank raises it.
    """
    mine = {'"ddg": {"trace"}': DDGConfig.parse(config["ddg"]).trace, **of_all_ranks}
    if dist.get_rank() == 0:
        mine.update(of_the_first)
    with on_every_rank():
        for option, folder in mine.items():
            try:
                if folder is not None:
                    Path(folder).mkdir(parents=True, exist_ok=True)
                    # Permissions say less: root has all of them, also on a disk that is read-only or full.
                    with tempfile.TemporaryFile(dir=folder) as file:
                        file.write(b"?")
            except OSError as error:
                raise OSError(
                    f"{option}: cannot write to {str(folder)!r} ({error.strerror}); name a folder that can be made "
                    "and written"
                ) from None


def deepspeed_config(config: dict[str, Any], net: PipelineModule) -> DeepSpeedConfig:
    """Return `config` as DeepSpeed reads it.

    Raises:
        SystemExit: DeepSpeed finds it wrong, or ds_ddg cannot train `net` with it.
    """
    try:
        parsed = DeepSpeedConfig(config, net.mpu())
    except (AssertionError, DeepSpeedConfigError, ValueError) as error:  # assertions are how DeepSpeed checks it
        raise SystemExit(f"--deepspeed_config: {error}") from None
    try:
        refuse_unsupported(parsed, net, DDGConfig.parse(config["ddg"]).enabled)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    return parsed
