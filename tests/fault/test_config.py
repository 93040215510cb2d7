"""Faults 10, 23 and 24: configs that differ, from the checkpoint's or between ranks; folders and ports in use."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megacm3.checkpoint.commit import discover
from megacm3.checkpoint.reader import Checkpoint
from tests.helpers.distributed import ROOT
from tests.helpers.runs import finished, start, the_error, train_ranks, write_config

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


def test_10_a_changed_key_is_refused_or_named_and_stored(config: Path, tmp_path: Path) -> None:
    out, lr = tmp_path / "run", "optimizer.lr=0.5"
    finished(train_ranks(config, out, "train.stop_at=2", ranks=1))
    error = the_error(train_ranks(config, out, "model.ffn_size=224", lr), 4)
    assert "model.ffn_size was" in error and "is now 224" in error and "start a new run" in error
    error = the_error(train_ranks(config, out, lr), 4)
    assert "optimizer.lr was 0.01, is now 0.5" in error and "checkpoint.override" in error
    weight = f"data.mixture=[{{store: {config.parent}/store, weight: 2.0}}]"
    error = the_error(train_ranks(config, out, weight), 4)
    assert "data.mixture.0.weight was 1.0, is now 2.0" in error and "checkpoint.override" in error
    named = [lr, weight, "checkpoint.override=[optimizer.lr,data.mixture]", "train.stop_at=4"]
    said = train_ranks(config, out, *named, ranks=1)
    finished(said)
    assert "optimizer.lr was 0.01, is 0.5 from step 2 on" in said[0].log
    assert Checkpoint(discover(out / "checkpoints")[0]).state["overrides"] == [
        {"key": "data.mixture.0.weight", "was": 1.0, "now": 2.0, "step": 2},
        {"key": "optimizer.lr", "was": 0.01, "now": 0.5, "step": 2},
    ]


def test_23_ranks_with_other_configs_are_named(config: Path, tmp_path: Path) -> None:
    only = {1: ["optimizer.lr=0.5", "train.seed=7"]}
    error = the_error(train_ranks(config, tmp_path / "run", only=only), 2)
    assert "optimizer.lr = 0.01 on rank 0, 0.5 on rank 1" in error and "train.seed = 0 on rank 0, 7 on rank 1" in error
    assert not (tmp_path / "run").exists()


def test_23_a_rank_with_other_code_is_named(config: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "megacm3", tmp_path / "other/megacm3", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "ds_configs", tmp_path / "other/ds_configs")
    with (tmp_path / "other/megacm3/files.py").open("a") as file:
        file.write("# another version\n")
    said = start(config, tmp_path / "run", roots={1: tmp_path / "other"}).wait()
    error = the_error(said, 2)
    assert "code of megacm3 = " in error and "on rank 0" in error and "on rank 1" in error


def test_24_a_folder_in_use_is_refused_and_a_dead_jobs_lock_is_taken_over(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = start(config, out, ranks=1, fault="batch:step=2:sleep=1000")
    while not (out / ".lock").exists():
        assert first.look(), first.wait()
        time.sleep(0.05)
    error = the_error(train_ranks(config, out), 2)
    pid = first.processes[0].pid
    assert json.loads((out / ".lock").read_text())["pid"] == pid
    assert f"in use by process {pid} on {socket.gethostname()}" in error
    first.processes[0].kill()
    first.wait()
    assert (out / ".lock").exists()
    said = train_ranks(config, out, "train.stop_at=2")
    finished(said)
    assert f"process {pid} on {socket.gethostname()} is dead" in said[0].log and "taken over" in said[0].log
    assert not (out / ".lock").exists()


def test_24_a_port_in_use_is_one_line(config: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        environment = os.environ | where | {"MASTER_PORT": str(taken.getsockname()[1]), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "ignore", "-m", "megacm3.train", str(config), f"train.out={tmp_path}/run"]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 2 and "Traceback" not in found.stderr, found.stderr
    (error,) = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot meet at 127.0.0.1" in error and "master_port" in error


def test_06_a_folder_in_a_files_place_is_one_line_and_one_code(config: Path, tmp_path: Path) -> None:
    (tmp_path / "run/metrics.jsonl").mkdir(parents=True)
    error = the_error(train_ranks(config, tmp_path / "run"), 3)
    assert error == f"{tmp_path}/run/metrics.jsonl: Is a directory"


IMPATIENT = """
import datetime, functools, sys
import deepspeed
from megacm3.command import run
from megacm3.train import main
deepspeed.init_distributed = functools.partial(deepspeed.init_distributed, timeout=datetime.timedelta(seconds=2))
run(main)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_16_a_machine_that_does_not_come_is_a_lost_rank(rank: int, config: Path, tmp_path: Path) -> None:
    """As when it is replaced: the restart loops of the recipes go on after this code, and not after others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment = os.environ | where | {"MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", IMPATIENT, str(config), f"train.out={tmp_path}/run"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 6 and "Traceback" not in found.stderr, found.stderr
    (error,) = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert f"rank {rank} of 2 did not meet all others at 127.0.0.1:{port}" in error


def test_24_half_an_environment_of_a_launcher_is_one_line(config: Path, tmp_path: Path) -> None:
    environment = {name: text for name, text in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megacm3.train", str(config), f"train.out={tmp_path}/run"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 2 and "Traceback" not in found.stderr, found.stderr
    assert "error: WORLD_SIZE = 2 is set, but RANK, LOCAL_RANK is not" in found.stderr
