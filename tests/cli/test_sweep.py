"""A sweep over the trainer itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.stores import make_store

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_a_sweep_of_real_runs(tmp_path: Path) -> None:
    """The higher rate learns, the lower does not, and a batch that cannot be cut is named with the trainer's words."""
    pytest.importorskip("optuna", reason="the extra sweep")
    store = make_store(tmp_path / "store", documents=64, text_size=256, codebook_size=128, image_tokens=16)
    config = {
        "model": {"preset": "tiny_cm3leon", "vocab_size": 512, "sequence_length": 96},
        "data": {"mixture": [{"store": str(store)}], "packing": "whole", "workers": 0},
        "optimizer": {"schedule": {"warmup": 1}},
        "train": {"steps": 12, "micro_batch": 2, "global_batch": 4, "dtype": "fp32", "device": "cpu"},
        "checkpoint": {"every": 0},
        "log": {"every": 1, "tensorboard": False},
        "deepspeed": str(ROOT / "ds_configs/zero1.json"),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    sweep = {
        "out": str(tmp_path / "sweep"),
        "commands": [f"{sys.executable} -m megacm3.train {tmp_path}/config.yaml train.out={{out}} {{overrides}}"],
        "keys": {"optimizer.lr": [1.0e-9, 1.0e-2], "train.micro_batch": [2, 3]},
        "fixed": {"data.mixture": [{"store": str(store)}]},
        "last": 3,
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "tools/sweep.py", str(tmp_path / "sweep.yaml")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 trials done, 2 failed" in done.stdout
    assert "best: trial 2" in done.stdout and "optimizer.lr=0.01 train.micro_batch=2" in done.stdout
    failed = [line for line in done.stdout.splitlines() if line.startswith("failed: trial")]
    assert len(failed) == 2 and all("exit code 2" in line and "train.micro_batch" in line for line in failed)
