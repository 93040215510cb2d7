"""From the bytes of a picture file to square RGB pixels, with every refusal named.

The file's header is judged before anything is decoded. Decoding is always complete: a truncated file is a reject, never
a picture with grey rows. Resizing follows Chameleon's released tokenizer: LANCZOS, short side to `size`, centre crop.
"""

import io
import warnings
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""What is opened; PIL's other formats (EPS, PDF, PSD ...) are refused as `unknown_format`."""

_ORIENTATION = 0x0112
"""EXIF's tag; 1 is upright."""

_ROWS = 64
"""Rows of a picture of 16 bits that are converted at once."""

Picture: TypeAlias = Image.Image

# `ImageLimits.max_pixels` rejects earlier than PIL warns, and by name.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class Reject(Exception):
    """One sample cannot be used. `reason` is a short fixed word (for counting), `detail` says what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail[:500]


@dataclass(frozen=True)
class ImageLimits:
    """What a picture's header may say."""

    max_pixels: int = 64_000_000
    """Width times height: above it, decoding is refused (a decompression bomb)."""
    min_side: int = 32
    """Shortest side in pixels."""
    max_aspect: float = 4.0
    """Longest side over shortest side; more would leave little of the picture after the crop."""


DEFAULT_LIMITS = ImageLimits()


def open_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Picture:
    """The upright RGB picture in `data`: first frame, EXIF orientation applied, transparency on white, 8 bit.

    `info["frames"]` of the result is the number of frames in the file. Raises Reject with one of: empty_image,
    unknown_format, too_many_pixels, too_small, extreme_aspect, corrupt_image, unsupported_mode.
    """
    if not data:
        raise Reject("empty_image")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as fault:
        raise Reject("unknown_format", f"first bytes {data[:8].hex()}") from fault
    except Image.DecompressionBombError as fault:
        raise Reject("too_many_pixels", str(fault)) from fault
    except MemoryError:
        raise
    except Exception as fault:
        # PIL's readers raise whatever their libraries do on damaged files: OSError, SyntaxError, RuntimeError ...
        raise Reject("corrupt_image", f"{type(fault).__name__}: {fault}") from fault
    width, height = image.size
    _check_header(width, height, limits)
    try:
        image.seek(0)
        image.load()
        frames = getattr(image, "n_frames", 1)
        # Without an orientation to undo, exif_transpose would copy the whole picture for nothing.
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        picture = _to_rgb(ImageOps.exif_transpose(image) if turned else image)
        picture.info["frames"] = frames
        return picture
    except Image.DecompressionBombError as fault:
        raise Reject("too_many_pixels", str(fault)) from fault
    except (MemoryError, Reject):
        raise
    except Exception as fault:
        # As above; a fault of ours would show in the tests of whole pictures.
        raise Reject("corrupt_image", f"{type(fault).__name__}: {fault}") from fault


def _check_header(width: int, height: int, limits: ImageLimits) -> None:
    short, long = sorted((width, height))
    if short < 1:
        raise Reject("too_small", f"{width}x{height}")
    if width * height > limits.max_pixels:
        raise Reject("too_many_pixels", f"{width}x{height} is more than {limits.max_pixels}")
    if short < limits.min_side:
        raise Reject("too_small", f"{width}x{height} has a side under {limits.min_side}")
    if long > limits.max_aspect * short:
        raise Reject("extreme_aspect", f"{width}x{height} is longer than {limits.max_aspect} to 1")


def _to_rgb(image: Picture) -> Picture:
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise Reject("unsupported_mode", "floating point pixels have no fixed white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bit(image: Picture) -> Picture:
    # PIL's own conversion of I;16 and I clips at 255, which turns nearly everything white.
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise Reject("unsupported_mode", f"{image.mode} with values {values.min()}..{values.max()}, beyond 16 bit")
    grey = np.empty(values.shape, np.uint8)
    for row in range(0, len(values), _ROWS):
        # Some rows at once: whole pictures of wide numbers would take a gigabyte and more.
        grey[row : row + _ROWS] = (values[row : row + _ROWS].astype(np.int64) + 128) // 257
    return Image.fromarray(grey).convert("RGB")


def prepare_image(image: Picture, size: int, mode: str = "crop") -> np.ndarray:
    """uint8 [size, size, 3] of an RGB picture.

    mode "crop": short side to `size`, centre crop (training). "pad": long side to `size`, white border (prompts, where
    nothing of the picture may be lost).
    """
    assert mode in ("crop", "pad"), mode
    if image.mode != "RGB":
        image = _to_rgb(image)
    width, height = image.size
    scale = size / (min if mode == "crop" else max)(width, height)
    resized = (max(1, round(width * scale)), max(1, round(height * scale)))
    if resized != (width, height):
        image = image.resize(resized, Image.Resampling.LANCZOS)
    left, top = (resized[0] - size) // 2, (resized[1] - size) // 2
    if mode == "crop":
        return np.asarray(image.crop((left, top, left + size, top + size)))
    square = Image.new("RGB", (size, size), "white")
    square.paste(image, (-left, -top))
    return np.asarray(square)


def perceptual_hash(pixels: np.ndarray) -> int:
    """64-bit hash of uint8 [s, s, 3]: the 8 x 8 lowest DCT terms of the grey 32 x 32 picture against their median.

    Equal for pictures that differ only by light recompression or resizing; used to keep near copies from being
    retrieved for one another.
    """
    grey = Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    terms = (_DCT_ROWS @ np.asarray(grey, np.float64) @ _DCT_ROWS.T).ravel()
    # The mean of the two middle ones of 64; numpy's own median takes longer than the rest of this function.
    middle = np.partition(terms, (31, 32))[31:33].sum() / 2
    bits = terms.round(6) > middle.round(6)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


_DCT_ROWS = np.cos(np.pi * (2 * np.arange(32) + 1) * np.arange(8)[:, None] / 64)
"""float64 [8, 32]: the first 8 basis functions of the DCT-II."""
