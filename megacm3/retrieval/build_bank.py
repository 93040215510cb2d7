"""Making a bank: embed every part of the store, train an index once, add shard by shard, measure its recall.

Each stage is units under `BANK.work` (units.py): embedding and adding run on any number of workers, can be killed and
started again, and leave the same bytes.
"""

import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megacm3.command import seed_from
from megacm3.data.executors import ExecutorOptions
from megacm3.data.store import Store
from megacm3.errors import ConfigError, DataError
from megacm3.faults import strike
from megacm3.files import Manifest, new_file, sha256_json, write_json
from megacm3.retrieval import backends
from megacm3.retrieval import index as indexes
from megacm3.retrieval.bank import KIND, Embeddings, caption_hash, part_file
from megacm3.retrieval.embed import EmbedParts
from megacm3.retrieval.encoder import encoder_fingerprint
from megacm3.retrieval.precomputed import PREFIX, Precomputed
from megacm3.retrieval.train_encoder import copy_encoder
from megacm3.retrieval.units import FOLDER, Job, run_units

logger = logging.getLogger(__name__)

_AT_ONCE = 8192
"""Vectors in memory at once, where all are gone through."""
_COMPARED = 65_536
"""Vectors that exact answers are compared with at once: merging the answers of small blocks takes longer than they."""
_EVALUATED = 1000
"""Queries of each kind with which the recall is measured."""
_EXACT_BUDGET = 2e12
"""Multiplications that the exact answers may take (a minute or so on a core); fewer queries above."""
TARGET_RECALL = 0.95


@dataclass(frozen=True)
class BankOptions:
    """A bank to be made."""

    store: str
    encoder: str
    """A CLIP folder, or precomputed:DIR."""
    output: str
    inputs: tuple[str, ...] = ()
    """Paths and globs that the store was made from."""
    index: str = "auto"
    """A factory string of faiss, or another backend's own word; auto: by the number of documents."""
    backend: str = backends.FAISS
    """faiss, annoy, milvus or pinecone (backends.py)."""
    server: str = ""
    """Address of a Milvus server or of a Pinecone index."""
    shard_rows: int = 0
    """Vectors of an index shard; 0: by the number of documents (`index.shard_size`)."""
    nprobe: int = 0
    """Lists searched of an inverted file; 0: the fewest that reach a recall@10 of 0.95, at most a sixteenth."""
    merge: bool = False
    """Merge the shards of an inverted file into one index on disk."""
    batch: int = 64
    seed: int = 0
    workers: int = 0
    """Units at once; 0: one below 20,000 documents, else one a core."""
    device: str = "cpu"
    executor: str = "local"
    """Where units run: local, slurm or ray; nothing of it changes the bank."""
    slurm: dict[str, str] = field(default_factory=dict)
    """Options of sbatch, as in `ExecutorOptions`."""
    overwrite: bool = False

    @property
    def where(self) -> ExecutorOptions:
        """For `run_units`."""
        return ExecutorOptions(self.executor, self.workers, device=self.device, slurm=self.slurm)


@dataclass(frozen=True)
class BankReport:
    """What was made."""

    rows: int
    documents: int
    index: str
    shards: int
    recall: dict[str, float]
    """recall@10 of image and text queries against exact search; empty for an exact index."""
    seconds: float
    """0 when the bank was there already."""


def build_bank(options: BankOptions) -> BankReport:
    """Make or continue a bank. Raises ConfigError for flags, DataError for inputs that do not belong together."""
    started = time.monotonic()
    _check(options)
    store = Store.open(options.store)
    precomputed = options.encoder.removeprefix(PREFIX) if options.encoder.startswith(PREFIX) else ""
    fingerprint = Precomputed.open(precomputed).fingerprint if precomputed else encoder_fingerprint(options.encoder)
    names = ("index", "backend", "server", "shard_rows", "nprobe", "merge", "batch", "seed")
    settings = {name: getattr(options, name) for name in names}
    inputs = {"store": store.fingerprint, "encoder": fingerprint}
    job = Job(Path(options.output), KIND, settings, inputs)
    finished = job.finished(options.overwrite)
    if not finished:
        with job.alone():
            finished = job.finished(options.overwrite)
            if not finished:
                return _report(_make(options, job, store, precomputed), time.monotonic() - started)
    logger.info("%s is finished already: same store, encoder and settings", options.output)
    return _report(finished, 0.0)


def _make(options: BankOptions, job: Job, store: Store, precomputed: str) -> Manifest:
    job.prepare(options.overwrite)
    encoder = "" if precomputed else options.encoder
    parts = len(store.settings["parts"])
    units = EmbedParts(options.store, encoder, precomputed, options.inputs, parts, options.batch, options.device)
    workers = options.workers or (1 if len(store) < 20_000 else 0)
    run_units(units, job.work, workers, options.where)
    rows = _write_rows(job.folder, store)
    if encoder and not (job.folder / "encoder").is_dir():
        copy_encoder(encoder, job.folder / "encoder")
    made = _index(options, job, rows, workers)
    made |= {"dim": _dim(job.folder, rows), "documents": len(store), "rows": sum(rows), "parts": rows}
    return job.commit(made | {"precomputed": bool(precomputed)}, options.overwrite)


def _check(options: BankOptions) -> None:
    if options.shard_rows < 0 or options.batch < 1 or options.nprobe < 0:
        raise ConfigError("--batch must be at least 1, --shard-size and --nprobe at least 0")
    if not options.inputs and not options.encoder.startswith(PREFIX):
        raise ConfigError("--input is needed: the pictures and captions that the store was made from")
    options.where.check()
    backends.check_backend(options.backend, options.server, options.merge)


def _report(bank: Manifest, seconds: float) -> BankReport:
    made = bank.settings
    return BankReport(made["rows"], made["documents"], made["index"], made["shards"], made["recall"], seconds)


def _dim(folder: Path, rows: list[int]) -> int:
    return int(Embeddings(folder, rows).take("image", np.zeros(1, np.int64)).shape[1])


def _write_rows(folder: Path, store: Store) -> list[int]:
    """Rows of each part; writes doc_ids, captions and clusters. Raises DataError for a bank without documents."""
    import pyarrow.parquet as pq

    rows: list[int] = []
    ids: list[np.ndarray] = []
    captions: list[np.ndarray] = []
    for number in range(len(store.settings["parts"])):
        path = part_file(folder, "meta", number)
        table = pq.read_table(path, columns=["doc_id", "caption"]) if path.is_file() else None
        rows.append(len(table) if table is not None else 0)
        if table is not None:
            ids.append(table["doc_id"].to_numpy())
            captions.append(np.array([caption_hash(caption) for caption in table["caption"].to_pylist()], np.uint64))
    if not ids:
        raise DataError(f"{store.folder} holds no document with a picture and a caption; a memory bank needs some")
    doc_ids = np.concatenate(ids)
    if not (np.diff(doc_ids) > 0).all():
        raise DataError("document numbers of the parts are not ascending")
    clusters = np.asarray(store.metadata(["dup_cluster"])["dup_cluster"].to_numpy(), np.int64)[doc_ids]
    arrays = {"doc_ids": doc_ids, "captions": np.concatenate(captions), "clusters": clusters}
    for name, array in arrays.items():
        with new_file(folder / f"{name}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, array)
    return rows


@dataclass(frozen=True)
class AddShards:
    """Units: index shard N holds rows N x shard_rows and on."""

    factory: str
    rows: tuple[int, ...]
    """Of each part."""
    shard_rows: int
    count: int
    threads: int = 1
    """Of each unit; the bytes do not depend on it."""
    stage: str = "add"

    def make(self, folder: Path, number: int) -> list[Path]:
        """Write one shard."""
        strike("bank.shard", number=number)
        embeddings = Embeddings(folder, self.rows)
        first = number * self.shard_rows
        wanted = np.arange(first, min(first + self.shard_rows, len(embeddings)))
        ids = np.load(folder / "doc_ids.npy", mmap_mode="r")
        trained = _trained(folder, self.factory, _dim(folder, list(self.rows)))
        blocks = (wanted[start : start + _AT_ONCE] for start in range(0, len(wanted), _AT_ONCE))
        path = folder / "index" / shard_name(number, self.count)
        with new_file(path) as temporary:
            pairs = ((ids[rows], embeddings.documents(rows)) for rows in blocks)
            indexes.write_shard(temporary, trained, pairs, self.threads)
        return [path]


def shard_name(number: int, count: int) -> str:
    """`shard-00000-of-00002.faiss`"""
    return f"shard-{number:05d}-of-{count:05d}.faiss"


def _trained(folder: Path, factory: str, dim: int) -> Any:
    path = folder / "index" / "trained.faiss"
    return indexes.load_faiss().read_index(str(path)) if path.is_file() else indexes.new_index(factory, dim)


def _index(options: BankOptions, job: Job, rows: list[int], workers: int) -> dict[str, Any]:
    """Train, add, measure, merge; gives the settings that follow from it."""
    folder = job.folder
    embeddings = Embeddings(folder, rows)
    if options.backend != backends.FAISS:
        return _other_index(options, job, embeddings)
    factory, paths = make_shards(job.work, rows, options, workers)
    made: dict[str, Any] = {
        "backend": backends.FAISS,
        "index": factory,
        "shards": len(paths),
        "nprobe": 0,
        "recall": {},
    }
    if (folder / "index" / "trained.faiss").is_file():
        measured = measure_recall(indexes.FaissShards(paths), embeddings, np.load(folder / "doc_ids.npy"), options)
        write_json(folder / "eval" / "recall.json", measured)
        made |= {"nprobe": measured["nprobe"], "recall": measured["recall_at_10"]}
    if options.merge:
        target = folder / "index" / "merged.faiss"
        indexes.merge_shards(folder / "index" / "trained.faiss", paths, target)
        for path in paths:
            path.unlink()
        paths = [target]
    return made | {"index_files": [path.name for path in paths]}


def _other_index(options: BankOptions, job: Job, embeddings: Embeddings) -> dict[str, Any]:
    # Put into the backend in one go, its recall measured as it is.
    folder = job.folder
    doc_ids = np.load(folder / "doc_ids.npy")
    dim = int(embeddings.take("image", np.zeros(1, np.int64)).shape[1])
    name = f"megacm3_{sha256_json({'inputs': job.inputs, 'settings': job.settings})[:16]}"
    source = backends.Source(embeddings, doc_ids, dim, name, options.seed)
    made = backends.build(options.backend, folder, source, options.index, options.server)
    index = backends.open_index(folder, made | {"dim": dim})
    try:
        measured = measure_recall(index, embeddings, doc_ids, options)
    finally:
        backends.close(index)
    write_json(folder / "eval" / "recall.json", measured)
    return made | {"recall": measured["recall_at_10"]}


def make_shards(work: Path, rows: list[int], options: BankOptions, workers: int) -> tuple[str, list[Path]]:
    """Train an index on the vectors below `work/folder` (`rows` of each part) and add them, shard by shard.

    Gives the factory string and the shards.
    """
    folder, total = work / FOLDER, sum(rows)
    factory = indexes.choose_index(total) if options.index == "auto" else options.index
    empty = indexes.new_index(factory, _dim(folder, rows))
    listed = indexes.inverted_lists(empty) is not None
    if options.merge and not listed:
        raise ConfigError(f"--merge needs an inverted file; the index is {factory}")
    if listed and not (folder / "index" / "trained.faiss").is_file():
        _train(folder, empty, Embeddings(folder, rows), options)
    shard_rows = options.shard_rows or indexes.shard_size(total)
    count = -(-total // shard_rows)
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores // min(workers or cores, count)) if options.executor == "local" else 1
    run_units(AddShards(factory, tuple(rows), shard_rows, count, threads), work, workers, options.where)
    return factory, [folder / "index" / shard_name(number, count) for number in range(count)]


def _train(folder: Path, index: Any, embeddings: Embeddings, options: BankOptions) -> None:
    wanted = indexes.training_rows(len(embeddings), index)
    rng = np.random.default_rng(seed_from(options.seed, "index training"))
    rows = np.sort(rng.choice(len(embeddings), wanted, replace=False))
    logger.info("training the index on %d of %d vectors", wanted, len(embeddings))
    try:
        indexes.train(index, embeddings.documents(rows), indexes.gpu_count(options.device))
    except RuntimeError as fault:
        reason = str(fault).splitlines()[-1][-200:]
        raise ConfigError(f"--index cannot be trained on {wanted} vectors: {reason}") from fault
    with new_file(folder / "index" / "trained.faiss") as temporary:
        indexes.load_faiss().write_index(index, str(temporary))


def measure_recall(
    index: indexes.VectorIndex, embeddings: Embeddings, doc_ids: np.ndarray, options: BankOptions
) -> dict[str, Any]:
    """recall@10 of image and of text queries (halves of documents drawn at random) against exact search, by nprobe.

    The number of lists to search in FAISS's inverted files: the one given, or the fewest (in powers of two, at most a
    sixteenth of them) with which both kinds of queries reach `TARGET_RECALL`.
    """
    count = int(min(_EVALUATED, len(embeddings), max(50, _EXACT_BUDGET / (len(embeddings) * index.dim))))
    rng = np.random.default_rng(seed_from(options.seed, "recall"))
    rows = np.sort(rng.choice(len(embeddings), count, replace=False))
    k = min(10, len(embeddings))
    queries = {kind: embeddings.take(kind, rows) for kind in ("image", "text")}
    exact = exact_search(np.concatenate(list(queries.values())), embeddings, doc_ids, k)
    truth = {"image": exact[:count], "text": exact[count:]}
    table = {}
    for nprobe in _tried(index, options.nprobe):
        if isinstance(index, indexes.FaissShards):
            index.nprobe = nprobe
        found = {kind: overlap(index.search(queries[kind], k)[1], truth[kind]) for kind in queries}
        table[str(nprobe)] = found
        if min(found.values()) >= TARGET_RECALL:
            break
    if min(found.values()) < TARGET_RECALL:
        logger.warning(
            "recall@%d is %.3f for image and %.3f for text queries (nprobe %d); a finer --index or a higher --nprobe "
            "raises it",
            k,
            found["image"],
            found["text"],
            nprobe,
        )
    return {"queries": count, "k": k, "nprobe": nprobe, "recall_at_10": found, "by_nprobe": table}


def _tried(index: indexes.VectorIndex, nprobe: int) -> list[int]:
    if not isinstance(index, indexes.FaissShards):
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
        best = indexes.merge(best, (scores, doc_ids[rows[near]]), k)
    return best[1]


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean share of each row of `truth` (ids [n, k]) that the same row of `found` holds."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, truth, strict=True)]))
