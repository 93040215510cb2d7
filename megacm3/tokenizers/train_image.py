"""Training of the image tokenizer: a `diffusers.VQModel` whose codebook is learned as moving averages, which is then
frozen, measured and hashed. Under torchrun every rank takes its part of each batch.
"""

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megacm3.command import seed_from
from megacm3.errors import Stopped
from megacm3.tokenizers.image import ImageTokenizer, save_image_tokenizer
from megacm3.tokenizers.image_config import ImageTokenizerConfig
from megacm3.tokenizers.image_metrics import evaluate, reconstruction_grid
from megacm3.tokenizers.image_trainer import Trainer
from megacm3.tokenizers.pictures import Pictures

logger = logging.getLogger(__name__)

_GRID_PICTURES = 16
_LOG_SECONDS = 10.0


@contextmanager
def ranks(device: str) -> Iterator[None]:
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """Set on Ctrl-C or SIGTERM, so that a run ends between two steps; torchrun passes both to every rank."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: asked.set()) for number in signals]
    try:
        yield asked
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _loop(trainer: Trainer, job: str) -> None:
    train = trainer.config.train
    began, before, logged = time.monotonic(), trainer.elapsed, time.monotonic()
    with _asked_to_stop() as asked:
        while trainer.progress() < 1.0:
            figures = trainer.train_step()
            trainer.elapsed, stop = _agree(before + time.monotonic() - began, asked.is_set(), trainer)
            if stop:
                trainer.save(job)
                raise Stopped(f"stopped after step {trainer.step}; run the same command again to continue")
            if trainer.step % train.save_every == 0:
                trainer.save(job)
            if time.monotonic() - logged > _LOG_SECONDS and trainer.rank == 0:
                logged = time.monotonic()
                left = trainer.elapsed * (1 - trainer.progress()) / max(trainer.progress(), 1e-9)
                losses = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
                logger.info("step %d, %s, %.0f s left", trainer.step, losses, left)
        trainer.save(job)


def _agree(seconds: float, stop: bool, trainer: Trainer) -> tuple[float, bool]:
    # All ranks must end at the same step: the slowest clock and any rank's wish to stop hold for all.
    if trainer.world == 1:
        return seconds, stop
    value = torch.tensor([seconds, float(stop)], dtype=torch.float64, device=trainer.device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value[0]), bool(value[1])


def train_image_tokenizer(
    config: ImageTokenizerConfig,
    pictures: Pictures,
    output: str | Path,
    *,
    job: str,
    inputs: dict[str, str] | None = None,
    held_out: Pictures | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """Train on pictures, continue where a stopped run of the same `job` was, write the folder `output`.

    The state lies in `output`.work until then. The folder gets report.json (also returned) and reconstructions.png, of
    `held_out` pictures where given. Raises Stopped after Ctrl-C or SIGTERM, Diverged, DataError.
    """
    work = Path(str(output).rstrip("/") + ".work")
    with ranks(config.train.device):
        trainer = Trainer(config, pictures, work)
        if trainer.load(job):
            logger.info("continuing at step %d", trainer.step)
        _loop(trainer, job)
        report: dict[str, Any] = {}
        if trainer.rank == 0:
            report = _finish(trainer, output, job, inputs or {}, held_out, replace)
        if trainer.world > 1:
            dist.barrier()
    return report


def _finish(
    trainer: Trainer, output: str | Path, job: str, inputs: dict[str, str], held_out: Pictures | None, replace: bool
) -> dict[str, Any]:
    config, pictures = trainer.config, trainer.pictures.pixels
    network = trainer.finish()
    tokenizer = ImageTokenizer(network, config.network.image_size, "")
    report: dict[str, Any] = {"steps": trainer.step, "seconds": round(trainer.elapsed, 1)}
    report["training"] = evaluate(tokenizer, pictures, _sample(len(pictures), config))
    shown = pictures[_sample(len(pictures), config)[:_GRID_PICTURES]]
    if held_out is not None:
        report["held_out"] = evaluate(tokenizer, held_out.pixels, _sample(len(held_out), config))
        shown = held_out.pixels[_sample(len(held_out), config)[:_GRID_PICTURES]]
    extra = {
        "report.json": (json.dumps(report, indent=1) + "\n").encode(),
        "reconstructions.png": reconstruction_grid(tokenizer, np.ascontiguousarray(shown)),
    }
    settings = {"job": job, "config": asdict(config)}
    save_image_tokenizer(
        network, config.network.image_size, output, settings=settings, inputs=inputs, extra=extra, replace=replace
    )
    return report


def _sample(count: int, config: ImageTokenizerConfig) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(seed_from("evaluate", config.train.seed)))
    return np.sort(generator.permutation(count)[: config.train.evaluate])
