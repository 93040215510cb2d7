"""Records and stores of the room's tests."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megacm3.data.parts import assemble
from megacm3.data.sources import Rejected, Sample, Shard
from megacm3.data.store import Store
from megacm3.data.units import UnitRunner, UnitSettings
from megacm3.sft.read import SftOptions, read_sft, sft_shards
from megacm3.sft.tasks import choose_tasks


def picture(number: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """A JPEG-like PNG of smooth colours, another for each number."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 200, (4, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def options(name: str, tasks_file: str | Path = "", **changes: Any) -> SftOptions:
    tasks = {key: task.to_json() for key, task in choose_tasks(name, tasks_file).items()}
    return SftOptions(name, tasks, **changes)


def read(path: Path | list[Path], given: SftOptions, images: Path | str = "") -> list[Sample | Rejected]:
    """All that the shards of a path give."""
    paths = path if isinstance(path, list) else [path]
    shards = sft_shards([str(p) for p in paths], str(images), given, 1000)
    return [item for shard in shards for item in read_sft(shard, given)]


def samples(items: list[Sample | Rejected]) -> list[Sample]:
    rejected = [item for item in items if isinstance(item, Rejected)]
    assert not rejected, rejected
    return [item for item in items if isinstance(item, Sample)]


def reasons(items: list[Sample | Rejected]) -> list[str]:
    return [item.reason for item in items if isinstance(item, Rejected)]


def shown(sample: Sample) -> str:
    """Texts with answers in [brackets], pictures as their length's sign: (p) or [p]."""
    out = ""
    for part, answer in zip(sample.parts, sample.answers, strict=True):
        text = part if isinstance(part, str) else "p"
        out += f"[{text}]" if answer else (text if isinstance(part, str) else "(p)")
    return out


def make_store(path: Path, given: SftOptions, folder: Path, text: Any, image: Any, **changes: Any) -> Store:
    """A store of a file's records, as pretokenization makes it, without its workers."""
    runner = UnitRunner(text, image, UnitSettings(batch=8, sft=given, **changes))
    parts = []
    shards: list[Shard] = sft_shards([str(path)], "", given, 1000)
    for number, shard in enumerate(shards):
        parts.append(folder / f"part{number}")
        runner.run(shard, parts[-1])
    settings: dict[str, Any] = {}
    if text.family == "chameleon":
        table = text.vocabulary(image.codebook_size, image.grid[0] * image.grid[1])
        settings["vocabulary"] = table.to_json()
    return assemble(folder / "store", parts, runner.shape, {}, settings)
