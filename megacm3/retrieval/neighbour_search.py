"""The searches of one block of documents: candidates by picture and caption, without copies, scored and compared.

Queries are the document's picture, and its caption with tokens dropped at random (keyed by seed, document and variant),
as CM3Leon's retrieval does. The scores of what is kept are computed from the stored vectors, whatever the index rounds.
"""

from collections.abc import Callable

import numpy as np

from megacm3.command import seed_from
from megacm3.retrieval.bank import MemoryBank
from megacm3.retrieval.encoder import Encoder
from megacm3.retrieval.neighbours import masks
from megacm3.retrieval.options import NeighbourOptions

_QUERIES = 1024
"""Queries of one search: a fixed number, since sums may differ in the last bit between sizes of a batch."""
_COMPARED = 128
"""Documents whose candidates are compared with one another at once."""


class BlockSearch:
    """The searches of one block."""

    def __init__(
        self, bank: MemoryBank, asking: MemoryBank, options: NeighbourOptions, doc_ids: np.ndarray, rows: np.ndarray
    ) -> None:
        """`doc_ids`, `rows`: the documents that ask, of the bank `asking`, which may be `bank` itself."""
        self._bank, self._asking, self._options = bank, asking, options
        self._doc_ids, self._rows = doc_ids, rows
        self.copies = np.zeros((0, 2), np.int64)
        """Pairs of a document and a copy of it, found so far by vectors."""

    def by_image(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 and ids int64 [n, keep] by the documents' pictures."""
        return self._search(lambda part: self._asking.embeddings.take("image", self._rows[part]))

    def by_text(self, encoder: Encoder | None, variant: int) -> tuple[np.ndarray, np.ndarray]:
        """The same by their captions with dropped tokens, or by the stored text vectors without an encoder."""
        if encoder is None:
            return self._search(lambda part: self._asking.embeddings.take("text", self._rows[part]))
        return self._search(lambda part: self._text_queries(encoder, variant, part))

    def _text_queries(self, encoder: Encoder, variant: int, part: slice) -> np.ndarray:
        # Documents of a block that are in the bank are neighbours there, too.
        rows, options = self._rows[part], self._options
        captions = self._asking.captions(int(rows[0]), int(rows[-1]) + 1)
        pairs = zip(self._doc_ids[part].tolist(), encoder.tokenize(captions), strict=True)
        dropped = [drop_tokens(row, options.query_dropout, options.seed, doc_id, variant) for doc_id, row in pairs]
        return encoder.encode_tokens(dropped, options.batch)

    def _search(self, queries_of: Callable[[slice], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        keep, count = self._options.keep, len(self._rows)
        scores = np.full((count, keep), -np.inf, np.float32)
        ids = np.full((count, keep), -1, np.int64)
        for start in range(0, count, _QUERIES):
            part = slice(start, min(start + _QUERIES, count))
            queries = queries_of(part)
            _, found = self._bank.search(queries, self._options.search)
            scores[part], ids[part] = self._score(queries, self._select(self._rows[part], found))
        return scores, ids

    def _score(self, queries: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores of ids [n, keep] from the stored vectors, both sorted anew by them."""
        scores = np.full(ids.shape, -np.inf, np.float32)
        for start in range(0, len(ids), _COMPARED):
            part = slice(start, start + _COMPARED)
            rows = self._bank.metadata.rows(ids[part])
            vectors = self._vectors(np.maximum(rows, 0))
            scores[part] = np.where(rows >= 0, np.einsum("nd,nkd->nk", queries[part], vectors), -np.inf)
        order = np.lexsort((ids, -scores), axis=1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)

    def _vectors(self, rows: np.ndarray) -> np.ndarray:
        # float32 [n, k, d]: document vectors of rows [n, k], each read once.
        needed, places = np.unique(rows, return_inverse=True)
        return self._bank.embeddings.documents(needed)[places.reshape(rows.shape)]

    def _select(self, own: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The first `keep` of candidates [n, search] that no setting can drop later: not the document, nor a copy of it
        or its caption, nor a copy of a better candidate."""
        metadata, keep = self._bank.metadata, self._options.keep
        rows = metadata.rows(ids)
        clusters, captions = metadata.clusters[rows], metadata.captions[rows]
        good = (ids >= 0) & (captions != self._asking.metadata.captions[own][:, None])
        if self._asking is self._bank:
            # Numbers of documents and clusters mean something within one bank alone.
            good &= (rows != own[:, None]) & (clusters != metadata.clusters[own][:, None])
        better = np.tri(ids.shape[1], k=-1, dtype=bool)
        for part in range(0, len(ids), _COMPARED):
            block = slice(part, part + _COMPARED)
            same = clusters[block, :, None] == clusters[block, None, :]
            good[block] &= ~(same & better & good[block, None, :]).any(2)
        # Copies by vectors cost reading vectors: only what would be kept is looked at, and again where something fell.
        found = np.full((len(ids), keep), -1, np.int64)
        looked = np.zeros_like(good)
        again = np.arange(len(ids))
        while len(again):
            order = np.argsort(~good[again], axis=1, kind="stable")[:, :keep]
            kept = np.take_along_axis(good[again], order, 1)
            found[again, : order.shape[1]] = np.where(kept, np.take_along_axis(ids[again], order, 1), -1)
            fresh = kept & ~np.take_along_axis(looked[again], order, 1)
            looked[again[:, None], order] = True
            copies = self._copies(own[again], np.where(fresh, np.take_along_axis(ids[again], order, 1), -1))
            place, column = np.nonzero(copies)
            good[again[place], order[place, column]] = False
            again = again[np.unique(place)]
        return found

    def _copies(self, own: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """bool [n, k]: which candidates `ids` (-1: none) are copies of document row `own`, by vectors; notes them."""
        near = np.zeros(ids.shape, bool)
        for start in range(0, len(ids), _COMPARED):
            part = slice(start, start + _COMPARED)
            rows = self._bank.metadata.rows(ids[part])
            mine = self._asking.embeddings.documents(own[part])
            cosines = np.einsum("nd,nkd->nk", mine, self._vectors(np.maximum(rows, 0)))
            near[part] = (rows >= 0) & (cosines >= self._options.duplicate)
        document, candidate = np.nonzero(near)
        pairs = np.stack([self._asking.metadata.doc_ids[own[document]], ids[document, candidate]], 1)
        self.copies = np.concatenate([self.copies, pairs])
        return near

    def compare(self, ids: np.ndarray) -> np.ndarray:
        """`alike` bits [n, 2 keep] of candidates `ids` [n, 2 keep]."""
        bits = [masks(np.zeros((0, ids.shape[1], ids.shape[1]), bool), self._options.keep)]
        for start in range(0, len(ids), _COMPARED):
            rows = self._bank.metadata.rows(ids[start : start + _COMPARED])
            vectors = self._vectors(np.maximum(rows, 0))
            similar = np.einsum("nid,njd->nij", vectors, vectors) > self._options.alike
            real = rows >= 0
            bits.append(masks(similar & real[:, :, None] & real[:, None, :], self._options.keep))
        return np.concatenate(bits)


def drop_tokens(tokens: list[int], share: float, seed: int, doc_id: int, variant: int) -> list[int]:
    """`tokens` without each one with probability `share`; at least one stays. Keyed by seed, document and variant."""
    if not share or len(tokens) < 2:
        return tokens
    rng = np.random.Generator(np.random.PCG64(seed_from(seed, "query dropout", doc_id, variant)))
    kept = rng.random(len(tokens)) >= share
    if not kept.any():
        kept[rng.integers(len(tokens))] = True
    return [token for token, keep in zip(tokens, kept.tolist(), strict=True) if keep]
