"""How many of the true neighbours an index finds, and how many lists that takes."""

import logging
from typing import Any

import numpy as np

from megacm3.command import seed_from
from megacm3.retrieval import index as indexes
from megacm3.retrieval.bank import Embeddings
from megacm3.retrieval.shards import FaissShards, merge

logger = logging.getLogger(__name__)

_COMPARED = 65_536
"""Vectors that exact answers are compared with at once: merging the answers of small blocks takes longer than they."""
_EVALUATED = 1000
"""Queries of each kind with which the recall is measured."""
_CLOSE = 0.002
"""Where `AIM` is out of reach: so much less than the best is worth fewer lists."""
_EXACT_BUDGET = 2e12
"""Multiplications that the exact answers may take (a minute or so on a core); fewer queries above."""
TARGET_RECALL = 0.95
"""recall@10 below which a bank is warned of."""
AIM = 0.965
"""recall@10 that the number of lists is chosen for: so many queries tell it within 0.005, and those of documents that
are not in the bank find a little less."""


def measure_recall(
    index: indexes.VectorIndex, embeddings: Embeddings, doc_ids: np.ndarray, nprobe: int, seed: int
) -> dict[str, Any]:
    """recall@10 of image and of text queries (halves of documents drawn at random) against exact search, by nprobe.

    The number of lists to search in FAISS's inverted files: `nprobe`, or for 0 the fewest (in powers of two, at most a
    sixteenth of them) with which both kinds of queries reach `AIM`, or come within `_CLOSE` of what they can reach.
    """
    count = int(min(_EVALUATED, len(embeddings), max(50, _EXACT_BUDGET / (len(embeddings) * index.dim))))
    rng = np.random.default_rng(seed_from(seed, "recall"))
    rows = np.sort(rng.choice(len(embeddings), count, replace=False))
    k = min(10, len(embeddings))
    queries = {kind: embeddings.take(kind, rows) for kind in ("image", "text")}
    exact = exact_search(np.concatenate(list(queries.values())), embeddings, doc_ids, k)
    truth = {"image": exact[:count], "text": exact[count:]}
    table: dict[int, dict[str, float]] = {}
    for lists in _tried(index, nprobe):
        if isinstance(index, FaissShards):
            index.nprobe = lists
        table[lists] = {kind: overlap(index.search(queries[kind], k)[1], truth[kind]) for kind in queries}
        if min(table[lists].values()) >= AIM:
            break
    enough = min(AIM, max(min(found.values()) for found in table.values()) - _CLOSE)
    chosen = next(lists for lists, found in table.items() if min(found.values()) >= enough)
    if isinstance(index, FaissShards):
        index.nprobe = chosen
    found = table[chosen]
    if min(found.values()) < TARGET_RECALL:
        logger.warning(
            "recall@%d is %.3f for image and %.3f for text queries (nprobe %d); a finer --index or a higher --nprobe "
            "raises it",
            k,
            found["image"],
            found["text"],
            chosen,
        )
    by_nprobe = {str(lists): found for lists, found in table.items()}
    return {"queries": count, "k": k, "nprobe": chosen, "recall_at_10": found, "by_nprobe": by_nprobe}


def _tried(index: indexes.VectorIndex, nprobe: int) -> list[int]:
    if not isinstance(index, FaissShards):
        return [0]
    return [min(nprobe, index.nlist)] if nprobe else [2**n for n in range(max(1, index.nlist // 16).bit_length())]


def exact_search(queries: np.ndarray, embeddings: Embeddings, doc_ids: np.ndarray, k: int) -> np.ndarray:
    """int64 [n, k]: the best documents by exact inner product, block by block."""
    faiss = indexes.load_faiss()
    queries = np.ascontiguousarray(queries, np.float32)
    best = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
    for start in range(0, len(embeddings), _COMPARED):
        rows = np.arange(start, min(start + _COMPARED, len(embeddings)))
        vectors = embeddings.documents(rows)
        scores, near = faiss.knn(queries, vectors, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
        best = merge(best, (scores, doc_ids[rows[near]]), k)
    return best[1]


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean share of each row of `truth` (ids [n, k]) that the same row of `found` holds."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, truth, strict=True)]))
