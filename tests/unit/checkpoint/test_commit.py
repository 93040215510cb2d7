import json
import logging
import shutil
from pathlib import Path

import pytest

from megacm3.checkpoint import commit
from megacm3.checkpoint.commit import begin, clear_leftovers, discover, leftovers, temporary_folder
from megacm3.errors import CheckpointError


def make(folder: Path, step: int, keep: int = 0, text: str = "data") -> Path:
    temporary = begin(folder, step, 1)
    (temporary / "rank_00000.safetensors").write_text(text)
    commit.remove_retired(commit.commit(folder, step, {"step": step}, {}, {}, keep))
    return folder / commit.step_name(step)


def names(folder: Path) -> list[str]:
    return [path.name for path in discover(folder)]


def test_steps_are_found_newest_first_by_number(tmp_path: Path) -> None:
    for step in (9, 1_000_000, 200):
        make(tmp_path, step)
    assert names(tmp_path) == ["step_1000000", "step_000200", "step_000009"]
    assert (tmp_path / "latest").read_text() == "step_000200\n"  # a hint: the last written
    assert discover(tmp_path / "nowhere") == []


def test_what_is_not_valid_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    (tmp_path / "step_000003" / "manifest.json").unlink()
    (tmp_path / "step_000002" / "rank_00000.safetensors").write_text("longer data")
    (tmp_path / "step_abc").mkdir()
    (tmp_path / "step_000009").write_text("a file")
    assert names(tmp_path) == ["step_000001"]
    assert "step_000003 has no manifest.json" in caplog.text and "11 bytes; its manifest says 4" in caplog.text


def test_leftovers_of_dead_saves_are_removed_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, 1)
    (begin(tmp_path, 2, 1) / "rank_00000.safetensors").write_text("half")
    assert names(tmp_path) == ["step_000001"] and leftovers(tmp_path) == [temporary_folder(tmp_path, 2)]
    clear_leftovers(tmp_path)
    assert not leftovers(tmp_path) and ".step_000002.tmp, left by a save that did not finish" in caplog.text
    assert names(tmp_path) == ["step_000001"]


def test_a_step_written_anew_replaces_the_old_one(tmp_path: Path) -> None:
    make(tmp_path, 1, text="old")
    make(tmp_path, 1, text="new")
    assert (tmp_path / "step_000001" / "rank_00000.safetensors").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000001"]


def test_dying_between_the_two_renames_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, 1, text="old")
    (tmp_path / "step_000001").rename(tmp_path / ".step_000001.old")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["step_000001"] and "was put back" in caplog.text


def test_retention(tmp_path: Path) -> None:
    for step in range(1, 6):
        make(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_000005", "step_000004"]
    # What is damaged does not count as kept, and is not removed either.
    (tmp_path / "step_000005" / "manifest.json").write_text("{")
    make(tmp_path, 6, keep=2)
    assert names(tmp_path) == ["step_000006", "step_000004"] and (tmp_path / "step_000005").is_dir()
    # The step just written stays, whatever its number.
    make(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step_000002"]


def test_a_file_that_is_gone_or_shorter_at_the_commit_costs_no_older_step(tmp_path: Path) -> None:
    make(tmp_path, 1)
    for found in (None, "dat"):
        temporary = begin(tmp_path, 2, 1)
        if found is not None:
            (temporary / "rank_00001.safetensors").write_text(found)
        files = {"rank_00001.safetensors": {"bytes": 4, "sha256": "0"}}
        with pytest.raises(CheckpointError, match=r"rank_00001\.safetensors was written with 4 bytes, but"):
            commit.commit(tmp_path, 2, {"step": 2}, {}, files, keep=1)
        assert names(tmp_path) == ["step_000001"]


def test_a_pointer_that_cannot_be_written_costs_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, 1)
    monkeypatch.setenv("MEGACM3_FAULT", "save.before_pointer:step=2:full")
    make(tmp_path, 2)
    assert [path.name for path in discover(tmp_path)] == ["step_000002", "step_000001"]
    assert (tmp_path / "latest").read_text() == "step_000001\n" and "is committed, but" in caplog.text


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=commit.SPARE_BYTES + 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    begin(tmp_path, 1, 10)
    with pytest.raises(CheckpointError, match=r"2\.000 GB does not fit in .*: 0\.067 GB are free; free space, lower"):
        begin(tmp_path, 2, 2_000_000_000)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written: .*; give another train\.out"):
        begin(tmp_path / "file" / "checkpoints", 1, 1)


def test_manifest_of_another_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make(tmp_path, 1) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kind": "store"}))
    with caplog.at_level(logging.WARNING):
        assert names(tmp_path) == []
    assert "is of kind 'store'; expected 'checkpoint'" in caplog.text
