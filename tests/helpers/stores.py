"""Small real token stores for tests of what reads them."""

from pathlib import Path

import numpy as np

from megacm3.data.documents import IMAGE, TEXT
from megacm3.data.parts import write_store
from megacm3.data.store import StoreShape


def make_store(
    folder: Path,
    *,
    documents: int,
    text_size: int,
    codebook_size: int,
    image_tokens: int,
    inputs: dict[str, str] | None = None,
    seed: int = 0,
) -> Path:
    """A store of caption-picture pairs whose picture depends on the caption, so that a model has something to learn."""
    rng = np.random.default_rng(seed)

    def pairs():
        for i in range(documents):
            caption = rng.integers(0, text_size, rng.integers(2, 8))
            codes = (caption[0] * 7 + np.arange(image_tokens) * 3) % codebook_size
            yield [(TEXT, caption), (IMAGE, codes)], {"key": f"{i:04d}", "caption": f"caption {i}"}

    shape = StoreShape(text_size, codebook_size, image_tokens, image_size=32)
    write_store(folder, pairs(), shape, inputs, documents_per_part=max(1, documents // 2))
    return folder
