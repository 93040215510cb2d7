"""A bank's index in Pinecone's service, by its official client.

The index must exist, be made for vectors of the bank's width (metric dotproduct or cosine), and its address is given as
--server; each bank has a namespace of its own in it. The key is read from the environment variable PINECONE_API_KEY,
and so never written anywhere. Record ids are document numbers.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from megacm3.errors import ConfigError, DataError
from megacm3.retrieval.backends import Source, best_of, import_extra
from megacm3.retrieval.index import VectorIndex

_KEY = "PINECONE_API_KEY"
_REQUEST_BYTES = 1_500_000
"""Of vectors in one request (the service takes 2 MB), as text about 12 bytes a number."""
_MOST = 10_000
"""Hits that the service gives at most."""

T = TypeVar("T")


def load() -> ModuleType:
    """The package."""
    return import_extra("pinecone", "pinecone")


def build(folder: Path, source: Source, kind: str, server: str) -> dict[str, Any]:
    """Put all vectors into a namespace of the index."""
    if kind != "auto":
        raise ConfigError(f"--index {kind}: Pinecone chooses its index itself; leave --index out")
    index = _connect(server)
    found = _asked(server, index.describe_index_stats)
    if found.dimension != source.dim:
        raise DataError(f"the index {server} is for vectors of width {found.dimension}; the bank's have {source.dim}")
    rows = max(1, min(1000, _REQUEST_BYTES // (12 * source.dim)))
    for ids, vectors in source.blocks(rows):
        batch = [(str(number), vector.tolist()) for number, vector in zip(ids.tolist(), vectors, strict=True)]
        _asked(server, partial(index.upsert, vectors=batch, namespace=source.name))
    return {"index": "pinecone", "index_files": [], "server": server, "collection": source.name}


def _connect(server: str) -> Any:
    if not os.environ.get(_KEY):
        raise ConfigError(f"Pinecone at {server} needs a key: set the environment variable {_KEY}")
    try:
        return load().Pinecone().index(host=server)
    except load().PineconeError as fault:
        raise ConfigError(f"--server {server} is no address of a Pinecone index: {fault}") from fault


def _asked(server: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except load().PineconeError as fault:
        raise DataError(f"Pinecone at {server}: {' '.join(str(fault).split())[:300]}") from fault


def open_index(folder: Path, settings: dict[str, Any]) -> VectorIndex:
    """The namespace of a bank. Raises DataError when the service cannot be reached or refuses."""
    server, name = settings["server"], settings["collection"]
    index = _connect(server)
    found = _asked(server, index.describe_index_stats)
    own = (found.namespaces or {}).get(name)
    if own is None:
        raise DataError(f"Pinecone at {server} has no namespace {name}; build the bank again")
    return PineconeNamespace(index, settings, int(found.dimension), int(own.vector_count))


class PineconeNamespace:
    """An opened namespace. One request a query: the service takes no more."""

    def __init__(self, index: Any, settings: dict[str, Any], dim: int, size: int) -> None:
        self._index, self._server, self._name = index, settings["server"], settings["collection"]
        self.dim, self.size = dim, size

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `VectorIndex.search`. Raises ConfigError for more hits than the service gives (10,000)."""
        wanted = min(self.size, k + (0 if exclude is None else len(exclude)))
        if wanted > _MOST:
            raise ConfigError(f"k = {k} and {wanted - k} excluded documents: Pinecone gives at most {_MOST} hits")
        scores, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        for n, query in enumerate(np.asarray(queries, np.float32).tolist()):
            asked = partial(self._index.query, vector=query, top_k=wanted, namespace=self._name)
            hits = _asked(self._server, asked).matches
            near = np.array([hit.score for hit in hits], np.float32)
            scores[n], ids[n] = best_of(near, np.array([int(hit.id) for hit in hits], np.int64), k, exclude)
        return scores, ids
