"""The quickstart's figure: is the training picture nearest to a generated one the picture of the prompt?

Captions are drawn from the training split; for each, one picture is generated (no retrieved documents, no re-ranking),
and compared with all training pictures at 16 x 16 pixels. A hit is a nearest picture whose caption is the prompt's,
skin tone aside. The same figure for the image tokenizer's reconstructions of the same pictures is the ceiling.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from megacm3.command import seed_from
from megacm3.errors import ConfigError
from megacm3.evaluation.pictures import Gallery, plain_caption

if TYPE_CHECKING:
    from megacm3.inference.api import Generator

SIDE = 16
"""Pixels along a side at which pictures are compared."""


@dataclass(frozen=True)
class Settings:
    """What the figure depends on besides the model."""

    count: int = 32
    """Captions drawn."""
    seed: int = 0
    """Of the captions drawn and of the samples."""
    guidance: float = 3.0
    temperature: float = 1.0
    top_p: float = 0.8
    top_k: int = 0


@dataclass(frozen=True)
class Fidelity:
    """The figure and what it was made from; every list has one entry a drawn caption."""

    settings: Settings
    fidelity: float
    """Share of generated pictures that hit."""
    reconstruction: float
    """Share of reconstructed pictures that hit."""
    pictures: int
    """Training pictures compared with."""
    chosen: list[int]
    """Number of each caption's picture in the gallery."""
    nearest: list[int]
    """Number of the picture nearest to the generated one."""
    hits: list[bool]
    reconstruction_hits: list[bool]
    generated: np.ndarray = field(repr=False)
    """uint8 [count, s, s, 3]"""
    reconstructed: np.ndarray = field(repr=False)
    """uint8 [count, s, s, 3]"""

    def to_json(self, gallery: Gallery) -> dict[str, Any]:
        """The figures, settings and captions, without pixels."""
        rows = [
            {"prompt": gallery.captions[c], "nearest": gallery.captions[n], "hit": hit, "reconstruction_hit": ceiling}
            for c, n, hit, ceiling in zip(self.chosen, self.nearest, self.hits, self.reconstruction_hits, strict=True)
        ]
        figures = {"fidelity": self.fidelity, "reconstruction": self.reconstruction, "pictures": self.pictures}
        return figures | {"settings": asdict(self.settings), "rows": rows}


def draw_captions(captions: Sequence[str], count: int, seed: int) -> list[int]:
    """Numbers of `count` captions that differ (skin tone aside), drawn with `seed`; the first of equal ones.

    Raises ConfigError when there are fewer.
    """
    first: dict[str, int] = {}
    for i, caption in enumerate(captions):
        first.setdefault(plain_caption(caption), i)
    if not 0 < count <= len(first):
        raise ConfigError(f"--count {count}: found {len(first)} different captions; expected 1 to {len(first)}")
    rng = np.random.Generator(np.random.PCG64(seed_from("fidelity", seed)))
    numbers = np.array(list(first.values()))
    return np.sort(rng.choice(numbers, count, replace=False)).tolist()


def shrink(pixels: np.ndarray) -> np.ndarray:
    """uint8 [n, s, s, 3] -> float32 [n, 16 * 16 * 3], by the mean of each block of pixels."""
    small = [Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BOX) for picture in pixels]
    return np.stack([np.asarray(picture, np.float32).ravel() for picture in small])


def nearest_pictures(queries: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """int64 [n]: for each shrunk query the number of the shrunk picture with the least squared distance."""
    squares = (pictures**2).sum(1)
    return (squares[None] - 2 * queries @ pictures.T).argmin(1)


def judge(pixels: np.ndarray, chosen: Sequence[int], gallery: Gallery) -> tuple[list[int], list[bool]]:
    """For each picture of uint8 [n, s, s, 3] the gallery's nearest, and whether its caption is that of `chosen`."""
    nearest = nearest_pictures(shrink(pixels), shrink(gallery.pixels)).tolist()
    plain = [plain_caption(caption) for caption in gallery.captions]
    return nearest, [plain[n] == plain[c] for n, c in zip(nearest, chosen, strict=True)]


def measure(generator: "Generator", gallery: Gallery, settings: Settings = Settings()) -> Fidelity:
    """Generate, reconstruct, compare. `gallery`: the training pictures at the model's size."""
    chosen = draw_captions(gallery.captions, settings.count, settings.seed)
    prompts = [gallery.captions[i] for i in chosen]
    generated = generator.images(
        prompts,
        guidance=settings.guidance,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        seed=settings.seed,
    )[:, 0]
    codes = generator.encode(gallery.pixels[chosen])
    reconstructed = generator.image_tokenizer.decode(codes).numpy()
    nearest, hits = judge(generated, chosen, gallery)
    _, ceiling = judge(reconstructed, chosen, gallery)
    return Fidelity(
        settings=settings,
        fidelity=float(np.mean(hits)),
        reconstruction=float(np.mean(ceiling)),
        pictures=len(gallery),
        chosen=chosen,
        nearest=nearest,
        hits=hits,
        reconstruction_hits=ceiling,
        generated=generated,
        reconstructed=reconstructed,
    )
