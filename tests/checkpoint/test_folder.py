"""A folder of checkpoints on its own: what is read as whole has been written at once."""

from __future__ import annotations

from pathlib import Path

import pytest

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
