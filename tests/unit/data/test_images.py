"""Every row of the table of picture faults, each with a file made here."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from megacm3.data.images import DEFAULT_LIMITS, ImageLimits, Reject, open_image, perceptual_hash, prepare_image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 96, height: int = 64) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8))


def reason(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> str:
    with pytest.raises(Reject) as caught:
        open_image(data, limits)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_formats_open_as_rgb(kind):
    image = open_image(encoded(gradient(), kind))
    assert image.mode == "RGB" and image.size == (96, 64)


def test_truncated_jpeg_is_rejected_not_grey():
    data = encoded(gradient(256, 256), "JPEG")
    assert reason(data[: len(data) // 2]) == "corrupt_image"


def test_corrupt_png_and_garbage():
    data = bytearray(encoded(gradient(), "PNG"))
    data[60] ^= 0xFF
    assert reason(bytes(data)) == "corrupt_image"
    assert reason(b"<html>not a picture</html>") == "unknown_format"
    assert reason(b"") == "empty_image"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"])
@pytest.mark.filterwarnings("ignore")
def test_whatever_is_damaged_is_a_reject(kind):
    whole, rng = encoded(gradient(48, 48), kind), np.random.default_rng(0)
    rejects = 0
    for _ in range(200):
        data = bytearray(whole)
        for place in rng.integers(0, min(len(data), 400), 3):
            data[place] = rng.integers(0, 256)
        try:
            prepare_image(open_image(bytes(data)), 32)
        except Reject:
            rejects += 1
    assert rejects


def test_unwanted_formats_are_unknown():
    assert reason(encoded(gradient(), "EPS")) == "unknown_format"
    assert reason(encoded(gradient(), "PDF")) == "unknown_format"


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = open_image(encoded(gradient(80, 40), "JPEG", exif=exif))
    assert image.size == (40, 80)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode):
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 32, 64))
    pixels = np.asarray(open_image(encoded(image.convert(mode), "PNG")))
    assert (pixels[:, 40:] == 255).all()
    assert not (pixels[:, :20] == 255).all()


def test_transparent_palette_entry_becomes_white():
    image = Image.new("P", (64, 64), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.paste(1, (0, 0, 32, 64))
    pixels = np.asarray(open_image(encoded(image, "PNG", transparency=0)))
    assert pixels[5, 50].tolist() == [255, 255, 255] and pixels[5, 5].tolist() == [200, 0, 0]


def test_half_transparent_is_blended_on_white():
    pixels = np.asarray(open_image(encoded(Image.new("RGBA", (64, 64), (0, 0, 0, 128)), "PNG")))
    assert 125 <= pixels.mean() <= 129


def test_cmyk_jpeg():
    image = open_image(encoded(gradient().convert("CMYK"), "JPEG", quality=95))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - np.asarray(gradient()).astype(int)).mean() < 8


def test_16_bit_grey_keeps_its_range():
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = np.asarray(open_image(encoded(Image.fromarray(values), "PNG")))
    assert np.abs(pixels[..., 0].astype(int) - (values / 257).round().astype(int)).max() <= 1
    assert pixels[0, 0, 0] == 0 and pixels[-1, -1, 0] == 255


def test_16_bits_take_little_memory():
    data = encoded(Image.fromarray(np.full((2000, 2000), 257 * 200, np.uint16)), "PNG")
    tracemalloc.start()
    picture = open_image(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert picture.getpixel((1999, 1999)) == (200, 200, 200)
    assert peak < 10 * 2000 * 2000


def test_32_bit_and_floating_point():
    beyond = Image.fromarray(np.full((64, 64), 70000, np.int32))
    assert reason(encoded(beyond, "TIFF")) == "unsupported_mode"
    assert reason(encoded(Image.fromarray(np.zeros((64, 64), np.float32)), "TIFF")) == "unsupported_mode"


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "green", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    image = open_image(data)
    assert image.info["frames"] == 3
    red, green, blue = np.asarray(image)[5, 5]
    assert red > 200 and green < 60 and blue < 60


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises a giant picture and that holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(9000, 9000), (13000, 8000), (30000, 30000)])
def test_decompression_bomb_is_refused_by_its_header(size):
    assert reason(bomb(*size)) == "too_many_pixels"


def test_size_and_aspect_limits():
    assert reason(encoded(gradient(31, 64), "PNG")) == "too_small"
    assert reason(encoded(gradient(330, 64), "PNG")) == "extreme_aspect"
    assert open_image(encoded(gradient(256, 64), "PNG")).size == (256, 64)
    assert reason(encoded(gradient(), "PNG"), ImageLimits(max_pixels=1000)) == "too_many_pixels"


def test_crop_takes_the_middle():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    pixels = prepare_image(image, 50)
    assert pixels.shape == (50, 50, 3) and pixels.dtype == np.uint8
    assert (pixels[:, 5:45, 2] > 250).all() and (pixels[:, 5:45, 0] < 5).all()


def test_pad_keeps_everything_on_white():
    pixels = prepare_image(Image.new("RGB", (200, 100), "black"), 50, "pad")
    assert (pixels[:12] == 255).all() and (pixels[38:] == 255).all() and (pixels[14:36] == 0).all()


@pytest.mark.parametrize("size", [(37, 37), (48, 48), (49, 63), (1000, 251)])
@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_every_size_gives_the_square(size, mode):
    assert prepare_image(gradient(*size), 48, mode).shape == (48, 48, 3)


def test_right_size_is_untouched():
    image = gradient(48, 48)
    assert np.array_equal(prepare_image(image, 48), np.asarray(image))


def test_perceptual_hash_sees_through_recompression():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((64, 64))
    again = open_image(encoded(image, "JPEG", quality=90))
    ours = perceptual_hash(np.asarray(image))
    assert bin(ours ^ perceptual_hash(np.asarray(again))).count("1") <= 4
    assert ours != perceptual_hash(np.asarray(gradient(64, 64)))


def test_perceptual_hash_is_imagehash_s():
    imagehash = pytest.importorskip("imagehash")
    pixels = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert f"{perceptual_hash(pixels):016x}" == str(imagehash.phash(Image.fromarray(pixels)))
