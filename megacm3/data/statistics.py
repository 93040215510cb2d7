"""What a store and a stream are made of: lengths, modalities, padding, what was cut and left out."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from megacm3.command import seed_from
from megacm3.data.documents import ANSWER, IMAGE, TEXT
from megacm3.data.stream import Stream
from megacm3.data.windows import StoreLike, add_counts

_NAMES = {TEXT: "text", IMAGE: "image", TEXT | ANSWER: "text(answer)", IMAGE | ANSWER: "image(answer)"}


@dataclass(frozen=True)
class StoreStatistics:
    """Of a random sample of a store's documents."""

    documents: int
    """All documents of the store."""
    sampled: int
    patterns: dict[str, int]
    """Orders of segments, such as "text image", the most frequent first."""
    text_lengths: np.ndarray
    """int64: tokens of every sampled text segment."""
    lengths: np.ndarray
    """int64: tokens of every sampled document, without control tokens."""
    image_share: float
    """Image tokens among the sampled tokens."""


def store_statistics(store: StoreLike, sample: int = 10_000, seed: int = 0) -> StoreStatistics:
    """Statistics of at most `sample` documents, from the index alone."""
    count = min(sample, len(store))
    rng = np.random.Generator(np.random.PCG64(seed_from("statistics", seed)))
    chosen = np.arange(count) if count == len(store) else np.unique(rng.integers(0, len(store), count))
    patterns: Counter[str] = Counter()
    texts, lengths, image = [], [], 0
    for doc_id in chosen.tolist():
        shape = store.segment_lengths(doc_id)
        patterns[" ".join(_NAMES[mode] for mode, _ in shape)] += 1
        texts += [length for mode, length in shape if mode & 1 != IMAGE]
        image += sum(length for mode, length in shape if mode & 1 == IMAGE)
        lengths.append(sum(length for _, length in shape))
    return StoreStatistics(
        len(store),
        len(chosen),
        dict(patterns.most_common()),
        np.array(texts, np.int64),
        np.array(lengths, np.int64),
        image / max(1, sum(lengths)),
    )


@dataclass(frozen=True)
class StreamStatistics:
    """Of a run of sequences."""

    sequences: int
    counts: dict[str, int]
    """`windows.COUNTERS`, summed."""
    shares: dict[str, float]
    """padding: of all positions. cut, left_out: of the tokens that the samples had before. text, image, special: of the
    real tokens."""
    sample_lengths: np.ndarray
    """int64: tokens of each sample with its retrieved documents and control tokens."""
    spans: np.ndarray
    """int64 [most + 1]: sequences with 0, 1, 2, ... CM3 spans."""


def stream_statistics(stream: Stream, first: int = 0, count: int = 0, read: int = 64) -> StreamStatistics:
    """Statistics of sequences first .. first + count - 1 (count 0: one window); modalities from the first `read`."""
    count = count or stream.stages[0].sequences
    rows = [stream.counts(number) for number in range(first, first + count)]
    total = add_counts(rows)
    lengths = {d.number: d.length for number in range(first, first + count) for d in stream.drawn(number)}
    kinds = np.zeros(4, np.int64)
    for number in range(first, first + min(read, count)):
        tokens = stream.sequence(number).tokens
        kinds += np.bincount(stream.vocabulary.kind[tokens[tokens != stream.vocabulary.pad]], minlength=4)
    real = max(1, int(kinds.sum()))
    offered = total["tokens"] - 3 * total["spans"] + total["cut"] + total["left_out"]
    shares = {
        "padding": total["padding"] / (total["padding"] + total["tokens"]),
        "cut": total["cut"] / max(1, offered),
        "left_out": total["left_out"] / max(1, offered),
        "text": float(kinds[0] / real),
        "image": float(kinds[1] / real),
        "special": float(kinds[2:].sum() / real),
    }
    spans = np.bincount([row["spans"] for row in rows])
    return StreamStatistics(count, total, shares, np.array(list(lengths.values()), np.int64), spans)
