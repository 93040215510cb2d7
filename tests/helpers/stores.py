"""Small real token stores for tests of what reads them."""

from pathlib import Path

import numpy as np

from megacm3.data.documents import IMAGE, TEXT
from megacm3.data.parts import write_store
from megacm3.data.store import Store, StoreShape


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
            yield [(TEXT, caption), (IMAGE, codes)], {"key": f"{i:04d}", "caption": f"caption {i}", "images": 1}

    shape = StoreShape(text_size, codebook_size, image_tokens, image_size=32)
    write_store(folder, pairs(), shape, inputs, documents_per_part=max(1, documents // 2))
    return folder


def make_neighbours(root: Path, store: Path) -> Path:
    """Neighbours of a store of pairs by random vectors: build_memory_bank and find_neighbours for real."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from megacm3.retrieval.build_bank import build_bank
    from megacm3.retrieval.find_neighbours import find_neighbours
    from megacm3.retrieval.options import BankOptions, NeighbourOptions

    rng = np.random.default_rng(0)
    keys = Store.open(store).metadata(["key"])["key"].to_pylist()
    for name in ("img_emb", "text_emb", "metadata"):
        (root / "vectors" / name).mkdir(parents=True)
    for name in ("img_emb", "text_emb"):
        vectors = rng.normal(size=(len(keys), 16)).astype(np.float32)
        np.save(root / "vectors" / name / "0.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    pq.write_table(pa.table({"key": keys}), root / "vectors" / "metadata" / "0.parquet")
    build_bank(BankOptions(str(store), f"precomputed:{root / 'vectors'}", str(root / "bank"), workers=1))
    options = NeighbourOptions(
        str(root / "bank"), str(root / "neighbours"), keep=8, search=16, text_variants=1, query_dropout=0.0, workers=1
    )
    find_neighbours(options)
    return root / "neighbours"
