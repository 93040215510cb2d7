"""Which retrieved documents stand before a sample: drawn at training time from stored candidates.

Two candidates by the document's picture and two by its caption (a variant drawn at random), best first, of which as
many are drawn as the sample wants (CM3Leon 2.1: always three; order at random). Never drawn: the document itself, a
copy of it (same cluster), one with its caption, a copy of a held-out document, one that scores above `max_score`, one
too much like another one drawn.
A list with fewer than two fit candidates is made up for by the other one; where both are short, fewer are drawn.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megacm3.errors import ConfigError, DataError
from megacm3.retrieval.neighbours import IMAGE, TEXT, NeighbourTable

MODES = ("neighbours", "random", "none")
_EACH = 2
"""Candidates by picture, and by caption."""
_TRIES = 64
"""Random documents tried for each one wanted, in mode "random"."""


class RetrievalSampler:
    """Draws retrieved documents for the documents of one store. It can be pickled to workers."""

    def __init__(
        self,
        table: NeighbourTable,
        probabilities: Sequence[float] = (0, 0, 0, 1),
        max_score: float = 0.9,
        mode: str = "neighbours",
    ) -> None:
        """probabilities: of 0, 1, 2, ... retrieved documents (at most 4). mode: "neighbours", or as controls "random"
        (any documents, same filters but the score) and "none".

        Raises ConfigError for probabilities that are none, or an unknown mode.
        """
        weights = np.asarray(probabilities, np.float64)
        if not 1 <= len(weights) <= 2 * _EACH + 1 or not (weights >= 0).all() or abs(weights.sum() - 1) > 1e-6:
            raise ConfigError(
                f"retrieval.documents = {list(probabilities)}; expected the probabilities of 0, 1, 2, ... documents "
                f"(at most {2 * _EACH}), which add up to 1"
            )
        if mode not in MODES:
            raise ConfigError(f"retrieval.mode = {mode}; expected one of {', '.join(MODES)}")
        if not np.isfinite(max_score):
            raise ConfigError(f"retrieval.max_score = {max_score}; expected a number, such as 0.9")
        self.table, self.mode, self.max_score = table, mode, float(max_score)
        self._cumulated = np.cumsum(weights / weights.sum())

    def sample(self, doc_id: int, rng: np.random.Generator) -> list[int]:
        """Numbers of the documents to put before document `doc_id`, in that order: 0 to 4, fewer where few are fit.

        The same `rng` state gives the same documents. Raises DataError for a document that the table does not have.
        """
        if not 0 <= doc_id < len(self.table):
            raise DataError(f"document {doc_id} is not in {self.table.folder}; expected 0..{len(self.table) - 1}")
        if self.mode == "none":
            return []
        wanted = int(np.searchsorted(self._cumulated, rng.random(), side="right"))
        wanted = min(wanted, len(self._cumulated) - 1)
        if wanted == 0:
            return []
        pool = self._random(doc_id, wanted, rng) if self.mode == "random" else self._pool(doc_id, rng)
        return [pool[i] for i in rng.permutation(len(pool))[:wanted].tolist()]

    def _pool(self, doc_id: int, rng: np.random.Generator) -> list[int]:
        # Up to four documents: two of each list, or more of one where the other is short.
        table = self.table
        variant = int(rng.integers(table.variants))
        lists = [table.candidates(doc_id, IMAGE), table.candidates(doc_id, TEXT, variant)]
        candidates = _Candidates(table, doc_id, np.concatenate([found[0] for found in lists]))
        candidates.alike = table.alike(doc_id, variant)
        within = np.concatenate([found[1] for found in lists]) <= self.max_score
        fit = np.flatnonzero(candidates.allowed & within).tolist()
        halves = [[i for i in fit if i < table.keep], [i for i in fit if i >= table.keep]]
        drawn: list[int] = []
        for half in halves:
            candidates.take(half, len(drawn) + _EACH, drawn)
        for half in halves:
            candidates.take(half, 2 * _EACH, drawn)
        return candidates.ids[drawn].tolist()

    def _random(self, doc_id: int, wanted: int, rng: np.random.Generator) -> list[int]:
        # A fixed number of tries: a bank of two documents must not keep training waiting.
        metadata = self.table.metadata
        ids = np.asarray(metadata.doc_ids[rng.integers(len(metadata), size=wanted * _TRIES)])
        candidates = _Candidates(self.table, doc_id, ids)
        drawn: list[int] = []
        candidates.take(np.flatnonzero(candidates.allowed).tolist(), wanted, drawn)
        return candidates.ids[drawn].tolist()


class _Candidates:
    """Candidates of one document and which of them go together."""

    def __init__(self, table: NeighbourTable, doc_id: int, ids: np.ndarray) -> None:
        metadata, asking = table.metadata, table.asking
        rows, own = metadata.rows(ids), int(asking.rows(np.array([doc_id]))[0])
        self.ids = ids
        self.alike = [0] * len(ids)
        """For each candidate, the bits of those that resemble it."""
        self._clusters, self._captions = metadata.clusters[rows], metadata.captions[rows]
        self.allowed = (rows >= 0) & ~metadata.held_out[rows]
        """bool: neither missing, nor a copy of a held-out document, nor the document itself, nor a copy of it, nor one
        with its caption."""
        if own >= 0:
            self.allowed &= self._captions != asking.captions[own]
        if not table.foreign:
            self.allowed &= ids != doc_id
        if own >= 0 and not table.foreign:
            self.allowed &= self._clusters != metadata.clusters[own]

    def take(self, positions: list[int], most: int, drawn: list[int]) -> None:
        """Add positions to `drawn`, in their order, until it holds `most`; none that is like one in it."""
        for i in positions:
            if len(drawn) >= most:
                return
            if not any(self._too_alike(i, j) for j in drawn):
                drawn.append(i)

    def _too_alike(self, i: int, j: int) -> bool:
        same = self._clusters[i] == self._clusters[j] or self._captions[i] == self._captions[j]
        return bool(same or self.ids[i] == self.ids[j] or self.alike[i] >> j & 1)


def open_sampler(
    folder: str | Path,
    store_fingerprint: str,
    documents: int,
    probabilities: Sequence[float] = (0, 0, 0, 1),
    max_score: float = 0.9,
    mode: str = "neighbours",
) -> RetrievalSampler:
    """The sampler of a neighbour folder for the store with this fingerprint and number of documents.

    Raises DataError when the neighbours are missing, damaged, or those of another store.
    """
    table = NeighbourTable.open(folder)
    if table.foreign:
        raise DataError(
            f"{folder} holds the neighbours of held-out documents in another store, for evaluation; training needs "
            "those of the store itself: tools/find_neighbours.py without --queries"
        )
    if table.inputs.get("store") != store_fingerprint or len(table) != documents:
        raise DataError(
            f"{folder} holds the neighbours of store {table.inputs.get('store', '')[:12]} ({len(table)} documents); "
            f"expected {store_fingerprint[:12]} ({documents}): make them again with tools/find_neighbours.py"
        )
    return RetrievalSampler(table, probabilities, max_score, mode)
