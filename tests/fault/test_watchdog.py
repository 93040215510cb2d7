"""A rank that dies, stalls or fails: everyone leaves, in time, with the right code and one error line."""

import time
from pathlib import Path

import pytest

from megacm3.checkpoint.commit import discover
from tests.helpers.ranks import errors, make_config, start

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_config(tmp_path_factory.mktemp("watchdog"))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_ends_the_job_and_is_named(config: Path, tmp_path: Path, lost: int) -> None:
    job = start(config, tmp_path / "run", "data.workers=1", fault=f"batch:rank={lost}:step=3:kill9")
    codes, said = job.wait()
    assert codes[lost] == -9 and codes[1 - lost] == 6, said
    (error,) = errors(said)
    assert f"rank {lost}" in error and "was lost" in error and "of step" in error
    assert discover(tmp_path / "run/checkpoints")[0].name == "step_000002"


def test_a_slow_rank_is_named_and_waited_for(config: Path, tmp_path: Path) -> None:
    limits = ["watchdog.warn=1", "watchdog.timeout=60", "train.steps=4"]
    codes, said = start(config, tmp_path / "run", *limits, fault="output:rank=1:step=3:module=1:sleep=4").wait()
    assert codes == [0, 0], said
    assert "rank 1" in said[0] and "in forward of step 3" in said[0]


def test_a_stalled_rank_ends_the_job_with_stacks(config: Path, tmp_path: Path) -> None:
    limits = ["watchdog.warn=1", "watchdog.timeout=5", "data.workers=1"]
    begun = time.monotonic()
    job = start(config, tmp_path / "run", *limits, fault="output:rank=1:step=3:module=1:sleep=1000")
    codes, said = job.wait()
    assert codes == [6, 6] and time.monotonic() - begun < 60, said
    (error,) = errors(said)
    assert "rank 1" in error and "in forward of step 3" in error and "watchdog.timeout" in error
    stacks = [(tmp_path / f"run/stacks/rank_0000{rank}.txt").read_text() for rank in (0, 1)]
    assert "forward of step 3" in stacks[1] and "faults.py" in stacks[1]
    assert "train_step" in stacks[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_error_is_the_one_that_is_printed(config: Path, tmp_path: Path, rank: int) -> None:
    codes, said = start(config, tmp_path / "run", fault=f"batch:rank={rank}:step=3:raise").wait(60)
    assert codes == [3, 3], said
    assert errors(said) == ["error: a fault on purpose at batch"]
    assert "error: " in said[rank] and not any("Traceback" in text for text in said)
