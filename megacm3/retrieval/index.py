"""Vector indexes: the protocol that a bank needs, and which FAISS index a bank gets: its kind, training and shards.

Vectors have length 1 and are compared by inner product.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from megacm3.errors import ConfigError

logger = logging.getLogger(__name__)

MIN_TRAINING = 39
"""Training vectors a centroid below which FAISS warns of poor clusters."""
TRAINING = 64
"""Training vectors a centroid: 4,096 lists of width 512 then train within half a gigabyte."""


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
        raise ConfigError("faiss is not installed; pip install faiss-cpu (or faiss-gpu, never both)") from fault
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
        logger.info("faiss here sees no GPU: the index is trained on the CPU; faiss-gpu would be faster")
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
