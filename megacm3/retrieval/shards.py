"""FAISS's index of a bank: immutable shards on disk that share one training, mapped into memory.

Ids are document numbers, given explicitly and never by order. Faults of FAISS that are worked round:

- `IndexShards(successive_ids=True)` gives wrong ids without a word, and so does `big_batch_search` for inner products
  with residuals: neither is used, shards are searched one by one and merged here.
- `search_preassigned` uses one thread unless told to divide the queries.
- A merged index on disk is two files, the second found by a path in the first: it is always looked for beside it.
- A NaN query gives -1 everywhere: the bank refuses such queries. Adding to an index on disk corrupts it: no `add`.
"""

import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megacm3.errors import ConfigError, DataError
from megacm3.retrieval.index import default_nprobe, inverted_lists, load_faiss

_ID_MAPS = (b"IxMp", b"IxM2")
"""First bytes of a faiss file that holds an id map."""
_BY_QUERY = 3
"""`parallel_mode` of faiss in which threads share the queries, inside `search_preassigned`, too."""


class FaissShards:
    """Immutable FAISS shards on disk, mapped into memory, searched one after another and merged."""

    def __init__(self, paths: list[Path], nprobe: int = 0) -> None:
        """Open the shards. `nprobe`: lists searched of an inverted file, 0 for the default.

        Raises DataError for a file that faiss cannot read or that differs from the others in width or kind.
        """
        assert paths, "a bank has at least one shard"
        self.paths = paths
        self._shards = [_read(path) for path in paths]
        self._lists = [inverted_lists(shard) for shard in self._shards]
        self.dim = int(self._shards[0].d)
        self.size = sum(int(shard.ntotal) for shard in self._shards)
        pairs = zip(self._shards, self._lists, strict=True)
        kinds = {(int(shard.d), 0 if ivf is None else int(ivf.nlist)) for shard, ivf in pairs}
        if len(kinds) != 1:
            raise DataError(f"the shards beside {paths[0]} differ in width or number of lists: {sorted(kinds)}")
        lists = kinds.pop()[1]
        self.nlist = lists
        self.nprobe = min(nprobe or default_nprobe(lists), lists) if lists else 0
        self._listed = isinstance(self._shards[0], load_faiss().IndexIVF)
        """Whether the shards are inverted files themselves, without a transform before."""
        if self._listed:
            for shard in self._shards:
                shard.parallel_mode = _BY_QUERY

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `VectorIndex.search`."""
        queries = np.ascontiguousarray(queries, np.float32)
        faiss = load_faiss()
        selector = None
        if exclude is not None and len(exclude):
            batch = faiss.IDSelectorBatch(np.ascontiguousarray(exclude, np.int64))
            selector = faiss.IDSelectorNot(batch)
        near, order = None, np.arange(len(queries))
        if self._listed:
            # The shards share their centroids: the lists of a query are chosen once. Queries with the same lists follow
            # one another, so that those are still in the cache (a quarter faster, 10,000 queries of a million vectors).
            scores, lists = self._shards[0].quantizer.search(queries, self.nprobe)
            by_list = np.argsort(lists[:, 0], kind="stable")
            # Not where they come in a better order already: several pictures of one thing, for instance.
            order = by_list if _shared(lists[by_list]) > _shared(lists) else order
            queries, near = queries[order], (scores[order], lists[order])
        best = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
        for shard in self._shards:
            if near is not None:
                given = faiss.SearchParametersIVF(sel=selector, nprobe=self.nprobe)
                found = _search_lists(shard, queries, k, near, given)
            elif self.nlist:
                inner = faiss.SearchParametersIVF(sel=selector, nprobe=self.nprobe)
                found = shard.search(queries, k, params=faiss.SearchParametersPreTransform(index_params=inner))
            else:
                found = shard.search(queries, k, params=faiss.SearchParameters(sel=selector) if selector else None)
            best = merge(best, found, k)
        back = np.argsort(order)
        return best[0][back], best[1][back]

    def ids(self) -> np.ndarray:
        """int64 [size]: all ids, sorted."""
        faiss = load_faiss()
        parts = []
        for shard, ivf in zip(self._shards, self._lists, strict=True):
            if ivf is None:
                parts.append(faiss.vector_to_array(shard.id_map))
                continue
            lists = ivf.invlists
            for number in range(self.nlist):
                count = lists.list_size(number)
                if count:
                    parts.append(faiss.rev_swig_ptr(lists.get_ids(number), count).copy())
        return np.sort(np.concatenate(parts)) if parts else np.zeros(0, np.int64)


def merge(
    one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best k of two answers (scores [n, a], ids [n, a]), by score descending, then id ascending; -1 ids last."""
    scores = np.concatenate([one[0], other[0]], 1)
    ids = np.concatenate([one[1], other[1]], 1)
    scores = np.where(ids < 0, np.float32(-np.inf), scores)
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)


def _shared(lists: np.ndarray) -> int:
    # How many lists (int64 [n, nprobe]) neighbouring queries share, of some thousand pairs of neighbours.
    first = np.arange(0, len(lists) - 1, 1 + len(lists) // 1000)
    return int((lists[first, :, None] == lists[first + 1, None, :]).sum())


def _search_lists(
    shard: Any, queries: np.ndarray, k: int, near: tuple[np.ndarray, np.ndarray], given: Any
) -> tuple[np.ndarray, np.ndarray]:
    # faiss's own Python method of this name takes no search parameters. `near`: scores and numbers of the lists.
    faiss = load_faiss()
    scores, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    arrays = [faiss.swig_ptr(array) for array in (queries, near[1], near[0], scores, ids)]
    shard.search_preassigned_c(len(queries), arrays[0], k, *arrays[1:], False, given)
    return scores, ids


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send what C++ code prints on standard output to nowhere: faiss has messages that no flag turns off."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _read(path: Path) -> Any:
    faiss = load_faiss()
    if not path.is_file():
        raise DataError(f"{path} is missing")
    try:
        with open(path, "rb") as file:
            flat = file.read(4) in _ID_MAPS
        if path.with_suffix(".ivfdata").exists():
            # Mapped by itself; with IO_FLAG_MMAP the first search would crash the process.
            flags = faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR
        else:
            flags = faiss.IO_FLAG_MMAP_IFC if flat else faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
        with quiet_stdout():
            index = faiss.read_index(str(path), flags)
    except (RuntimeError, OSError) as fault:
        raise DataError(f"{path} is damaged or no faiss index: {str(fault).splitlines()[-1][:200]}") from fault
    if index.ntotal == 0:
        raise DataError(f"{path} is an empty shard; a bank has none")
    return index


def write_shard(path: Path, trained: Any, blocks: Iterable[tuple[np.ndarray, np.ndarray]], threads: int = 1) -> None:
    """Add blocks of ids (int64 [n]) and vectors (float32 [n, d]) to a copy of the empty `trained` index and write it.

    Finding the list of each vector takes nearly all of the time: `threads` blocks at once, each by one thread, so that
    the bytes do not depend on their number, while this thread reads and adds. Raises DataError for no vectors (an empty
    index on disk cannot be read again) or ones that are not finite.
    """
    faiss = load_faiss()
    index = faiss.clone_index(trained)
    listed = isinstance(index, faiss.IndexIVF)

    def place(block: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        ids, vectors = np.ascontiguousarray(block[0], np.int64), np.ascontiguousarray(block[1], np.float32)
        if not np.isfinite(vectors).all():
            raise DataError(f"{path}: {int((~np.isfinite(vectors).all(1)).sum())} vectors are not finite")
        return ids, vectors, index.quantizer.search(vectors, 1)[1].ravel() if listed else None

    with ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        for ids, vectors, lists in _ahead((pool.submit(place, block) for block in blocks), 2 * threads):
            if lists is None:
                index.add_with_ids(vectors, ids)
                continue
            arrays = [faiss.swig_ptr(array) for array in (vectors, ids, lists)]
            index.add_core(len(ids), *arrays)
    if not index.ntotal:
        raise DataError(f"{path} would be an empty shard")
    write_index(index, path)


def write_index(index: Any, path: Path) -> None:
    """Write a faiss index. Raises DataError when there is no room, or no such folder."""
    try:
        load_faiss().write_index(index, str(path))
    except RuntimeError as fault:
        raise DataError(f"{path} cannot be written: {str(fault).splitlines()[-1][-200:]}") from fault


def _ahead(work: Iterator[Future[Any]], count: int) -> Iterator[Any]:
    # Results in order; up to `count` more are begun before one is asked for.
    begun: deque[Future[Any]] = deque()
    for future in work:
        begun.append(future)
        if len(begun) > count:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def merge_shards(trained: Path, shards: list[Path], target: Path) -> None:
    """Merge inverted-file shards into `target` and its `.ivfdata`, on disk, without holding them in memory.

    Raises ConfigError for a kind of index that faiss cannot merge (fast-scan PQ).
    """
    faiss = load_faiss()
    from faiss.contrib.ondisk import merge_ondisk

    index = faiss.read_index(str(trained))
    data = target.with_suffix(".ivfdata")
    try:
        with quiet_stdout():
            merge_ondisk(index, [str(path) for path in shards], str(data))
    except RuntimeError as fault:
        raise ConfigError(f"--merge: faiss cannot merge this kind of index: {str(fault)[-120:]}") from fault
    # The name alone, so that the files are the same wherever they are made.
    lists = faiss.downcast_InvertedLists(inverted_lists(index).invlists)
    lists.filename = data.name
    write_index(index, target)
