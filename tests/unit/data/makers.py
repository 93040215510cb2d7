"""Input files for the tests of this room, made on the spot."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, size: int = 64, kind: str = "PNG") -> bytes:
    """A picture file of smooth random colours, different for each number."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((size, size), Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar with these members in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(first: int, count: int) -> list[tuple[str, bytes]]:
    """Members of `count` whole pairs, keys by number."""
    members = []
    for n in range(first, first + count):
        members += [(f"{n:05d}.png", picture(n)), (f"{n:05d}.txt", f"caption number {n}".encode())]
        members.append((f"{n:05d}.json", json.dumps({"n": n}).encode()))
    return members
