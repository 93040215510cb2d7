"""A bank's index in Annoy: one file of random projection trees, mapped into memory.

Annoy numbers its items 0..n-1, so items are rows and `BANK/doc_ids.npy` says which documents they are. It has no
filter: as many more hits are asked for as documents are excluded. With one thread and a seed, the same vectors give the
same file.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from megacm3.errors import ConfigError, DataError
from megacm3.retrieval.backends import Source, best_of, import_extra
from megacm3.retrieval.index import VectorIndex

_FILE = "trees.annoy"
_TREES = 64
_LOOKED_AT = 64
"""Nodes looked at for each tree and hit."""


def load() -> ModuleType:
    """The package."""
    return import_extra("annoy", "annoy")


def build(folder: Path, source: Source, kind: str, server: str) -> dict[str, Any]:
    """Plant the trees. `kind`: their number, "auto" for 64."""
    if kind != "auto" and not (kind.isdigit() and int(kind) > 0):
        raise ConfigError(f"--index {kind}: Annoy's index is a number of trees, such as 64")
    trees = _TREES if kind == "auto" else int(kind)
    made = load().AnnoyIndex(source.dim, "angular")
    made.set_seed(source.seed % (1 << 31))
    row = 0
    for _, vectors in source.blocks():
        for vector in vectors:
            made.add_item(row, vector)
            row += 1
    made.build(trees, n_jobs=1)
    (folder / "index").mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "index" / _FILE))
    return {"index": f"annoy {trees} trees", "index_files": [_FILE], "trees": trees}


def open_index(folder: Path, settings: dict[str, Any]) -> VectorIndex:
    """The trees of a bank. Raises DataError when the file is missing or damaged."""
    path = folder / "index" / settings["index_files"][0]
    trees = load().AnnoyIndex(settings["dim"], "angular")
    try:
        trees.load(str(path))
    except OSError as fault:
        raise DataError(f"{path} is missing or damaged: {fault}") from fault
    doc_ids = np.load(folder / "doc_ids.npy", mmap_mode="r")
    if trees.get_n_items() != len(doc_ids):
        raise DataError(f"{path} holds {trees.get_n_items()} vectors; {folder}/doc_ids.npy has {len(doc_ids)}")
    return AnnoyTrees(trees, doc_ids, settings)


class AnnoyTrees:
    """An opened index of Annoy."""

    def __init__(self, trees: Any, doc_ids: np.ndarray, settings: dict[str, Any]) -> None:
        self._trees, self._doc_ids = trees, doc_ids
        self._per_hit = _LOOKED_AT * int(settings["trees"])
        self.dim, self.size = int(settings["dim"]), len(doc_ids)

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `VectorIndex.search`."""
        scores, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        wanted = min(self.size, k + (0 if exclude is None else len(exclude)))
        for n, query in enumerate(np.asarray(queries, np.float32)):
            rows, distances = self._trees.get_nns_by_vector(query, wanted, self._per_hit * wanted, True)
            # Annoy's angular distance is that of unit vectors; the query may be longer.
            cosines = 1 - np.square(np.asarray(distances, np.float32)) / 2
            found = self._doc_ids[np.asarray(rows, np.int64)]
            scores[n], ids[n] = best_of(cosines * np.linalg.norm(query), found, k, exclude)
        return scores, ids
