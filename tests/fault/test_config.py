"""Configs that differ, between ranks or from the checkpoint's, and folders and ports that are taken."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megacm3.checkpoint.commit import discover
from megacm3.checkpoint.reader import Checkpoint
from tests.helpers.ranks import ROOT, errors, make_config, start

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_config(tmp_path_factory.mktemp("config"))


def test_ranks_that_were_started_differently_are_named(config: Path, tmp_path: Path) -> None:
    codes, said = start(config, tmp_path / "run", only={1: ["optimizer.lr=0.5", "train.seed=7"]}).wait(60)
    assert codes == [2, 2], said
    (error,) = errors(said)
    assert "optimizer.lr = 0.01 on rank 0, 0.5 on rank 1" in error and "train.seed = 0 on rank 0, 7 on rank 1" in error


def test_a_changed_key_is_refused_or_named_and_stored(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert start(config, out, "train.stop_at=2", ranks=1).wait()[0] == [0]
    codes, said = start(config, out, "model.ffn_size=192", "optimizer.lr=0.5", ranks=1).wait()
    assert codes == [4] and "model.ffn_size was" in errors(said)[0] and "start a new run" in errors(said)[0], said
    codes, said = start(config, out, "optimizer.lr=0.5", ranks=1).wait()
    assert codes == [4] and "optimizer.lr was 0.01, is now 0.5" in errors(said)[0], said
    assert "checkpoint.override" in errors(said)[0]
    named = ["optimizer.lr=0.5", "checkpoint.override=[optimizer.lr]", "train.stop_at=4"]
    codes, said = start(config, out, *named, ranks=1).wait()
    assert codes == [0] and "optimizer.lr was 0.01, is 0.5 from step 2 on" in said[0], said
    state = Checkpoint(discover(out / "checkpoints")[0]).state
    assert state["overrides"] == [{"key": "optimizer.lr", "was": 0.01, "now": 0.5, "step": 2}]


def test_a_folder_in_use_is_refused_and_a_dead_jobs_lock_is_taken_over(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = start(config, out, ranks=1, fault="batch:step=2:sleep=25")
    while not (out / ".lock").exists():
        assert first.processes[0].poll() is None
    codes, said = start(config, out, ranks=1).wait(60)
    assert codes == [2], said
    pid = json.loads((out / ".lock").read_text())["pid"]
    assert pid == first.processes[0].pid
    assert f"in use by process {pid} on {socket.gethostname()}" in errors(said)[0]
    first.processes[0].kill()
    first.wait()
    assert (out / ".lock").exists()
    codes, said = start(config, out, "train.stop_at=2", ranks=1).wait()
    assert codes == [0] and "taken over" in said[0], said
    assert not (out / ".lock").exists()


def test_a_port_in_use_is_one_line(config: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        environment = os.environ | where | {"MASTER_PORT": str(taken.getsockname()[1]), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "ignore", "-m", "megacm3.train", str(config), f"train.out={tmp_path}/run"]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 2 and "Traceback" not in found.stderr, found.stderr
    (error,) = errors([found.stderr])
    assert "cannot meet at 127.0.0.1" in error and "master_port" in error
