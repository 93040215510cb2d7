"""Faults 1 to 4 and 11: whatever dies or is damaged, a whole step remains, and nothing starts anew in silence."""

import os
import shutil
from pathlib import Path

import pytest

from megacm3.checkpoint.commit import discover, leftovers
from tests.helpers.runs import curve, differing, finished, the_error, train_ranks, write_config

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("commits"))


@pytest.fixture(scope="module")
def unbroken(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    finished(train_ranks(config, out))
    return out


def newest(out: Path) -> str:
    return discover(out / "checkpoints")[0].name


def test_01_a_rank_killed_while_it_writes_its_shard(config: Path, unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first, second = train_ranks(config, out, fault="save.writing:rank=1:step=4:kill9")
    assert (first.code, second.code) == (6, -9), (first, second)
    (error,) = first.errors
    assert error.startswith("rank 1 (") and "was lost: its process ended without a word" in error
    assert newest(out) == "step_000002"
    assert [path.name for path in leftovers(out / "checkpoints")] == [".step_000004.tmp"]
    again = train_ranks(config, out, "checkpoint.resume=required")
    finished(again)
    assert f"removed {out}/checkpoints/.step_000004.tmp, left by a save that did not finish" in again[0].log
    assert f"resumed {out}/checkpoints/step_000002" in again[0].log
    assert curve(out) == curve(unbroken) and not leftovers(out / "checkpoints")
    assert not differing(out / "checkpoints/step_000008", unbroken / "checkpoints/step_000008")


@pytest.mark.parametrize(
    ("point", "left"),
    [("save.before_rename", "step_000002"), ("save.before_pointer", "step_000004")],
)
def test_02_killed_around_the_rename(point: str, left: str, config: Path, unbroken: Path, tmp_path: Path) -> None:
    # Rank 0 alone stands there, and the others leave with it: all are dead before anything else is written.
    said = train_ranks(config, tmp_path / "run", fault=f"{point}:step=4:kill9")
    assert [outcome.code for outcome in said] == [-9, 6], said
    assert newest(tmp_path / "run") == left
    # The pointer is a hint: it names step 2 in both cases, and a wrong one changes nothing.
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_000002\n"
    (tmp_path / "run/checkpoints/latest").write_text("step_000099\n")
    again = train_ranks(config, tmp_path / "run", "checkpoint.resume=required")
    finished(again)
    assert f"resumed {tmp_path}/run/checkpoints/{left}" in again[0].log
    assert curve(tmp_path / "run") == curve(unbroken)
    assert not differing(tmp_path / "run/checkpoints/step_000008", unbroken / "checkpoints/step_000008")
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").glob(".*")) == []


@pytest.fixture
def copy(unbroken: Path, tmp_path: Path) -> Path:
    """A finished run that may be damaged."""
    return Path(shutil.copytree(unbroken, tmp_path / "run"))


@pytest.mark.parametrize("how", ["one byte short", "one bit flipped"])
def test_03_a_shard_is_changed_after_the_commit(how: str, copy: Path, config: Path, unbroken: Path) -> None:
    shard = copy / "checkpoints/step_000006/rank_00001.safetensors"
    shutil.rmtree(copy / "checkpoints/step_000008")
    if how == "one byte short":
        size = shard.stat().st_size
        os.truncate(shard, size - 1)
        again = train_ranks(config, copy, "checkpoint.resume=required")
        finished(again)
        # Seen when steps are listed: said, with path, found and expected size, and the older one is taken.
        assert f"checkpoint left out: {shard} has {size - 1} bytes; its manifest says {size}" in again[0].log
        assert "step_000004: step 4" in again[0].log
        assert curve(copy) == curve(unbroken)
        return
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(bytes(data))
    again = train_ranks(config, copy, "checkpoint.resume=required")
    error = the_error(again, 4)
    assert error.startswith(f"{shard} is damaged: sha256 ") and "its manifest says" in error
    assert "remove step_000006 to go on from step_000004, the newest older valid step" in error
    assert newest(copy) == "step_000006"  # nothing was changed


def test_03_a_step_that_is_asked_for_is_that_one_or_none(copy: Path, config: Path, unbroken: Path) -> None:
    folder = copy / "checkpoints"
    os.truncate(folder / "step_000004/rank_00001.safetensors", 1000)
    error = the_error(train_ranks(config, copy, "checkpoint.step=4"), 4)
    assert f"checkpoint.step = 4, but {folder}/step_000004 is not a valid checkpoint" in error
    assert newest(copy) == "step_000008"  # nothing was changed
    again = train_ranks(config, copy, "checkpoint.step=2")
    finished(again)
    assert f"resumed {folder}/step_000002" in again[0].log
    assert sorted(path.name for path in folder.glob("*.aside")) == ["step_000006.aside", "step_000008.aside"]
    assert curve(copy) == curve(unbroken)
    assert not differing(folder / "step_000008", unbroken / "checkpoints/step_000008")


def test_04_a_rank_s_shard_is_deleted(copy: Path, config: Path, unbroken: Path) -> None:
    shard = copy / "checkpoints/step_000008/rank_00001.safetensors"
    shard.unlink()
    again = train_ranks(config, copy, "checkpoint.resume=required")
    finished(again)
    assert f"checkpoint left out: {shard} is missing" in again[0].log
    assert "step_000006: step 6" in again[0].log
    assert curve(copy) == curve(unbroken)
    assert not differing(copy / "checkpoints/step_000008", unbroken / "checkpoints/step_000008")


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "a half-written step"])
def test_11_required_but_there_is_none(left: str, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    if left != "nothing":
        (out / "checkpoints").mkdir(parents=True)
    if left == "a half-written step":
        (out / "checkpoints/step_000002").mkdir()
        (out / "checkpoints/step_000002/rank_00000.safetensors").write_bytes(b"x" * 100)
    error = the_error(train_ranks(config, out, "checkpoint.resume=required"), 4)
    assert "checkpoint.resume = required" in error and "checkpoint.resume=auto" in error
    assert not (out / "metrics.jsonl").exists()
    fresh = train_ranks(config, out, "train.stop_at=1")
    finished(fresh)
    said = [line for line in fresh[0].log.splitlines() if "starting from step 0" in line]
    assert len(said) == 1 and f"no checkpoint in {out}/checkpoints" in said[0]
