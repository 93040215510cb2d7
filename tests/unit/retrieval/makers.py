"""A small input with every kind of document that retrieval must tell apart, its store, and an encoder."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from megacm3.data.parts import write_store
from megacm3.data.sources import Sample, find_shards, read_shard
from megacm3.data.store import Store, StoreShape
from megacm3.data.units import Prepared, UnitSettings, prepare
from megacm3.retrieval.new_encoder import EncoderTraining
from tests.unit.data.makers import write_tar

DIM = 64
TINY = EncoderTraining(
    image_size=16,
    patch_size=8,
    width=DIM,
    image_layers=1,
    text_layers=1,
    vocabulary=600,
    steps=60,
    batch=50,
    lr=3e-3,
    warmup=5,
    jitter=0.03,
)
"""Trains in a second or two."""
COLOURS = ("red", "green", "blue", "yellow", "purple", "grey", "cyan", "brown")
SHAPES = ("square", "bar", "frame", "cross", "stripe", "corner")
_RGB = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (40, 60, 220),
    "yellow": (235, 215, 40),
    "purple": (150, 50, 170),
    "grey": (120, 120, 120),
    "cyan": (50, 200, 210),
    "brown": (130, 80, 40),
}
SHAPE = StoreShape(text_size=64, codebook_size=16, image_tokens=4, image_size=16)


def drawing(colour: str, shape: str, shift: int = 0) -> bytes:
    """A webp of a shape in a colour on white, 32 pixels; each colour at its own place (hashes see none)."""
    pixels = np.full((32, 32, 3), 255, np.uint8)
    boxes = {
        "square": [(8, 24, 8, 24)],
        "bar": [(4, 28, 13, 19)],
        "frame": [(4, 8, 4, 28), (24, 28, 4, 28), (4, 28, 4, 8), (4, 28, 24, 28)],
        "cross": [(13, 19, 4, 28), (4, 28, 13, 19)],
        "stripe": [(6, 10, 2, 30), (18, 22, 2, 30)],
        "corner": [(2, 16, 2, 8), (2, 8, 2, 16)],
    }[shape]
    for top, bottom, left, right in boxes:
        pixels[top : bottom + shift, left : right + shift] = _RGB[colour]
    number = COLOURS.index(colour)
    pixels = np.roll(pixels, (number % 4 * 4 - 6, number // 4 * 7 - 3), (0, 1))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def members() -> list[tuple[str, bytes]]:
    """48 drawings, and at their end a copy under another caption, and another picture with a caption that is taken."""
    found = []
    for colour in COLOURS:
        for shape in SHAPES:
            found += _pair(f"{colour}-{shape}", drawing(colour, shape), f"a {colour} {shape} on white")
    found += _pair("copy", drawing("red", "square"), "the very first drawing once more")
    found += _pair("same-caption", drawing("red", "corner", 2), "A red  square on white")
    return found


def _pair(key: str, picture: bytes, caption: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.webp", picture), (f"{key}.txt", caption.encode())]


def write_input(folder: Path) -> str:
    """Two shards of `members` and after each a shard of texts alone; gives the pattern that names all four."""
    whole = members()
    write_tar(folder / "part-0.tar", whole[:48])
    (folder / "part-1.txt").write_text("words alone\nmore words alone\n")
    write_tar(folder / "part-2.tar", whole[48:])
    (folder / "part-3.txt").write_text("no pictures here\nnor here\nnor at the end\n")
    return str(folder / "part-*")


PARTS = (24, 26, 0)
"""Rows of the bank's parts: the store's first one has two documents without a picture, its last one nothing else."""
DOCUMENTS = 55


def make_store(folder: Path, pattern: str) -> Store:
    """A store of the input, one part a shard, with made-up tokens and true metadata."""

    def documents():
        for shard in find_shards(pattern):
            for item in read_shard(shard):
                assert isinstance(item, Sample), item
                ready = prepare(item, SHAPE.image_size, UnitSettings())
                assert isinstance(ready, Prepared), ready
                segments = [(0, np.arange(3))] + [(1, np.arange(4))] * item.images
                yield segments, ready.meta

    return write_store(folder, documents(), SHAPE, documents_per_part=26)
