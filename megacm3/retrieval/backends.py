"""Which vector index a bank has: FAISS in its own folder by default, or one of the optional backends.

    faiss     shards in BANK/index (index.py); all that training needs
    annoy     one file in BANK/index, mapped (annoy_index.py)
    milvus    Milvus Lite in BANK/index, or a Milvus server (milvus_index.py)
    pinecone  an index in Pinecone's service (pinecone_index.py)

Every backend has `build` and `open_index`. The bank's manifest names the backend, so that opening a bank needs no flag.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from megacm3.errors import ConfigError, DataError
from megacm3.retrieval.index import VectorIndex
from megacm3.retrieval.shards import FaissShards

FAISS = "faiss"
OTHERS = {"annoy": "annoy_index", "milvus": "milvus_index", "pinecone": "pinecone_index"}
_AT_ONCE = 4096


@dataclass(frozen=True)
class Source:
    """Document vectors for a backend to take."""

    embeddings: Any
    """A bank's `Embeddings`."""
    doc_ids: np.ndarray
    """int64 [rows], ascending."""
    dim: int
    name: str
    """A name of its own for this bank where several share a server: letters, digits and underscores."""
    seed: int

    def __len__(self) -> int:
        return len(self.doc_ids)

    def blocks(self, rows: int = _AT_ONCE) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """doc_ids int64 [n] and vectors float32 [n, d], block by block. Raises DataError where one is not finite."""
        for start in range(0, len(self), rows):
            span = np.arange(start, min(start + rows, len(self)))
            vectors = self.embeddings.documents(span)
            if not np.isfinite(vectors).all():
                raise DataError(f"{int((~np.isfinite(vectors).all(1)).sum())} vectors are not finite")
            yield self.doc_ids[span], vectors


def check_backend(backend: str, server: str, merge: bool) -> None:
    """Raises ConfigError for a backend that is none, not installed, or does not take the other flags."""
    if backend not in (FAISS, *OTHERS):
        raise ConfigError(f"--backend {backend}; expected one of {', '.join((FAISS, *OTHERS))}")
    if server and backend not in ("milvus", "pinecone"):
        raise ConfigError(f"--server is for milvus and pinecone; --backend is {backend}")
    if backend == "pinecone" and not server:
        raise ConfigError("--backend pinecone needs --server, the address of the index (https://NAME.svc...)")
    if merge and backend != FAISS:
        raise ConfigError(f"--merge is for faiss; --backend is {backend}")
    if backend != FAISS:
        _module(backend).load()


def build(backend: str, folder: Path, source: Source, kind: str, server: str) -> dict[str, Any]:
    """Put all vectors into the index of a bank-to-be; gives the settings with which `open_index` finds it.

    `kind`: the kind of index in the backend's own words, "auto" for one by size.
    """
    made = _module(backend).build(folder, source, kind, server)
    return {"backend": backend, "shards": 1, "nprobe": 0, "recall": {}} | made


def open_index(folder: Path, settings: dict[str, Any]) -> VectorIndex:
    """The index of a bank's folder and settings.

    Raises DataError when it is missing, damaged or lost, ConfigError when the backend is not installed.
    """
    backend = settings.get("backend", FAISS)
    if backend == FAISS:
        return FaissShards([folder / "index" / name for name in settings["index_files"]], settings["nprobe"])
    if backend not in OTHERS:
        raise DataError(f"{folder}/manifest.json names the backend {backend}; this version knows {', '.join(OTHERS)}")
    module = _module(backend)
    module.load()
    return module.open_index(folder, settings)


def close(index: VectorIndex) -> None:
    """Let go of what an index holds open: a server's connection, a lock."""
    if hasattr(index, "close"):
        index.close()


def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"megacm3.retrieval.{OTHERS[backend]}")


def import_extra(package: str, extra: str) -> ModuleType:
    """An optional package. Raises ConfigError naming the extra that brings it."""
    try:
        return importlib.import_module(package)
    except ImportError as fault:
        raise ConfigError(
            f"the backend {extra} needs the package {package}, which cannot be imported ({fault}); "
            f"in the checkout: pip install -e '.[{extra}]'"
        ) from fault


def best_of(scores: np.ndarray, ids: np.ndarray, k: int, exclude: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The best k of hits of one query (scores [m], ids [m]) without those of `exclude`: scores float32 [k] descending,
    equal ones by id, and ids int64 [k]; -inf and -1 where there are fewer."""
    if exclude is not None and len(exclude):
        kept = ~np.isin(ids, exclude)
        scores, ids = scores[kept], ids[kept]
    order = np.lexsort((ids, -scores))[:k]
    best = np.full(k, -np.inf, np.float32), np.full(k, -1, np.int64)
    best[0][: len(order)], best[1][: len(order)] = scores[order], ids[order]
    return best
