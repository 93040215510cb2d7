"""Faults 5, 6 and 25: a save that fails or must not happen."""

import threading
import time
from pathlib import Path

import pytest

from megacm3.checkpoint.commit import discover, leftovers
from tests.helpers.runs import finished, the_error, train_ranks, write_config

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("saves"))


def names(out: Path) -> list[str]:
    return [path.name for path in discover(out / "checkpoints")]


@pytest.mark.parametrize("how", ["at once", "in the middle of the file"])
def test_05_the_disk_is_full_in_a_save(how: str, config: Path, tmp_path: Path) -> None:
    """Rank 1 meets ENOSPC while it writes step 4; or no file of its may grow beyond 100 kB (RLIMIT_FSIZE)."""
    fault, limit = ("save.writing:rank=1:step=4:full", 0) if how == "at once" else ("", 100_000)
    reason = "No space left on device" if how == "at once" else "File too large"
    error = the_error(train_ranks(config, tmp_path / "stop", "train.steps=6", fault=fault, limit=limit), 4)
    assert reason in error
    assert names(tmp_path / "stop") == (["step_000002"] if how == "at once" else [])
    assert not leftovers(tmp_path / "stop/checkpoints")

    more = ["checkpoint.on_failure=continue", "train.steps=6"]
    said = train_ranks(config, tmp_path / "on", *more, fault=fault, limit=limit)
    if how == "at once":
        finished(said)
        assert "not saved: " in said[0].log and "training goes on" in said[0].log
        assert names(tmp_path / "on") == ["step_000006", "step_000002"]
    else:
        # The last save fails, too: a run that saved nothing does not end well.
        assert reason in the_error(said, 4) and said[0].log.count("not saved: ") == 2
    assert not leftovers(tmp_path / "on/checkpoints")


def test_06_a_folder_that_cannot_be_written_is_refused_at_the_start(config: Path, tmp_path: Path) -> None:
    error = the_error(train_ranks(config, Path("/proc/run")), 2)
    assert "/proc/run cannot be written" in error and "give another train.out" in error


def test_06_a_folder_that_vanishes_fails_the_save(config: Path, tmp_path: Path) -> None:
    """While rank 0 sleeps in step 4, a file takes the folder's place, as when a mount goes away."""
    folder = tmp_path / "run/checkpoints"

    def take_away() -> None:
        until = time.monotonic() + 60
        while not (folder / "latest").exists() and time.monotonic() < until:
            time.sleep(0.05)
        folder.rename(tmp_path / "gone")
        folder.write_text("")

    thief = threading.Thread(target=take_away)
    thief.start()
    fault = "batch:rank=0:step=4:sleep=3"
    said = train_ranks(config, tmp_path / "run", "checkpoint.background=false", fault=fault)
    thief.join()
    error = the_error(said, 4)
    assert f"{folder} cannot be written" in error and "give another train.out" in error
    assert [path.name for path in discover(tmp_path / "gone")] == ["step_000002"]


@pytest.mark.parametrize("layout", [["parallel.tensor=2"], []], ids=["tensor", "data"])
def test_25_replicas_that_differ_stop_the_run_before_a_save(config: Path, tmp_path: Path, layout: list[str]) -> None:
    out = tmp_path / "run"
    error = the_error(train_ranks(config, out, *layout, fault="replica:rank=1:step=4:perturb"), 4)
    assert "on rank 1 is not that of rank 0" in error and ".weight" in error
    assert names(out) == ["step_000002"]
