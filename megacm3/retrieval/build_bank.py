"""Making a bank: embed every part of the store, train an index once, add shard by shard, measure its recall.

Each stage is units under `BANK.work` (units.py): embedding and adding run on any number of workers, can be killed and
started again, and leave the same bytes.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacm3.data.sources import find_shards
from megacm3.data.store import Store
from megacm3.errors import DataError
from megacm3.files import Manifest, new_file, sha256_json, write_json
from megacm3.retrieval import backends, shards
from megacm3.retrieval.bank import KIND, Embeddings, caption_hash, part_file
from megacm3.retrieval.build_index import make_shards
from megacm3.retrieval.embed import EmbedParts
from megacm3.retrieval.encoder import encoder_fingerprint
from megacm3.retrieval.jobs import Job
from megacm3.retrieval.options import BankOptions
from megacm3.retrieval.precomputed import PREFIX, Precomputed
from megacm3.retrieval.recall import measure_recall
from megacm3.retrieval.train_encoder import copy_encoder
from megacm3.retrieval.units import run_units

logger = logging.getLogger(__name__)


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
    options.check()
    store = Store.open(options.store)
    precomputed = options.encoder.removeprefix(PREFIX) if options.encoder.startswith(PREFIX) else ""
    fingerprint = Precomputed.open(precomputed).fingerprint if precomputed else encoder_fingerprint(options.encoder)
    if not precomputed:
        find_shards(options.inputs)
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
    made |= {"dim": Embeddings(job.folder, rows).dim, "documents": len(store), "rows": sum(rows), "parts": rows}
    return job.commit(made | {"precomputed": bool(precomputed)}, options.overwrite)


def _report(bank: Manifest, seconds: float) -> BankReport:
    made = bank.settings
    return BankReport(made["rows"], made["documents"], made["index"], made["shards"], made["recall"], seconds)


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
        measured = measure_recall(
            shards.FaissShards(paths), embeddings, np.load(folder / "doc_ids.npy"), options.nprobe, options.seed
        )
        write_json(folder / "eval" / "recall.json", measured)
        made |= {"nprobe": measured["nprobe"], "recall": measured["recall_at_10"]}
    if options.merge:
        target = folder / "index" / "merged.faiss"
        shards.merge_shards(folder / "index" / "trained.faiss", paths, target)
        for path in paths:
            path.unlink()
        paths = [target]
    return made | {"index_files": [path.name for path in paths]}


def _other_index(options: BankOptions, job: Job, embeddings: Embeddings) -> dict[str, Any]:
    # Put into the backend in one go, its recall measured as it is.
    folder = job.folder
    doc_ids = np.load(folder / "doc_ids.npy")
    name = f"megacm3_{sha256_json({'inputs': job.inputs, 'settings': job.settings})[:16]}"
    source = backends.Source(embeddings, doc_ids, embeddings.dim, name, options.seed)
    made = backends.build(options.backend, folder, source, options.index, options.server)
    index = backends.open_index(folder, made | {"dim": embeddings.dim})
    try:
        measured = measure_recall(index, embeddings, doc_ids, options.nprobe, options.seed)
    finally:
        backends.close(index)
    write_json(folder / "eval" / "recall.json", measured)
    return made | {"recall": measured["recall_at_10"]}
