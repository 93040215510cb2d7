"""Fault 15: a signal to one rank stops all, once, after a save; a second one leaves at once and harms nothing."""

import os
import signal
import time
from pathlib import Path

import pytest

from megacm3.checkpoint.commit import discover, leftovers
from tests.helpers.runs import Job, start, the_error, train_ranks, write_config

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("signals"))


def steps(out: Path) -> list[str]:
    return [path.name for path in discover(out / "checkpoints")]


def wait_for(job: Job, path: Path) -> None:
    until = time.monotonic() + 200
    while not path.exists():
        assert job.look() and time.monotonic() < until, job.wait(1)
        time.sleep(0.05)


def test_15_a_signal_to_one_rank_in_a_step_saves_once_everywhere(config: Path, tmp_path: Path) -> None:
    keys, fault = ["checkpoint.every=0", "data.workers=1"], "gradient:rank=1:step=3:parameter=1:sigterm"
    error = the_error(train_ranks(config, tmp_path, *keys, fault=fault), 75)
    assert "stopped by a signal at step 3, saved" in error
    assert steps(tmp_path) == ["step_000003"] and not leftovers(tmp_path / "checkpoints")


@pytest.mark.parametrize("background", ["true", "false"])
def test_15_a_stop_whose_save_fails_does_not_say_that_it_saved(background: str, config: Path, tmp_path: Path) -> None:
    keys = ["checkpoint.every=2", "checkpoint.on_failure=continue", f"checkpoint.background={background}"]
    fault = "gradient:rank=1:step=3:parameter=1:sigterm;save.writing:rank=1:step=3:full"
    error = the_error(train_ranks(config, tmp_path, *keys, fault=fault), 4)
    assert "No space left on device" in error and steps(tmp_path) == ["step_000002"]


def test_15_a_signal_to_all_during_a_save_lets_it_end_first(config: Path, tmp_path: Path) -> None:
    slow = "save.writing:rank=1:step=2:sleep=0.2"
    fault = f"save.before_write:rank=0:step=2:sigterm;save.before_write:rank=1:step=2:sigterm;{slow}"
    the_error(train_ranks(config, tmp_path, fault=fault), 75)
    assert steps(tmp_path)[-1] == "step_000002" and len(steps(tmp_path)) == 2
    assert not leftovers(tmp_path / "checkpoints")


def test_15_a_signal_to_all_processes_of_the_job(config: Path, tmp_path: Path) -> None:
    """As Slurm and Ctrl-C do it: the loader's processes get it, too, and may not take the step from the ranks."""
    job = start(config, tmp_path, "checkpoint.every=2", "data.workers=2", "train.steps=100000")
    wait_for(job, tmp_path / "checkpoints/step_000004")
    job.look()
    assert len(job.family) >= 4, "no loader processes to be seen"
    for process in job.processes:
        os.killpg(process.pid, signal.SIGTERM)
    error = the_error(job.wait(), 75)
    stopped = int(error.split("at step ")[1].split(",")[0])
    assert steps(tmp_path)[0] == f"step_{stopped:06d}" and not leftovers(tmp_path / "checkpoints")


def test_15_a_second_signal_leaves_at_once(config: Path, tmp_path: Path) -> None:
    keys = ["checkpoint.background=false", "data.workers=1"]
    job = start(config, tmp_path, *keys, fault="output:rank=1:step=3:module=1:sleep=1000")
    wait_for(job, tmp_path / "checkpoints/step_000002")
    time.sleep(1.0)
    for _ in range(2):
        job.processes[0].send_signal(signal.SIGTERM)
        time.sleep(1.5)
    error = the_error(job.wait(20), 75)
    assert "by a second signal" in error and steps(tmp_path) == ["step_000002"]
