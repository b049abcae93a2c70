"""Files of weights by all ranks at once: a directory has the old ones, then none for a moment, then all of the new.

each rank            its tensors -> .unfinished_weights/model-00002-of-00004.safetensors
the first, at last   old weights away; shards up; what names them, up last of all
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ds_ddg.extras import extra
from ds_ddg.models.ranks import all_or_none, gather, own_rank
from ds_ddg.models.weight_files import INDEX, SINGLE, WeightsError

__all__ = ["replace_weights"]

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

_UNFINISHED = ".unfinished_weights"
"""Name of the folder for unfinished files; no library looks for weights in it."""

_ADAPTER = "adapter_config.json"


def replace_weights(
    directory: Path,
    stage: int,
    state: Mapping[str, Tensor],
    describe: Callable[[Path], None],
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write the `state` of all ranks, in the order of their stages, and remove the weights of an earlier save.

    Args:
        directory: a folder on a file system that all ranks share.
        stage: stage of this rank; several ranks of a stage must write the same, or {} on all but one of them.
        state: tensors by their key in the files, on no other rank.
        describe: called on rank 0 with a folder, for files that belong beside the weights.
        max_shard_bytes: size above which a rank writes several files.

    Raises:
        WeightsError: a rank could not write; every rank raises it. The weights that were there are there still.
    """
    folder = directory / _UNFINISHED
    shards = _shards(state, max_shard_bytes)
    counts = sorted(gather((stage, own_rank(), len(shards))))
    total = sum(count for _, _, count in counts)
    before = sum(count for *place, count in counts if place < [stage, own_rank()])
    names = [
        SINGLE if total == 1 else f"model-{before + i + 1:05}-of-{total:05}.safetensors" for i in range(len(shards))
    ]
    all_or_none(lambda: _begin(directory, folder))
    try:
        all_or_none(lambda: _write(folder, dict(zip(names, shards, strict=True)), describe))
        where = gather(
            {
                key: (name, tensor.nbytes)
                for name, shard in zip(names, shards, strict=True)
                for key, tensor in shard.items()
            }
        )
        all_or_none(lambda: _finish(directory, folder, {key: place for part in where for key, place in part.items()}))
    finally:
        if own_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _begin(directory: Path, folder: Path) -> None:
    if own_rank() != 0:
        return
    if (directory / _ADAPTER).exists():
        raise WeightsError(
            f"{directory} has an {_ADAPTER}, by which transformers would read the weights of another model and not "
            "these; name another directory, or remove it"
        )
    shutil.rmtree(folder, ignore_errors=True)  # of a save that was killed
    folder.mkdir(parents=True)


def _write(folder: Path, shards: Mapping[str, Mapping[str, Tensor]], describe: Callable[[Path], None]) -> None:
    with extra("hf", "writing weights"):
        from safetensors.torch import save_file

    for name, shard in shards.items():
        save_file({key: _own(tensor) for key, tensor in shard.items()}, folder / name, metadata={"format": "pt"})
    if own_rank() == 0:
        describe(folder)


def _finish(directory: Path, folder: Path, where: Mapping[str, tuple[str, int]]) -> None:
    """Put the new files in place on rank 0; from here on only names change."""
    if own_rank() != 0:
        return
    shards = {name for name, _ in where.values()}
    if lost := sorted(name for name in shards if not (folder / name).is_file()):
        raise WeightsError(
            f"{folder} lacks {', '.join(lost[:4])}, which other ranks have written; name a directory that is the same "
            "on all machines"
        )
    last = SINGLE
    if shards != {SINGLE}:
        last = INDEX
        size = sum(size for _, size in where.values())
        content = {"metadata": {"total_size": size}, "weight_map": {key: name for key, (name, _) in where.items()}}
        (folder / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    # What names the weights goes first and comes last, so no reader ever takes old for new, or some for all. And the
    # name decides what a reader takes: what is left of an earlier save would win.
    for name in (SINGLE, INDEX):
        (directory / name).unlink(missing_ok=True)
    for old in directory.iterdir():
        if _SHARD.fullmatch(old.name):
            old.unlink()
    for new in sorted(folder.iterdir(), key=lambda file: file.name == last):
        new.replace(directory / new.name)


def _own(tensor: Tensor) -> Tensor:
    """Return `tensor` on the CPU with memory of its own, as engines keep weights as views into one buffer."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _shards(state: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = []
    left = -1
    for key, tensor in state.items():
        if tensor.nbytes > left or not shards:
            shards.append({})
            left = limit
        shards[-1][key] = tensor
        left -= tensor.nbytes
    return shards
