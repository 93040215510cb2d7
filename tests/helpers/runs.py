"""The trainer on ranks: `train_ranks(...)` is a launch to its end on forked ranks, `start(...)` one whose ranks can be
signalled meanwhile; `curve`, `parameters` and others read what a run left.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
import torch

from megacm3.faults import VARIABLE
from tests.helpers.distributed import ROOT, run_distributed
from tests.helpers.stores import make_store
from tests.helpers.tools import run_tool


@dataclass(frozen=True)
class Outcome:
    """How a rank left."""

    code: int
    """Exit code; -9 for a rank that was killed."""
    log: str
    """Its stdout and stderr."""

    @property
    def errors(self) -> list[str]:
        """Its error lines, as a user sees them."""
        return [line.removeprefix("error: ") for line in self.log.splitlines() if line.startswith("error: ")]


def write_config(folder: Path, **changes: str) -> Path:
    """A store of 64 small documents and a config over it: 8 steps of 8 sequences, saved every second one, with dropout,
    recompute and CM3 masks. changes: other sections of the YAML, by name.
    """
    store = make_store(folder / "store", documents=64, text_size=256, codebook_size=128, image_tokens=16)
    sections = {
        "model": "{preset: tiny_modern, layers: 2, dropout: 0.1, vocab_size: 512, sequence_length: 96}",
        "deepspeed": f"{ROOT}/ds_configs/zero1.json",
        "parallel": "{recompute: full}",
        "data": f"{{mixture: [{{store: {store}}}], packing: whole, workers: 0}}",
        "optimizer": "{lr: 1.0e-2, schedule: {warmup: 2}}",
        "train": "{steps: 8, micro_batch: 2, global_batch: 8, dtype: fp32, device: cpu}",
        "retrieval": "{documents: [1, 0, 0, 0]}",
        "checkpoint": "{every: 2, keep: 0}",
        "log": "{every: 1, tensorboard: false}",
    }
    path = folder / "config.yaml"
    path.write_text("".join(f"{name}: {text}\n" for name, text in (sections | changes).items()), encoding="utf-8")
    return path


def command(arguments: list[str], only: dict[int, list[str]], fault: str, limit: int) -> None:
    """What a forked rank does: the trainer's command line."""
    import resource

    from megacm3.command import run
    from megacm3.train import main

    os.environ[VARIABLE] = fault
    rank = int(os.environ["RANK"])
    sys.argv = ["megacm3.train", *arguments, *only.get(rank, [])]
    torch.set_num_threads(1)
    if limit and rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    run(main)


def train_ranks(
    config: Path,
    out: Path,
    *overrides: str,
    ranks: int = 2,
    fault: str = "",
    timeout: float = 240.0,
    only: dict[int, list[str]] | None = None,
    limit: int = 0,
) -> list[Outcome]:
    """Launch the trainer and wait for its end. Raises RankError when a rank hangs or leaves a process behind.

    only: further overrides of single ranks. limit: bytes of the longest file that rank 1 may write, 0 = any.
    """
    given = {"arguments": [str(config), f"train.out={out}", *overrides], "only": only or {}}
    found = run_distributed(command, ranks, timeout=timeout, exits=True, fault=fault, limit=limit, **given)
    return [Outcome(code, log) for code, log in found]


def tool(name: str, arguments: list[str], fault: str) -> tuple[int, str]:
    """A command of tools/ on a forked rank, which a fault may kill. It stands here and not in the test's module: the
    process that forks must not import what the tool does.
    """
    os.environ[VARIABLE] = fault
    return run_tool(name, *arguments)


def finished(outcomes: list[Outcome]) -> None:
    """Assert that every rank ended well."""
    assert [outcome.code for outcome in outcomes] == [0] * len(outcomes), outcomes


def the_error(outcomes: list[Outcome], code: int) -> str:
    """Assert that every rank left with this code, after one error line in all, and no traceback; that line."""
    assert [outcome.code for outcome in outcomes] == [code] * len(outcomes), outcomes
    assert not any("Traceback" in outcome.log for outcome in outcomes), outcomes
    (error,) = {line for outcome in outcomes for line in outcome.errors}
    return error


@dataclass
class Job:
    """Ranks that were started together as processes of their own."""

    processes: list[subprocess.Popen[bytes]]
    logs: list[IO[bytes]]
    family: set[psutil.Process] = field(default_factory=set)
    """All that the ranks started, as seen so far."""

    def look(self) -> bool:
        """Note the ranks' children; whether any rank is still there."""
        alive = [process for process in self.processes if process.poll() is None]
        for process in alive:
            try:
                self.family.update(psutil.Process(process.pid).children(recursive=True))
            except psutil.NoSuchProcess:
                continue
        return bool(alive)

    def wait(self, timeout: float = 200.0) -> list[Outcome]:
        """How each rank left. All must leave in time, and every process that they started."""
        until = time.monotonic() + timeout
        try:
            while self.look():
                assert time.monotonic() < until, f"still running after {timeout:.0f} s: {self._said()}"
                time.sleep(0.05)
            _, left = psutil.wait_procs(self.family, timeout=10)
            assert not left, f"left behind: {left}"
            return [Outcome(p.returncode, said) for p, said in zip(self.processes, self._said(), strict=True)]
        finally:
            for process in [*self.processes, *self.family]:
                if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
                    process.kill()
            for log in self.logs:
                log.close()

    def _said(self) -> list[str]:
        # The ranks write at these files' offsets: leave them alone.
        return [os.pread(log.fileno(), 1 << 20, 0).decode(errors="replace") for log in self.logs]


def start(
    config: Path, out: Path, *overrides: str, ranks: int = 2, fault: str = "", roots: dict[int, Path] | None = None
) -> Job:
    """Start the ranks of one job as a launcher does, without waiting for them. roots: other checkouts of some ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    shared = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", VARIABLE: fault}
    shared |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [sys.executable, "-W", "ignore", "-m", "megacm3.train", str(config), f"train.out={out}", *overrides]
    job = Job([], [tempfile.TemporaryFile() for _ in range(ranks)])
    for rank, log in enumerate(job.logs):
        own = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        root = (roots or {}).get(rank, ROOT)
        own["PYTHONPATH"] = str(root)
        job.processes.append(subprocess.Popen(words, cwd=root, env=own, stdout=log, stderr=log, start_new_session=True))
    return job


def lines(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curve(out: Path) -> list[tuple[Any, ...]]:
    """Step, losses, gradient norm and samples of every logged step: equal for runs that are the same run."""
    return [
        (line["step"], line["loss"], line["loss_position"], line["grad_norm"], line["samples"]) for line in lines(out)
    ]


def parameters(step: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every logical tensor of a checkpoint, whole, by kind and name."""
    from megacm3.checkpoint.boxes import whole
    from megacm3.checkpoint.reader import Checkpoint

    checkpoint, tensors = Checkpoint(step, verify="sha256"), {}
    for kind, dtype in checkpoint.kinds.items():
        for name, shape in checkpoint.shapes.items():
            tensors[kind, name] = torch.empty(shape, dtype=dtype)
            checkpoint.read(kind, name, whole(shape), tensors[kind, name])
    return tensors


def differing(first: Path, second: Path) -> list[tuple[str, str]]:
    """Tensors of two checkpoints that are not bitwise equal."""
    a, b = parameters(first), parameters(second)
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]
