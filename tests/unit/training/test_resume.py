"""Which step a start goes on from."""

import logging
import os
from pathlib import Path

import pytest

from megacm3.checkpoint.commit import discover
from megacm3.checkpoint.reader import KIND
from megacm3.config import CheckpointConfig
from megacm3.errors import CheckpointError, ConfigError
from megacm3.files import MANIFEST, read_json, write_manifest
from megacm3.resolve import load_config
from megacm3.training.resume import choose_step
from tests.helpers.checkpoints import tiny, write_random


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Steps 2, 4 and 6 of a run that never went back."""
    for step in (2, 4, 6):
        write(tmp_path, step)
    return tmp_path


def write(folder: Path, step: int, went_back: int = 0) -> None:
    path = folder / f"step_{step:06d}"
    write_random(tiny("tiny_modern"), path)
    manifest = read_json(path / MANIFEST)
    write_manifest(path, KIND, manifest["settings"] | {"state": {"went_back": went_back}}, {}, manifest["files"])


def names(folder: Path) -> list[str]:
    return [path.name for path in discover(folder)]


def test_the_newest_valid_one_or_none(folder: Path, tmp_path: Path) -> None:
    assert choose_step(folder, CheckpointConfig()) == folder / "step_000006"
    (folder / "step_000006/rank_00000.safetensors").unlink()
    assert choose_step(folder, CheckpointConfig(resume="required")) == folder / "step_000004"
    assert choose_step(tmp_path / "none", CheckpointConfig()) is None
    with pytest.raises(CheckpointError, match=r"resume = required, but .*none holds no valid checkpoint"):
        choose_step(tmp_path / "none", CheckpointConfig(resume="required"))


def test_a_run_that_begins_anew_leaves_no_other_run_s_steps_among_its_own(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A later start, a rollback or the retention would take step 6 for this run's newest."""
    assert choose_step(folder, CheckpointConfig(resume="never")) is None
    assert names(folder) == [] and len(list(folder.glob("step_*.aside"))) == 3
    assert "beginning anew (checkpoint.resume = never)" in caplog.text
    assert choose_step(folder, CheckpointConfig()) is None


def test_a_step_that_is_asked_for_is_never_another(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint.step = 3, but .*step_000003 is not .* step_000006, step_0"):
        choose_step(folder, CheckpointConfig(step=3))
    shard = folder / "step_000004/rank_00000.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"checkpoint.step = 4, .*valid ones: step_000006, step_000002"):
        choose_step(folder, CheckpointConfig(step=4))
    assert names(folder) == ["step_000006", "step_000002"]


def test_later_steps_are_set_aside_once_and_the_same_command_goes_on(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert choose_step(folder, CheckpointConfig(step=2)) == folder / "step_000002"
    assert names(folder) == ["step_000002"]
    assert sorted(path.name for path in folder.glob("*.aside")) == ["step_000004.aside", "step_000006.aside"]
    assert "going back to step 2" in caplog.text
    write(folder, 4, went_back=2)
    assert choose_step(folder, CheckpointConfig(step=2)) == folder / "step_000004"
    assert "went back there before" in caplog.text
    # After a start without the key, it means a second way back.
    write(folder, 6)
    assert choose_step(folder, CheckpointConfig(step=2)) == folder / "step_000002"
    assert (folder / "step_000004.aside2").is_dir() and (folder / "step_000006.aside2").is_dir()


def test_going_back_and_never_resuming_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.step = 4 with checkpoint.resume = never"):
        load_config(None, ["model.preset=tiny_modern", "checkpoint.step=4", "checkpoint.resume=never"])
