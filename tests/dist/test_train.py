"""The trainer as a command, on two real ranks: metrics, checkpoints, resume, stop, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megacm3.resolve import load_config
from tests.helpers.stores import make_store

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config over a store of 64 small documents."""
    folder = tmp_path_factory.mktemp("train")
    store = make_store(folder / "store", documents=64, text_size=256, codebook_size=128, image_tokens=16)
    path = folder / "config.yaml"
    path.write_text(
        f"""
model: {{preset: tiny_cm3leon, dropout: 0.1, vocab_size: 512, sequence_length: 96}}
deepspeed: {ROOT}/ds_configs/zero1.json
parallel: {{recompute: full}}
data: {{mixture: [{{store: {store}}}], packing: whole}}
optimizer: {{lr: 1.0e-2, schedule: {{warmup: 2}}}}
train: {{steps: 8, micro_batch: 2, global_batch: 8, dtype: fp32, device: cpu}}
checkpoint: {{every: 4, keep: 0}}
log: {{every: 1, tensorboard: false}}
""",
        encoding="utf-8",
    )
    return path


def _launch(config: Path, out: Path, *overrides: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["-m", "megacm3.train", str(config), f"train.out={out}", *overrides]
    if ranks == 1:
        command = [sys.executable, "-m", "megacm3.train", str(config), f"train.out={out}", *overrides]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _curve(out: Path) -> list[tuple[Any, ...]]:
    return [(line["step"], line["loss"], line["grad_norm"], line["samples"]) for line in _lines(out)]


def test_a_run_that_stops_and_resumes_is_the_unbroken_run(config: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert _launch(config, whole).returncode == 0
    assert _launch(config, parts, "train.stop_at=5").returncode == 0
    resumed = _launch(config, parts, "checkpoint.resume=required")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed" in resumed.stderr
    assert _curve(parts) == _curve(whole)
    assert [line["step"] for line in _lines(whole)] == list(range(1, 9))
    assert _lines(whole)[-1]["loss"] < _lines(whole)[0]["loss"]
    steps = sorted(path.name for path in (parts / "checkpoints").glob("step_*"))
    assert steps == ["step_000004", "step_000005", "step_000008"]
    saved = load_config(whole / "config.yaml", [])
    assert saved.model.dropout == 0.1


@pytest.mark.long
def test_one_process_reads_the_same_samples_and_sees_the_same_losses(config: Path, tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    assert _launch(config, two, "train.stop_at=3").returncode == 0
    alone = _launch(config, one, "train.stop_at=3", "data.workers=0", ranks=1)
    assert alone.returncode == 0, alone.stderr
    for left, right in zip(_lines(one), _lines(two), strict=True):
        assert left["samples"] == right["samples"]
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)


def test_a_signal_saves_and_leaves_with_75(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "megacm3.train", str(config), f"train.out={out}", "train.steps=100000"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (out / "metrics.jsonl").exists() or process.poll() is not None:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "saved" in errors
    assert list((out / "checkpoints").glob("step_*/manifest.json"))


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("train.global_btach=4", 2, ("train.global_btach", "train.global_batch")),
        ("train.global_batch=7", 2, ("7", "train.micro_batch", "nearest")),
        ("train.device=cuda", 2, ("cuda",)),
        ("checkpoint.resume=required", 4, ("required", "resume")),
        ("data.mixture=[{store: nowhere}]", 3, ("nowhere",)),
        ("parallel.tensor=3", 2, ("parallel.tensor = 3",)),
        ("deepspeed=missing.json", 2, ("missing.json",)),
    ],
)
def test_what_is_wrong_is_one_line_and_an_exit_code(
    config: Path, tmp_path: Path, override: str, code: int, words: tuple[str, ...]
) -> None:
    found = _launch(config, tmp_path / "out", override, ranks=1)
    assert found.returncode == code, found.stderr
    assert "Traceback" not in found.stderr
    error = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and all(word in error[0] for word in words), found.stderr
