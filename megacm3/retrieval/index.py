"""Vector indexes: the protocol that a bank needs, the rule that chooses one by size, and the FAISS one.

A FAISS index here is a list of immutable shards that share one training. Vectors have length 1 and are compared by
inner product; ids are document numbers, given explicitly and never by order. Faults of FAISS that are worked round:

- `IndexShards(successive_ids=True)` and `big_batch_search` (inner product with residuals) give wrong ids without a
  word: shards are searched one by one and merged here, and residuals are off.
- A merged index on disk is two files, the second found by a path in the first: it is always looked for beside it.
- A NaN query gives -1 everywhere: the bank refuses such queries. Adding to an index on disk corrupts it: no `add`.
"""

import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from megacm3.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

MAX_TRAINING = 256
"""Training vectors a centroid that FAISS uses at most."""
MIN_TRAINING = 39
"""Training vectors a centroid below which FAISS warns of poor clusters."""
TRAINING = 64
"""Training vectors a centroid: 4,096 lists of width 512 then train within half a gigabyte."""

_ID_MAPS = (b"IxMp", b"IxM2")
"""First bytes of a faiss file that holds an id map."""


class VectorIndex(Protocol):
    """What a bank asks of its index. FAISS is built in; others (a server, for instance) fit behind the same methods."""

    @property
    def dim(self) -> int:
        """Width of the vectors."""

    @property
    def size(self) -> int:
        """Number of vectors."""

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 [n, k] (inner products, descending; equal ones by id) and ids int64 [n, k].

        Where fewer than k are found: score -inf, id -1. `exclude`: ids that no answer may hold.
        """


def load_faiss() -> ModuleType:
    """The faiss module, imported after torch: the other order has crashed processes.

    Raises ConfigError when it is not installed.
    """
    import torch  # noqa: F401

    try:
        import faiss
    except ImportError as fault:
        raise ConfigError("faiss is not installed; pip install faiss-cpu (or faiss-gpu), or megacm3[cpu]") from fault
    return faiss


def gpu_count(device: str) -> int:
    """GPUs that faiss may use for a job on `device`: those of faiss-gpu where the job runs on CUDA, else 0; said once
    in the log of a job."""
    if not device.startswith("cuda"):
        return 0
    faiss = load_faiss()
    count = int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0
    if count:
        logger.info("faiss trains the index on %d GPUs", count)
    else:
        logger.info("faiss here sees no GPU: the index is trained on the CPU; faiss-gpu (megacm3[gpu]) would be faster")
    return count


def train(index: Any, vectors: np.ndarray, gpus: int = 0) -> None:
    """Train an index on float32 [n, d]; with GPUs the clustering, which takes nearly all of the time, runs on all."""
    ivf = inverted_lists(index)
    if gpus and ivf is not None:
        faiss = load_faiss()
        ivf.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(ivf.d))
    index.train(vectors)
    if gpus and ivf is not None:
        ivf.clustering_index = None


@contextmanager
def faiss_threads(count: int) -> Iterator[ModuleType]:
    """faiss with `count` threads inside the block."""
    faiss = load_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)


def choose_index(documents: int) -> str:
    """Factory string for a bank of that many documents.

    Exact below 10,000, where a search takes under a millisecond and a sixteenth of the lists would lose one neighbour
    in ten. Above, autofaiss's rule of lists by size (4 sqrt(n) rounded to a power of two below a million; 16,384,
    65,536 and 131,072 lists above), with scalar quantisers: fp16 below a million, 8 bit above, where PQ would lose too
    many neighbours for training data (recall@10 0.98 against 0.55, measured on 60,000 x 256).
    """
    if documents < 10_000:
        return "Flat"
    if documents <= 1_000_000:
        lists = 2 ** round(math.log2(4 * math.sqrt(documents)))
        lists = min(lists, 2 ** int(math.log2(documents / MIN_TRAINING)))
    else:
        lists = 16_384 if documents < 10_000_000 else 65_536 if documents < 300_000_000 else 131_072
    coarse = f"IVF{lists}" + ("_HNSW32" if lists >= 65_536 else "")
    quantiser = "SQfp16" if documents < 1_000_000 else "SQ8"
    return f"{coarse},{quantiser}"


def new_index(factory: str, dim: int) -> Any:
    """An empty index for unit vectors that takes explicit ids. Raises ConfigError for a factory that faiss refuses."""
    faiss = load_faiss()
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as fault:
        raise ConfigError(f"--index {factory} is no factory string of faiss for vectors of width {dim}") from fault
    ivf = inverted_lists(index)
    if ivf is None and factory == "Flat":
        mapped = faiss.IndexIDMap2(index)
        mapped.referenced_objects = [index]
        return mapped
    if ivf is None or not isinstance(index, (faiss.IndexIVF, faiss.IndexPreTransform)):
        raise ConfigError(f"--index {factory}: expected Flat, IVF..., or a transform and IVF... (PCA256,IVF4096,SQ8)")
    ivf.by_residual = False
    return index


def inverted_lists(index: Any) -> Any:
    """The IndexIVF inside `index`, or None."""
    faiss = load_faiss()
    return faiss.try_extract_index_ivf(index)


def training_rows(documents: int, index: Any) -> int:
    """How many vectors to train `index` on, `TRAINING` a list."""
    ivf = inverted_lists(index)
    return min(documents, TRAINING * ivf.nlist) if ivf is not None else 0


def shard_size(documents: int) -> int:
    """Vectors of a shard: a million for banks up to 64 million, at most 64 shards up to a billion, 16 million vectors
    above. Every shard holds a piece of every list: four shards of a million vectors answer a fifth more slowly than
    one."""
    return 1 << min(24, max(20, math.ceil(math.log2(max(1, documents / 64)))))


def default_nprobe(lists: int) -> int:
    """Lists searched when nothing was measured: a sixteenth of them, at most 256."""
    return max(1, min(lists // 16, 256))


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

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `VectorIndex.search`."""
        queries = np.ascontiguousarray(queries, np.float32)
        faiss = load_faiss()
        selector = None
        if exclude is not None and len(exclude):
            batch = faiss.IDSelectorBatch(np.ascontiguousarray(exclude, np.int64))
            selector = faiss.IDSelectorNot(batch)
        plain = isinstance(self._shards[0], faiss.IndexIVF)
        # The shards share their centroids: the lists of a query are chosen once.
        near = self._shards[0].quantizer.search(queries, self.nprobe) if plain else None
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
        return best

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
    the bytes do not depend on their number. Raises DataError for no vectors (an empty index on disk cannot be read
    again) or ones that are not finite.
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
        for group in _groups(blocks, threads):
            for ids, vectors, lists in pool.map(place, group):
                if lists is None:
                    index.add_with_ids(vectors, ids)
                    continue
                arrays = [faiss.swig_ptr(array) for array in (vectors, ids, lists)]
                index.add_core(len(ids), *arrays)
    if not index.ntotal:
        raise DataError(f"{path} would be an empty shard")
    faiss.write_index(index, str(path))


def _groups(blocks: Iterable[Any], count: int) -> Iterator[list[Any]]:
    blocks = iter(blocks)
    while group := list(islice(blocks, count)):
        yield group


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
    faiss.write_index(index, str(target))
