"""Copies: documents that a held-out store has, too, and clusters of documents found to be copies of one another."""

from collections.abc import Iterator, Sequence

import numpy as np

from megacm3.errors import DataError
from megacm3.files import Manifest
from megacm3.retrieval.bank import MemoryBank

_QUERIES = 1024
"""Queries of one search."""
_NEAR = 16
"""Nearest documents looked at for copies of a held-out one."""


def held_out_copies(bank: MemoryBank, held_out: Sequence[str], duplicate: float) -> np.ndarray:
    """bool [rows]: documents of `bank` that are copies of one in the banks `held_out`: the same picture, the same
    caption, or a document vector within `duplicate` of its nearest ones.

    Raises DataError for a bank of another encoder.
    """
    copies = np.zeros(len(bank), bool)
    for folder in held_out:
        other = MemoryBank.open(folder)
        check_same_encoder(bank, other)
        copies |= np.isin(bank.metadata.captions, np.asarray(other.metadata.captions))
        pictures = set(_pictures(other))
        copies |= np.fromiter((name in pictures for name in _pictures(bank)), bool, len(bank))
        for start in range(0, len(other), _QUERIES):
            vectors = other.embeddings.documents(np.arange(start, min(start + _QUERIES, len(other))))
            rows = bank.metadata.rows(bank.search(vectors, min(_NEAR, len(bank)))[1])
            # By the stored vectors: the index rounds its scores.
            needed, places = np.unique(np.maximum(rows, 0), return_inverse=True)
            near = bank.embeddings.documents(needed)[places.reshape(rows.shape)]
            copies[rows[(rows >= 0) & (np.einsum("nd,nkd->nk", vectors, near) >= duplicate)]] = True
    return copies


def _pictures(bank: MemoryBank) -> Iterator[str]:
    for part, rows in enumerate(bank.settings["parts"]):
        if rows:
            yield from bank.table(part, ["image_sha256"])["image_sha256"].to_pylist()


def check_same_encoder(bank: "MemoryBank | Manifest", other: "MemoryBank | Manifest") -> None:
    """Raises DataError for banks whose vectors have nothing to do with each other, though all numbers may fit."""
    if bank.inputs["encoder"] != other.inputs["encoder"] or bank.settings["dim"] != other.settings["dim"]:
        raise DataError(
            f"two banks of different encoders: {bank.inputs['encoder'][:12]} and {other.inputs['encoder'][:12]}; "
            "make both with the same --encoder"
        )


def join_clusters(clusters: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """int64 [rows]: clusters joined by pairs of rows [m, 2]; each gets the smallest number of those that it joins."""
    if len(pairs) and pairs.min() < 0:
        raise DataError("a pair of copies names a document that is not in the bank")
    names, labels = np.unique(clusters, return_inverse=True)
    parent = np.arange(len(names))
    left, right = labels[pairs[:, 0]], labels[pairs[:, 1]]
    while True:
        before = parent.copy()
        smallest = np.minimum(parent[left], parent[right])
        np.minimum.at(parent, left, smallest)
        np.minimum.at(parent, right, smallest)
        parent = parent[parent]
        if np.array_equal(before, parent):
            return names[parent][labels]
