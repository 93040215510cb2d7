"""The trainer's ranks as bare processes, without a launcher: so that each one's exit code and words can be seen."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.helpers.stores import make_neighbours, make_store

ROOT = Path(__file__).resolve().parents[2]


def make_config(folder: Path, *, retrieval: bool = False) -> Path:
    """A config over a store of 64 small documents: two layers, dropout, recomputation, CM3, retrieval."""
    store = make_store(folder / "store", documents=64, text_size=256, codebook_size=128, image_tokens=16)
    neighbours = make_neighbours(folder, store, 64) if retrieval else '""'
    path = folder / "config.yaml"
    path.write_text(
        f"""
model: {{preset: tiny_cm3leon, dropout: 0.1, vocab_size: 512, sequence_length: 96}}
deepspeed: {ROOT}/ds_configs/zero1.json
parallel: {{recompute: full}}
data: {{mixture: [{{store: {store}, neighbours: {neighbours}}}], packing: whole, workers: 0}}
retrieval: {{documents: [0.25, 0.25, 0.25, 0.25]}}
optimizer: {{lr: 1.0e-2, schedule: {{warmup: 2}}}}
train: {{steps: 8, micro_batch: 2, global_batch: 8, dtype: fp32, device: cpu}}
checkpoint: {{every: 2, keep: 0}}
log: {{every: 1, tensorboard: false}}
""",
        encoding="utf-8",
    )
    return path


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Job:
    """Ranks that were started together."""

    processes: list[subprocess.Popen[str]]

    def wait(self, timeout: float = 120.0) -> tuple[list[int], list[str]]:
        """Exit codes and stderr by rank; every rank, and every process that it started, must have ended."""
        family = [child for p in self.processes if p.poll() is None for child in _children(p.pid)]
        until = time.monotonic() + timeout
        try:
            said = [p.communicate(timeout=max(1.0, until - time.monotonic()))[1] for p in self.processes]
            _, alive = psutil.wait_procs(family, timeout=10)
            assert not alive, f"left behind: {alive}"
            return [p.returncode for p in self.processes], said
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def start(
    config: Path, out: Path, *overrides: str, ranks: int = 2, fault: str = "", only: dict[int, list[str]] | None = None
) -> Job:
    """Start the ranks of one job. only: further overrides of single ranks."""
    port, processes = free_port(), []
    for rank in range(ranks):
        own = (only or {}).get(rank, [])
        command = [sys.executable, "-W", "ignore", "-m", "megacm3.train", str(config), f"train.out={out}"]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "MEGACM3_FAULT": fault,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        processes.append(
            subprocess.Popen([*command, *overrides, *own], env=environment, stderr=subprocess.PIPE, text=True)
        )
    return Job(processes)


def errors(said: list[str]) -> list[str]:
    """The error lines of all ranks."""
    return [line for text in said for line in text.splitlines() if line.startswith("error: ")]
