"""Time and memory of an export and an import at a model's real size, beside plain copies of the same bytes."""

import dataclasses
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megacm3.checkpoint.boxes import Box, whole
from megacm3.checkpoint.pieces import PARAM
from megacm3.checkpoint.reader import Checkpoint
from megacm3.checkpoint.reshard import config_of, write_checkpoint
from megacm3.command import seed_from
from megacm3.convert.folder import HfFolder
from megacm3.convert.from_hf import from_hf
from megacm3.convert.names import export_kind, names
from megacm3.convert.to_hf import Export, to_hf
from megacm3.convert.verify import compare
from megacm3.errors import CheckpointError, ConfigError
from megacm3.files import sha256_file
from megacm3.resolve import load_config

COPIES = 4
"""Copies of the weights that the run needs room for: checkpoint, copy, export, import."""
SPARE = 4_000_000_000
"""Bytes of memory that the conversion in memory must leave to others."""
GATE_LAYERS = 2
"""Layers of which the logits are compared: both sides in fp32."""
COPY = "copy of the checkpoint"


@dataclass
class Timing:
    """One step of the benchmark."""

    name: str
    seconds: float
    peak_bytes: int
    """Largest anonymous memory of the process meanwhile; pages of mapped files do not count."""


def anonymous_bytes() -> int:
    """RssAnon of this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no RssAnon")


@contextmanager
def measured(name: str, timings: list[Timing]) -> Iterator[None]:
    """Time the body and watch its memory, every 20 ms."""
    peak, ended = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - begun
        ended.set()
        watcher.join()
        timings.append(Timing(name, seconds, peak[0]))


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that each step reads from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def random_checkpoint(folder: Path, preset: str, tensor: int, pipeline: int) -> Path:
    """A checkpoint of a preset with random bf16 parameters. Raises ConfigError when the model cannot be cut so."""
    config = load_config(None, [f"model.preset={preset}"])
    table = names(export_kind(config.model), config.model)

    def read(_: str, name: str, box: Box, out: torch.Tensor) -> None:
        # A few megabytes of initial weights, repeated: the disk and the hash do not see the difference.
        generator = torch.Generator().manual_seed(seed_from(name, str(box)))
        block = torch.randn(min(out.numel(), 1 << 20), generator=generator).mul_(config.model.init_std).to(out.dtype)
        flat = out.view(-1)
        for low in range(0, flat.numel(), block.numel()):
            flat[low : low + block.numel()] = block[: flat.numel() - low]

    return write_checkpoint(
        folder,
        kinds={PARAM: torch.bfloat16},
        shapes={name.logical: name.shape for name in table},
        read=read,
        config=config_of(_as_tree(config), tensor, pipeline),
        step=0,
        optimizer_step=0,
        state={"step": 0},
        inputs={},
    )


def _as_tree(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def all_in_memory(checkpoint: Path, target: Path, dtype: torch.dtype) -> None:
    """The usual converter: put the whole state dict together, then save it. In fp32 as `zero_to_fp32` does.

    (`zero_to_fp32` itself knows no tensor and pipeline ranks.)
    """
    from safetensors.torch import save_file

    source = Checkpoint(checkpoint)
    state = {}
    for name, shape in source.shapes.items():
        tensor = torch.empty(shape, dtype=source.kinds[PARAM])
        source.read(PARAM, name, whole(shape), tensor)
        state[name] = tensor.to(dtype)
    target.mkdir()
    save_file(state, target / "model.safetensors", {"format": "pt"})
    with open(target / "model.safetensors", "rb") as file:
        os.fsync(file.fileno())


def convert(
    work: Path, preset: str, tensor: int, pipeline: int, told: Callable[[str], None] = lambda line: None
) -> list[Timing]:
    """Run all steps below `work`, and remove what they made; files are read from the disk, not from the page cache.

    The same bytes are copied before, between and after, as the disk's speed drifts. Raises ConfigError when the disk is
    too small, CheckpointError when the export or the import is wrong.
    """
    config = load_config(None, [f"model.preset={preset}"])
    needed = 2 * sum(whole(name.shape).numel for name in names(export_kind(config.model), config.model))
    work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work).free
    if free < COPIES * needed * 1.02:
        raise ConfigError(
            f"--work {work} has {free / 1e9:.1f} GB free; {preset} needs {COPIES} x {needed / 1e9:.1f} GB. "
            "Give another --work or a smaller --preset"
        )
    timings: list[Timing] = []
    source, copy, output, back = (work / name for name in ("checkpoint", "copy", "hf", "native"))

    def step(name: str, read: Path, function: Callable[[], object]) -> None:
        shutil.rmtree(copy, ignore_errors=True)
        forget(read)
        with measured(name, timings):
            function()
        told(f"{name:24} {timings[-1].seconds:7.1f} s, {timings[-1].peak_bytes / 1e9:.2f} GB of anonymous memory")

    try:
        told(f"writing {preset}: {needed / 1e9:.2f} GB as tensor {tensor} x pipeline {pipeline}")
        random_checkpoint(source, preset, tensor, pipeline)
        step(COPY, source, lambda: _copy(source, copy))
        step("export", source, lambda: to_hf(Export.of(source), output))
        step(COPY, source, lambda: _copy(source, copy))
        step("import", output, lambda: from_hf(HfFolder(output), back, tensor, pipeline))
        step(COPY, source, lambda: _copy(source, copy))
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            room, taken = _available_bytes(), needed * dtype.itemsize / torch.bfloat16.itemsize
            if taken * 1.1 + SPARE < room and taken < shutil.disk_usage(work).free:
                step(f"export, {name} in memory", source, partial(all_in_memory, source, copy, dtype))
            else:
                told(
                    f"export, {name} in memory   left out: it takes {taken / 1e9:.1f} GB, {room / 1e9:.1f} GB are free"
                )
        step("hashes of every tensor", back, lambda: _same(source, back))
        step(f"logits, {GATE_LAYERS} layers", output, lambda: told(_gate(source, output)))
    finally:
        for folder in (source, copy, output, back):
            shutil.rmtree(folder, ignore_errors=True)
    return timings


def _available_bytes() -> int:
    """Memory that programs can still have (Linux)."""
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    for path in target.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _same(first: Path, second: Path) -> None:
    """Equal layouts of equal tensors are equal files, byte for byte."""
    for path in sorted(first.glob("*.safetensors")):
        if sha256_file(path) != sha256_file(second / path.name):
            raise CheckpointError(f"{second / path.name} differs from {path}, from which it came by way of an export")


def _gate(source: Path, output: Path) -> str:
    checkpoint = Checkpoint(source)
    verdict = compare(checkpoint, config_of(checkpoint.config, 1, 1), output, layers=GATE_LAYERS)
    return f"largest difference of a logit {verdict.largest:.1e} over {verdict.tokens} tokens"
