"""Vectors for the retrieval benchmark, made of real captioned pictures.

A few thousand pairs are no bank of a million, so every pair stands for hundreds of documents: its picture jittered
(shift, zoom, colour) in many ways and its caption with tokens dropped in many ways, each encoded by a CLIP that was
trained on these pairs; a document is one of the pictures with one of the captions of the same pair, no two documents
alike. A fifth of the pairs is held out: neither the CLIP nor the bank sees them, and all queries come from them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacm3.command import progress, seed_from
from megacm3.errors import ConfigError, DataError
from megacm3.files import new_file, write_manifest
from megacm3.retrieval.bank import KIND, part_file
from megacm3.retrieval.contrastive import jitter
from megacm3.retrieval.encoder import Encoder, document_vectors
from megacm3.retrieval.jobs import FOLDER
from megacm3.retrieval.neighbour_search import drop_tokens
from megacm3.retrieval.new_encoder import EncoderTraining
from megacm3.retrieval.train_encoder import Pairs, read_pairs, train_encoder

HELD_OUT = 5
"""One pair in so many is held out."""
_PART_ROWS = 131_072
_JITTER, _DROPOUT = 0.1, 0.2
_CAPTIONS = 24
"""Different captions made of one, at most."""


@dataclass(frozen=True)
class BenchmarkData:
    """What a bank is made of for the benchmark."""

    inputs: tuple[str, ...]
    documents: int = 1_000_000
    queries: int = 10_000
    """Of each kind."""
    dim: int = 512
    steps: int = 300
    """Of the CLIP's training."""
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError for values that cannot work."""
        if not self.inputs:
            raise ConfigError("--input is needed: captioned pictures, of which the vectors are made")
        if self.documents < 1000 or self.queries < 1 or self.dim < 1:
            raise ConfigError(f"--documents {self.documents} --queries {self.queries} --width {self.dim}; "
                              "expected at least 1000 documents, one query, width 1")  # fmt: skip


def parts_of(documents: int) -> list[int]:
    """Rows of each part."""
    return [min(_PART_ROWS, documents - start) for start in range(0, documents, _PART_ROWS)]


def make_vectors(work: Path, data: BenchmarkData) -> dict[str, Any]:
    """Write the bank's vectors below `work/folder` in a bank's layout, and beside it `documents.npy` (float16 [n, d],
    the same ready for plain FAISS) and queries `{image,text}_queries.npy` (float32 [n, d]).

    Gives counts: pairs of the bank and held out, different pictures and captions, different text queries.
    """
    pairs = read_pairs(data.inputs, EncoderTraining().image_size)
    order = np.random.default_rng(seed_from(data.seed, "benchmark pairs")).permutation(len(pairs.captions))
    held, kept = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
    if len(held) < 2:
        raise DataError(f"--input holds {len(order)} captioned pictures; expected at least {2 * HELD_OUT}")
    training = EncoderTraining(dim=data.dim, steps=data.steps, seed=data.seed)
    encoder, figures = train_encoder(Pairs(pairs.images[kept], [pairs.captions[n] for n in kept]), training)
    variants = _Variants(encoder, pairs, data.seed)

    captions, caption_pair = variants.captions(kept, _CAPTIONS)
    per_pair = np.bincount(caption_pair, minlength=len(kept))
    # Pictures of a pair, so that there are a quarter more combinations than documents.
    count = -(-5 * data.documents // (4 * int(per_pair.sum())))
    images = variants.pictures(kept, count, "bank")
    _write_documents(work, data, images, captions, per_pair, count)

    texts, _ = variants.captions(held, -(-data.queries // len(held)), repeat=True)
    chosen = np.random.default_rng(seed_from(data.seed, "benchmark queries")).permutation(len(texts))[: data.queries]
    _save(work / "text_queries.npy", texts[chosen])
    jittered = variants.pictures(held, -(-data.queries // len(held)), "queries")
    _save(work / "image_queries.npy", jittered[: data.queries])
    return {
        "pairs": len(kept),
        "held_out_pairs": len(held),
        "pictures": len(images),
        "captions": len(captions),
        "different_text_queries": len(np.unique(texts[chosen].round(6), axis=0)),
        "recall_of_training_pairs": {name: figures[f"recall_{name}"] for name in ("image", "text")},
    }


class _Variants:
    """Encoded variants of pictures and captions."""

    def __init__(self, encoder: Encoder, pairs: Pairs, seed: int) -> None:
        self._encoder, self._seed = encoder, seed
        self._pixels = encoder.pixels(pairs.images)
        self._tokens = encoder.tokenize(pairs.captions)

    def pictures(self, rows: np.ndarray, count: int, purpose: str) -> np.ndarray:
        """float32 [len(rows) x count, d]: `count` jittered pictures of each row, row after row."""
        import torch

        generator = torch.Generator().manual_seed(seed_from(self._seed, "benchmark pictures", purpose))
        found = []
        for row in progress(rows.tolist(), unit="pair", description=f"pictures ({purpose})"):
            pixels = torch.from_numpy(self._pixels[row]).expand(count, -1, -1, -1)
            found.append(self._encoder.encode_pixels(jitter(pixels, _JITTER, generator).numpy()))
        return np.concatenate(found)

    def captions(self, rows: np.ndarray, most: int, repeat: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Captions with tokens dropped: float32 [n, d], and int64 [n]: which of `rows` each belongs to, ascending.

        At most `most` a row, all of a row different; with `repeat` as many as `most` for each, whether or not they are.
        """
        tokens, owner = [], []
        for place, row in enumerate(rows.tolist()):
            drawn = [
                tuple(drop_tokens(self._tokens[row], _DROPOUT, self._seed, row, variant))
                for variant in range(most if repeat else 8 * most)
            ]
            kept = drawn if repeat else list(dict.fromkeys(drawn))[:most]
            tokens += [list(ids) for ids in kept]
            owner += [place] * len(kept)
        return self._encoder.encode_tokens(tokens, 512), np.array(owner)


def _write_documents(
    work: Path, data: BenchmarkData, images: np.ndarray, captions: np.ndarray, per_pair: np.ndarray, count: int
) -> None:
    # Combination N of all is picture N % count of its pair with caption N // count; documents are drawn of them.
    rng = np.random.default_rng(seed_from(data.seed, "benchmark documents"))
    drawn = rng.permutation(len(captions) * count)[: data.documents]
    caption = drawn // count
    pair = np.repeat(np.arange(len(per_pair)), per_pair)[caption]
    picture = pair * count + drawn % count
    images, captions = images.astype(np.float16), captions.astype(np.float16)
    shape = data.documents, images.shape[1]
    ready = np.lib.format.open_memmap(work / "documents.npy", "w+", np.float16, shape)
    start = 0
    for number, rows in enumerate(parts_of(data.documents)):
        span = slice(start, start + rows)
        halves = {"image": images[picture[span]], "text": captions[caption[span]]}
        for kind, vectors in halves.items():
            _save(part_file(work / FOLDER, kind, number), vectors)
        ready[span] = document_vectors(halves["image"], halves["text"])
        start += rows
    ready.flush()
    _save(work / FOLDER / "doc_ids.npy", np.arange(data.documents))


def _save(path: Path, array: np.ndarray) -> None:
    with new_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


def write_bank(folder: Path, data: BenchmarkData, made: dict[str, Any]) -> None:
    """Make a folder of vectors and index a bank that `MemoryBank.open` takes, without metadata for people."""
    for name, dtype in (("captions", np.uint64), ("clusters", np.int64)):
        _save(folder / f"{name}.npy", np.arange(data.documents, dtype=dtype))
    sizes = {"dim": data.dim, "documents": data.documents, "rows": data.documents, "parts": parts_of(data.documents)}
    write_manifest(folder, KIND, sizes | made | {"precomputed": True}, {})
