"""A folder of checkpoints on its own: what is read as whole has been written at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ds_ddg.checkpoint import folder


def test_latest_is_renamed_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_latest(tmp_path, "one")
    assert folder.latest(tmp_path) == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]

    def full(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.write_latest(tmp_path, "two")
    assert folder.latest(tmp_path) == "one"


def test_the_tag_to_load(tmp_path: Path) -> None:
    assert folder.tag_to_load(tmp_path, None) is None
    (tmp_path / "one").mkdir()
    folder.write_latest(tmp_path, "one\n")
    assert folder.tag_to_load(tmp_path, None) == "one"
    with pytest.raises(FileNotFoundError, match=r"^there is no checkpoint 'two' in .*; name another by its tag$"):
        folder.tag_to_load(tmp_path, "two")
    for named in ("gone", ""):
        folder.write_latest(tmp_path, named)
        with pytest.raises(FileNotFoundError, match=f"latest names '{named}': there is no checkpoint '{named}' in"):
            folder.tag_to_load(tmp_path, None)
        assert folder.tag_to_load(tmp_path, "one") == "one"


def test_files_that_are_not_there_are_not_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    folder.flush([tmp_path / "there"])
    with pytest.raises(FileNotFoundError):
        folder.flush([tmp_path / "there", tmp_path / "gone"])


@pytest.mark.parametrize("old_format", [False, True], ids=["ZIP", "pickle"])
@pytest.mark.parametrize(
    ("content", "size"),
    [(lambda whole: b"", 0), (lambda whole: whole[:500], 500), (lambda whole: bytes(2000), 2000)],
    ids=["empty", "cut off", "never written"],
)
def test_damaged_files_of_tensors_are_told_from_whole_ones(
    tmp_path: Path, content: Callable[[bytes], bytes], size: int, old_format: bool
) -> None:
    file = tmp_path / "layer_07-model_states.pt"
    assert folder.damage(file) == "layer_07-model_states.pt is missing"
    torch.save({"weight": torch.zeros(300)}, file, _use_new_zipfile_serialization=not old_format)
    assert folder.damage(file) is None
    file.write_bytes(content(file.read_bytes()))
    damaged = f"layer_07-model_states.pt is damaged ({size} bytes, cut off or never written)"
    # What is left of a pickle begins like a whole one.
    assert folder.damage(file) == (None if old_format and size == 500 else damaged)
