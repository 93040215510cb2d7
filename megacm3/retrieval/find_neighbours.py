"""Finding the neighbours of every document of a bank, block by block (layout: neighbours.py).

The documents that ask may be those of another bank (`queries`): a held-out store's, whose neighbours in the training
bank an evaluation needs. And banks of held-out stores may be named (`held_out`) whose copies in this bank no sample may
get to see.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacm3.files import read_manifest
from megacm3.retrieval.bank import KIND as BANK_KIND
from megacm3.retrieval.bank import MemoryBank
from megacm3.retrieval.copies import held_out_copies, join_clusters
from megacm3.retrieval.encoder import encoder_fingerprint
from megacm3.retrieval.jobs import Job
from megacm3.retrieval.neighbour_blocks import NeighbourBlocks, copies_path, plan, save_array
from megacm3.retrieval.neighbours import ASKING, IMAGE, KIND, TEXT, NeighbourTable, folder_of
from megacm3.retrieval.options import NeighbourOptions
from megacm3.retrieval.units import run_units

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NeighbourReport:
    """What was made."""

    documents: int
    with_image: int
    """Documents that have at least one candidate by picture."""
    with_text: int
    copies: int
    """Documents that share a cluster with another one."""
    largest_cluster: int
    seconds: float
    """0 when the folder was there already."""


def find_neighbours(options: NeighbourOptions, verify: str = "sha256") -> NeighbourReport:
    """Make or continue a neighbour folder. Raises ConfigError for flags, DataError for a wrong bank or encoder."""
    started = time.monotonic()
    options.check()
    made = read_manifest(options.bank, BANK_KIND)
    asking = read_manifest(options.queries, BANK_KIND) if options.queries else made
    blocks = plan(options, made, asking)
    names = ("keep", "search", "text_variants", "query_dropout", "alike", "duplicate", "batch", "seed")
    settings = {name: getattr(options, name) for name in names} | {"block": blocks.block}
    encoder = encoder_fingerprint(blocks.encoder) if blocks.encoder else made.inputs["encoder"]
    inputs = {"bank": made.fingerprint, "store": asking.inputs["store"], "encoder": encoder}
    if options.queries:
        inputs |= {"queries": asking.fingerprint, "candidates": made.inputs["store"]}
    for number, folder in enumerate(options.held_out):
        inputs[f"held_out_{number}"] = read_manifest(folder, BANK_KIND).fingerprint
    job = Job(Path(options.output), KIND, settings, inputs)
    if not job.finished(options.overwrite):
        with job.alone():
            if not job.finished(options.overwrite):
                _make(options, job, blocks, settings, verify)
                return _report(NeighbourTable.open(options.output), time.monotonic() - started)
    logger.info("%s is finished already: same bank and settings", options.output)
    return _report(NeighbourTable.open(options.output), 0.0)


def _make(options: NeighbourOptions, job: Job, blocks: NeighbourBlocks, settings: dict[str, Any], verify: str) -> None:
    bank = MemoryBank.open(options.bank, verify)
    asking = MemoryBank.open(options.queries, verify) if options.queries else bank
    held_out = held_out_copies(bank, options.held_out, options.duplicate)
    job.prepare(options.overwrite)
    workers = options.workers or (1 if asking.documents < 20_000 else 0)
    run_units(blocks, job.work, workers, options.where)
    _write_metadata(job.folder, bank, asking, blocks.count, held_out)
    sizes = {"documents": asking.documents, "rows": len(bank), "dim": bank.dim}
    foreign = {"foreign": bool(options.queries), "asking_rows": len(asking), "held_out": int(held_out.sum())}
    job.commit(settings | sizes | foreign, options.overwrite)


def _write_metadata(folder: Path, bank: MemoryBank, asking: MemoryBank, blocks: int, held_out: np.ndarray) -> None:
    metadata, clusters = bank.metadata, np.asarray(bank.metadata.clusters)
    if asking is bank:
        pairs = np.concatenate([np.load(copies_path(folder, number)) for number in range(blocks)])
        clusters = join_clusters(clusters, metadata.rows(pairs))
    arrays = {"doc_ids": metadata.doc_ids, "captions": metadata.captions, "clusters": clusters, "held_out": held_out}
    if asking is not bank:
        arrays |= {f"{ASKING}/{name}": getattr(asking.metadata, name) for name in ("doc_ids", "captions")}
    for name, array in arrays.items():
        save_array(folder / f"{name}.npy", np.asarray(array))


def _report(table: NeighbourTable, seconds: float) -> NeighbourReport:
    counts = []
    for kind in (IMAGE, TEXT):
        files = sorted((table.folder / folder_of(kind, 0)).glob("*.ids.npy"))
        counts.append(sum(int((np.load(path, mmap_mode="r")[:, 0] >= 0).sum()) for path in files))
    _, sizes = np.unique(table.metadata.clusters, return_counts=True)
    copies = int(sizes[sizes > 1].sum())
    return NeighbourReport(len(table), counts[0], counts[1], copies, int(sizes.max()), seconds)
