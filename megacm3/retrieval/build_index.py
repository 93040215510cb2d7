"""Training a bank's FAISS index once, and adding its documents shard by shard."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacm3.command import seed_from
from megacm3.errors import ConfigError
from megacm3.faults import strike
from megacm3.files import new_file
from megacm3.retrieval import index as indexes
from megacm3.retrieval import shards
from megacm3.retrieval.bank import Embeddings
from megacm3.retrieval.jobs import FOLDER
from megacm3.retrieval.options import BankOptions
from megacm3.retrieval.units import run_units

logger = logging.getLogger(__name__)

_AT_ONCE = 8192
"""Vectors in memory at once, where all are gone through."""


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
        trained = _trained(folder, self.factory, embeddings.dim)
        blocks = (wanted[start : start + _AT_ONCE] for start in range(0, len(wanted), _AT_ONCE))
        path = folder / "index" / shard_name(number, self.count)
        with new_file(path) as temporary:
            pairs = ((ids[rows], embeddings.documents(rows)) for rows in blocks)
            shards.write_shard(temporary, trained, pairs, self.threads)
        return [path]


def shard_name(number: int, count: int) -> str:
    """`shard-00000-of-00002.faiss`"""
    return f"shard-{number:05d}-of-{count:05d}.faiss"


def _trained(folder: Path, factory: str, dim: int) -> Any:
    path = folder / "index" / "trained.faiss"
    return indexes.load_faiss().read_index(str(path)) if path.is_file() else indexes.new_index(factory, dim)


def make_shards(work: Path, rows: list[int], options: BankOptions, workers: int) -> tuple[str, list[Path]]:
    """Train an index on the vectors below `work/folder` (`rows` of each part) and add them, shard by shard.

    Gives the factory string and the shards.
    """
    folder, total = work / FOLDER, sum(rows)
    embeddings = Embeddings(folder, rows)
    factory = indexes.choose_index(total) if options.index == "auto" else options.index
    empty = indexes.new_index(factory, embeddings.dim)
    listed = indexes.inverted_lists(empty) is not None
    if options.merge and not listed:
        raise ConfigError(f"--merge needs an inverted file; the index is {factory}")
    if listed and not (folder / "index" / "trained.faiss").is_file():
        _train(folder, empty, embeddings, options)
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
        shards.write_index(index, temporary)
