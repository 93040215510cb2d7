"""How long a background save takes, beside writing the same bytes with `dd`."""

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megacm3.checkpoint.store import Saver
from megacm3.parallel.engine import Engine
from megacm3.resolve import load_config

SIZES = ["model.hidden_size=1024", "model.heads=8", "model.kv_heads=8", "model.ffn_size=4096", "model.layers=14"]
"""180 million parameters: 2.1 GB of fp32 values and moments."""


@dataclass(frozen=True)
class SaveTiming:
    """Medians over the rounds."""

    bytes: int
    save: float
    """Seconds from the call to the commit, every file hashed, fsynced and renamed."""
    stall: float
    """Seconds of these that the training waits."""
    dd: float
    """Seconds of `dd bs=64M conv=fsync` for the same bytes on the same disk."""
    direct_dd: float
    """The same with `oflag=direct`, past the page cache, as saves write."""


def _engine() -> Engine:
    import deepspeed

    from megacm3.parallel.context import build_context

    config = load_config(
        None,
        [
            "model.preset=tiny_cm3leon",
            "model.sequence_length=32",
            "train.steps=9",
            "train.dtype=fp32",
            "train.micro_batch=1",
            "train.global_batch=1",
            *SIZES,
        ],
    )
    deepspeed.init_distributed("gloo", verbose=False)
    context = build_context(config, torch.device("cpu"))
    engine = Engine(config, context, torch.zeros(config.model.vocab_size, dtype=torch.uint8))
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    engine.train_step(
        [
            {
                "tokens": tokens,
                "targets": tokens,
                "documents": torch.zeros(1, 32, dtype=torch.int32),
                "numbers": torch.zeros(1, dtype=torch.int64),
            }
        ]
    )
    return engine


def _dd(path: Path, size: int, *flags: str) -> float:
    begun = time.monotonic()
    block = 1 << 26
    command = ["dd", "if=/dev/zero", f"of={path}", f"bs={block}", f"count={-(-size // block)}", "conv=fsync", *flags]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - begun
    path.unlink()
    return seconds


def benchmark_checkpoint(work: Path, rounds: int, report: Callable[[str], None]) -> SaveTiming:
    """Save a model in the background and run dd, in turns, `rounds` times. One process; `work` is removed."""
    work.mkdir(parents=True)
    engine = _engine()
    saver = Saver(engine, engine.context, work, keep=1)
    saves, stalls, dds, direct_dds, size = [], [], [], [], 0
    try:
        for turn in range(rounds + 1):  # the first save makes the copies' memory, as in a run; it is not counted
            saver.start(turn, {}, background=True)
            while saver.poll() is None:
                time.sleep(0.005)
            saver.close()
            size = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
            shutil.rmtree(work / f"step_{turn:06d}")
            dd, direct = _dd(work / "dd", size), _dd(work / "dd", size, "oflag=direct")
            report(
                f"save {saver.total:.2f} s, of which stall {saver.stall:.2f} s; dd {dd:.2f} s, direct {direct:.2f} s"
            )
            if turn:
                saves.append(saver.total)
                stalls.append(saver.stall)
                dds.append(dd)
                direct_dds.append(direct)
    finally:
        shutil.rmtree(work)
    return SaveTiming(size, *(statistics.median(values) for values in (saves, stalls, dds, direct_dds)))
