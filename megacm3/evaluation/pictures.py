"""Pictures with captions for evaluation, and how they are laid out on a sheet."""

import io
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megacm3.data.images import ImageLimits, Reject, open_image, prepare_image
from megacm3.data.sources import Rejected, Sample, find_shards, read_shard
from megacm3.errors import DataError

logger = logging.getLogger(__name__)

_SKIN_TONE = re.compile(r"[,:]?\s*(?:and\s+)?(?:medium-light|medium-dark|light|medium|dark) skin tone", re.IGNORECASE)


@dataclass(frozen=True)
class Gallery:
    """Prepared pictures, each with its caption and key."""

    keys: list[str]
    captions: list[str]
    pixels: np.ndarray
    """uint8 [n, s, s, 3]"""

    def __len__(self) -> int:
        return len(self.keys)


def read_gallery(inputs: str | Sequence[str], size: int, limit: int | None = None) -> Gallery:
    """The pictures of all caption and picture pairs in `inputs` (paths or globs), prepared as for training.

    Rows that cannot be used are left out with a warning. Raises DataError when nothing is left.
    """
    keys: list[str] = []
    captions: list[str] = []
    pixels: list[np.ndarray] = []
    refused = 0
    for shard in find_shards(inputs if isinstance(inputs, str) else list(inputs)):
        for row in read_shard(shard):
            if limit is not None and len(keys) >= limit:
                break
            picture = _prepared(row, size)
            if picture is None:
                refused += 1
                continue
            assert isinstance(row, Sample)
            keys.append(row.key)
            captions.append(row.caption)
            pixels.append(picture)
    if not keys:
        raise DataError(f"{inputs} holds no picture with a caption ({refused} rows cannot be used); check --input")
    if refused:
        logger.warning("%d rows of %s are no usable picture with a caption", refused, inputs)
    return Gallery(keys, captions, np.stack(pixels))


def load_picture(path: str, size: int, mode: str = "crop") -> np.ndarray:
    """One picture file as uint8 [size, size, 3]. Raises DataError when it is missing or no usable picture."""
    try:
        return prepare_image(open_image(Path(path).read_bytes(), ImageLimits(min_side=1, max_aspect=1000)), size, mode)
    except OSError as fault:
        raise DataError(f"--image {path} cannot be read: {fault.strerror}") from fault
    except Reject as fault:
        raise DataError(f"--image {path} cannot be used: {fault}; expected a picture file") from fault


def _prepared(row: Sample | Rejected, size: int) -> np.ndarray | None:
    """The first picture of a sample with a caption, or None when there is no usable one."""
    if not isinstance(row, Sample) or not row.caption:
        return None
    data = next((part for part in row.parts if isinstance(part, bytes)), None)
    try:
        return None if data is None else prepare_image(open_image(data), size)
    except Reject:
        return None


def plain_caption(caption: str) -> str:
    """A caption for comparison: without skin tones, in lower case, white space made single."""
    return " ".join(_SKIN_TONE.sub("", caption).lower().split())


def sheet(pixels: Sequence[np.ndarray], labels: Sequence[str] = (), columns: int = 4, side: int = 144) -> Image.Image:
    """A white sheet of pictures uint8 [s, s, 3], `side` pixels each, with a line or two of label under each."""
    font = ImageFont.load_default(size=13)
    text = 38 if labels else 0
    gap = 12
    rows = -(-len(pixels) // columns)
    canvas = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + text + gap) + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for i, picture in enumerate(pixels):
        left, top = gap + (i % columns) * (side + gap), gap + (i // columns) * (side + text + gap)
        canvas.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS), (left, top))
        if labels:
            pen.multiline_text((left, top + side + 2), _wrap(labels[i], font, side), fill="black", font=font, spacing=1)
    return canvas


def _wrap(label: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    lines: list[str] = []
    rest = label.split()
    while rest and len(lines) < 2:
        count = len(rest)
        while count > 1 and font.getlength(" ".join(rest[:count])) > width:
            count -= 1
        lines.append(" ".join(rest[:count]))
        rest = rest[count:]
    if rest or font.getlength(lines[-1]) > width:
        last = lines[-1] + "…"
        while len(last) > 2 and font.getlength(last) > width:
            last = last[:-2] + "…"
        lines[-1] = last
    return "\n".join(lines)


def png_bytes(image: Image.Image | np.ndarray, notes: dict[str, str] | None = None) -> bytes:
    """The picture as PNG, `notes` as its text chunks."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (notes or {}).items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def titled_sheets(parts: Sequence[tuple[str, Sequence[np.ndarray], Sequence[str]]], columns: int = 8) -> Image.Image:
    """Sheets (title, pictures, labels) one under the other."""
    font = ImageFont.load_default(size=20)
    sheets = [sheet(pictures, labels, columns, side=120) for _, pictures, labels in parts]
    head = 40
    canvas = Image.new("RGB", (max(s.width for s in sheets), sum(s.height + head for s in sheets)), "white")
    pen, top = ImageDraw.Draw(canvas), 0
    for (title, _, _), part in zip(parts, sheets, strict=True):
        pen.text((12, top + 10), title, fill="black", font=font)
        canvas.paste(part, (0, top + head))
        top += head + part.height
    return canvas
