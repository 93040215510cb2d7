"""How near pretokenization comes to what the cores can give."""

import io
import os
import shutil
import statistics
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacm3.command import seed_from

_SIDE = 512
"""Side of the JPEGs: large enough that decoding matters."""


@dataclass(frozen=True)
class PretokenizeRound:
    """Bare parts and a job, one after the other."""

    decode: float
    """Seconds to open, decode and resize a picture, one thread."""
    encode: float
    """Seconds to encode a picture in batches of 32, one thread."""
    rate: float
    """Pictures a second of the whole job: plan, workers, units and store."""


@dataclass(frozen=True)
class PretokenizeTiming:
    """What was measured."""

    pictures: int
    """Of each job."""
    cores: int
    rounds: list[PretokenizeRound]
    together: float
    """Pictures a second of bare decoding and encoding in a process on every core at once, nothing else."""

    def ceiling(self, one: PretokenizeRound) -> float:
        """Pictures a second that the cores could give: cores / (decode + encode)."""
        return self.cores / (one.decode + one.encode)

    @property
    def share(self) -> float:
        """The job's rate over the ceiling, median of the rounds."""
        return statistics.median(one.rate / self.ceiling(one) for one in self.rounds)


def benchmark_pretokenize(work: Path, pictures: int = 8000, rounds: int = 3, shards: int = 8) -> PretokenizeTiming:
    """Pretokenize random 512-pixel JPEGs with a 64-pixel encoder of 0.3M parameters, in turns with its bare parts.

    Files go below `work`, which is removed afterwards.
    """
    from megacm3.data.executors import ExecutorOptions
    from megacm3.data.pretokenize import PretokenizeOptions, pretokenize

    cores = len(os.sched_getaffinity(0))
    work.mkdir(parents=True)
    try:
        _tokenizers(work)
        sample = [_jpeg(n) for n in range(200)]
        for shard in range(shards):
            _write_shard(work / "in" / f"{shard:05d}.tar", range(shard, pictures, shards), sample)
        for core in range(cores):
            _write_shard(work / "warm" / f"{core}.tar", range(core, 2 * cores, cores), sample)

        def job(name: str) -> float:
            inputs, text, image, output = (str(work / part) for part in (name, "text", "image", "store"))
            began = time.perf_counter()
            pretokenize(PretokenizeOptions((inputs,), text, image, output, where=ExecutorOptions(workers=cores)))
            seconds = time.perf_counter() - began
            shutil.rmtree(output)
            return seconds

        # The first job starts the server that workers are forked from, with its imports (one worker would need none).
        job("warm")
        together = _bare_together(sample, work / "image", cores)
        measured = []
        for _ in range(rounds):
            bare = _bare(sample, work / "image")
            measured.append(PretokenizeRound(*bare, pictures / job("in")))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return PretokenizeTiming(pictures, cores, measured, together)


_PASSES = 3


def _bare(sample: list[bytes], tokenizer: Path, start: Any = None) -> tuple[float, float]:
    """Seconds a picture to decode, and to encode, in one thread: medians of some passes over `sample`.

    With the memory settings of a worker, which speed the encoder up.
    """
    import torch

    from megacm3.data.executors import keep_freed_memory
    from megacm3.data.images import open_image, prepare_image
    from megacm3.tokenizers.image import ImageTokenizer

    keep_freed_memory()
    torch.set_num_threads(1)
    network = ImageTokenizer.load(tokenizer)
    network.encode(np.zeros((32, 64, 64, 3), np.uint8))
    if start is not None:
        start.wait()
    seconds = []
    for _ in range(_PASSES):
        began = time.perf_counter()
        pixels = [prepare_image(open_image(data), 64) for data in sample]
        decoded = time.perf_counter()
        for first in range(0, len(pixels), 32):
            network.encode(np.stack(pixels[first : first + 32]))
        seconds.append(((decoded - began) / len(sample), (time.perf_counter() - decoded) / len(sample)))
    return statistics.median(s[0] for s in seconds), statistics.median(s[1] for s in seconds)


def _bare_together(sample: list[bytes], tokenizer: Path, cores: int) -> float:
    # Cores share caches and, as hyper-threads, arithmetic units: together they give less than so many times one.
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        start = manager.Barrier(cores)
        with ProcessPoolExecutor(cores, context) as pool:
            running = [pool.submit(_bare, sample, tokenizer, start) for _ in range(cores)]
            return sum(1 / sum(job.result()) for job in running)


def _tokenizers(work: Path) -> None:
    import torch

    from megacm3.tokenizers.image import save_image_tokenizer
    from megacm3.tokenizers.image_config import NetworkConfig
    from megacm3.tokenizers.image_network import build_network
    from megacm3.tokenizers.text import train_text_tokenizer

    train_text_tokenizer([_caption(n) for n in range(200)], 512, work / "text")
    torch.manual_seed(seed_from("benchmark"))
    config = NetworkConfig(64, [16, 32, 48, 64], 1, [], False, 32, 512, 16, norm_groups=8)
    save_image_tokenizer(build_network(config), 64, work / "image")


def _caption(number: int) -> str:
    return f"picture number {number} of a benchmark, with a caption of common length"


def _jpeg(number: int) -> bytes:
    from PIL import Image

    rng = np.random.default_rng(seed_from("benchmark picture", number))
    # Coarse shapes with some noise compress as photographs do, to about 60 kB.
    shapes = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((_SIDE, _SIDE), 3)
    noisy = np.asarray(shapes) + rng.normal(0, 6, (_SIDE, _SIDE, 1))
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _write_shard(path: Path, numbers: range, sample: list[bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            for suffix, data in (("jpg", sample[number % len(sample)]), ("txt", _caption(number).encode())):
                info = tarfile.TarInfo(f"{number:08d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
