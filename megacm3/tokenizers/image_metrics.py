"""Figures of an image tokenizer's reconstructions, and the picture that shows them."""

import io
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megacm3.tokenizers.image import ImageTokenizer

_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
"""SSIM's constants for 8-bit pictures (Wang et al. 2004)."""


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over pictures of 10 log10(255^2 / mean squared difference), dB; uint8 [n, h, w, 3]."""
    error = (a.float() - b.float()).square().mean((1, 2, 3)).clamp_min(1e-10)
    return float((10 * torch.log10(255.0**2 / error)).mean())


def ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean structural similarity, Gaussian window of 11 pixels and sigma 1.5, colours apart; uint8 [n, h, w, 3]."""
    x, y = (t.float().permute(0, 3, 1, 2).reshape(-1, 1, t.shape[1], t.shape[2]) for t in (a, b))
    positions = torch.arange(11) - 5.0
    line = torch.exp(-positions.square() / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    ux, uy = F.conv2d(x, window), F.conv2d(y, window)
    xx = F.conv2d(x * x, window) - ux * ux
    yy = F.conv2d(y * y, window) - uy * uy
    xy = F.conv2d(x * y, window) - ux * uy
    value = (2 * ux * uy + _C1) * (2 * xy + _C2) / ((ux * ux + uy * uy + _C1) * (xx + yy + _C2))
    return float(value.mean())


def small(pictures: torch.Tensor, side: int = 16) -> torch.Tensor:
    """uint8 [n, h, w, 3] -> float32 [n, side * side * 3], averaged areas."""
    x = pictures.float().permute(0, 3, 1, 2)
    return F.interpolate(x, size=(side, side), mode="area").flatten(1)


def nearest_picture_rate(reconstructions: torch.Tensor, originals: torch.Tensor, own: torch.Tensor) -> float:
    """Share of reconstructions whose nearest original (pixel distance at 16 x 16) is their own.

    reconstructions uint8 [m, h, w, 3]; originals uint8 [n, h, w, 3]; own int64 [m] rows of `originals`. A tie with a
    picture of the same 16 x 16 content counts as right.
    """
    ours, theirs = small(reconstructions), small(originals)
    distances = torch.cdist(ours, theirs)
    mine = distances[torch.arange(len(own)), own]
    return float((mine <= distances.min(1).values + 1e-3).float().mean())


def evaluate(tokenizer: ImageTokenizer, pictures: np.ndarray, chosen: np.ndarray, batch: int = 32) -> dict[str, Any]:
    """PSNR, SSIM, code use and nearest-picture rate of `pictures[chosen]`; pictures uint8 [n, s, s, 3]."""
    codes, recoded, originals = [], [], []
    for start in range(0, len(chosen), batch):
        pixels = torch.from_numpy(np.ascontiguousarray(pictures[chosen[start : start + batch]]))
        code = tokenizer.encode(pixels)
        codes.append(code)
        originals.append(pixels)
        recoded.append(tokenizer.decode(code))
    original, again, used = torch.cat(originals), torch.cat(recoded), torch.cat(codes)
    counts = torch.bincount(used.flatten(), minlength=tokenizer.codebook_size).double()
    share = counts / counts.sum()
    entropy = -(share[share > 0] * share[share > 0].log()).sum()
    figures: dict[str, Any] = {
        "pictures": len(chosen),
        "psnr": round(psnr(original, again), 3),
        "codes_used": round(float((counts > 0).double().mean()), 4),
        "perplexity": round(math.exp(float(entropy)), 1),
        "nearest_picture_rate": round(nearest_picture_rate(again, original, torch.arange(len(chosen))), 4),
    }
    if tokenizer.image_size >= 11:
        figures["ssim"] = round(ssim(original, again), 4)
    return figures


def reconstruction_grid(tokenizer: ImageTokenizer, pictures: np.ndarray, columns: int = 8) -> bytes:
    """A PNG: rows of originals with their reconstructions below; pictures uint8 [n, s, s, 3]."""
    from PIL import Image

    pixels = torch.from_numpy(np.ascontiguousarray(pictures))
    again = tokenizer.decode(tokenizer.encode(pixels)).numpy()
    size, gap = pictures.shape[1], 2
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * (size + gap), rows * 2 * (size + gap)), "white")
    for i, (first, second) in enumerate(zip(pictures, again, strict=True)):
        x, y = i % columns * (size + gap), i // columns * 2 * (size + gap)
        canvas.paste(Image.fromarray(np.ascontiguousarray(first)), (x, y))
        canvas.paste(Image.fromarray(second), (x, y + size + gap))
    scale = max(1, 96 // size)
    canvas = canvas.resize((canvas.width * scale, canvas.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()
