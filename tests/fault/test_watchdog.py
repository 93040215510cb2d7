"""Faults 16 and 17: a rank dies, stalls or fails. Everyone leaves, in time, with one code and one error line."""

import os
import time
from pathlib import Path

import pytest

from tests.helpers.runs import finished, the_error, train_ranks, write_config

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("watchdog"))


@pytest.mark.parametrize("lost", [0, 1])
def test_16_a_killed_rank_is_named_and_the_job_ends(lost: int, config: Path, tmp_path: Path) -> None:
    said = train_ranks(config, tmp_path, "data.workers=1", fault=f"batch:rank={lost}:step=3:kill9")
    dead, other = said[lost], said[1 - lost]
    assert (dead.code, other.code) == (-9, 6), said
    (error,) = other.errors
    assert error.startswith(f"rank {lost} ") and "was lost: its process ended without a word" in error
    assert "of step" in error


def test_16_a_slow_rank_is_named_and_waited_for(config: Path, tmp_path: Path) -> None:
    limits = ["watchdog.warn=1", "watchdog.timeout=60", "train.steps=4"]
    said = train_ranks(config, tmp_path, *limits, fault="output:rank=1:step=3:module=1:sleep=4")
    finished(said)
    first, *_ = [line for line in said[0].log.splitlines() if "the others wait" in line]
    assert first.startswith("rank 1 ") and "is in forward of step 3 for" in first


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("output:rank=1:step=3:module=1:sleep=1000", "forward of step 3"),
        ("save.before_rename:step=2:sleep=1000", "save of step 2"),
    ],
)
def test_16_a_stalled_rank_ends_the_job_with_stacks(fault: str, where: str, config: Path, tmp_path: Path) -> None:
    limits = ["watchdog.warn=1", "watchdog.timeout=5", "data.workers=1", "checkpoint.background=false"]
    begun, stalled = time.monotonic(), 1 if "forward" in where else 0
    error = the_error(train_ranks(config, tmp_path, *limits, fault=fault), 6)
    assert time.monotonic() - begun < 60
    assert error.startswith(f"rank {stalled} ") and f"is in {where} for" in error and "watchdog.timeout" in error
    stacks = [(tmp_path / f"stacks/rank_0000{rank}.txt").read_text() for rank in (0, 1)]
    assert where in stacks[stalled] and "faults.py" in stacks[stalled]
    assert "distributed_c10d" in stacks[1 - stalled]


@pytest.mark.parametrize("how", ["refuses", "hangs"])
def test_16_a_stall_ends_the_job_where_no_stacks_can_be_written(how: str, config: Path, tmp_path: Path) -> None:
    """The file system may be what stalls."""
    folder = tmp_path / "stacks"
    if how == "refuses":
        folder.write_text("a file in the folder's place")
    else:
        folder.mkdir()
        os.mkfifo(folder / "rank_00000.txt")  # nobody reads: opening it never returns
    fault = "output:rank=1:step=3:module=1:sleep=1000"
    said = train_ranks(config, tmp_path, "watchdog.timeout=5", fault=fault, timeout=90)
    assert "is in forward of step 3" in the_error(said, 6)
    if how == "refuses":
        assert "no stacks in" in said[1].log and "faults.py" in said[1].log


@pytest.mark.parametrize("rank", [0, 1])
def test_17_the_first_error_is_the_one_that_is_printed(rank: int, config: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    said = train_ranks(config, tmp_path, fault=f"batch:rank={rank}:step=3:raise")
    assert the_error(said, 3) == "a fault on purpose at batch" and time.monotonic() - begun < 60
    assert len(said[rank].errors) == 1 and not said[1 - rank].errors
