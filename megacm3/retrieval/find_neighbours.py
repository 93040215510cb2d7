"""Finding the neighbours of every document of a bank, block by block (layout: neighbours.py).

A block is a unit (units.py): it can be computed anywhere, again, and to the same bytes. Queries are the document's
picture, and its caption with tokens dropped at random (keyed by seed, document and variant), as CM3Leon's retrieval
does. The scores of what is kept are computed from the stored vectors, whatever the index rounds.

The documents that ask may be those of another bank (`queries`): a held-out store's, whose neighbours in the training
bank an evaluation needs. And banks of held-out stores may be named (`held_out`) whose copies in this bank no sample may
get to see.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megacm3.command import seed_from
from megacm3.data.executors import ExecutorOptions
from megacm3.errors import ConfigError, DataError
from megacm3.files import Manifest, new_file, read_manifest
from megacm3.retrieval.bank import KIND as BANK_KIND
from megacm3.retrieval.bank import MemoryBank, check_encoder
from megacm3.retrieval.encoder import Encoder, encoder_fingerprint, encoder_width
from megacm3.retrieval.neighbours import (
    ASKING,
    IMAGE,
    KIND,
    MAX_KEEP,
    TEXT,
    NeighbourTable,
    folder_of,
    masks,
    part_path,
    scores_up,
)
from megacm3.retrieval.units import Job, run_units

logger = logging.getLogger(__name__)

_QUERIES = 1024
"""Queries of one search: a fixed number, since sums may differ in the last bit between sizes of a batch."""
_NEAR = 16
"""Nearest documents looked at for copies of a held-out one."""
_COMPARED = 128
"""Documents whose candidates are compared with one another at once."""


@dataclass(frozen=True)
class NeighbourOptions:
    """A neighbour folder to be made."""

    bank: str
    output: str
    encoder: str = ""
    """CLIP folder; empty: the bank's own copy."""
    queries: str = ""
    """A bank whose documents ask, made with the same encoder; empty: those of `bank` itself."""
    held_out: tuple[str, ...] = ()
    """Banks of held-out stores: documents of `bank` that are copies of theirs are never drawn."""
    keep: int = 16
    """Candidates kept in each list."""
    search: int = 64
    """Candidates looked at: copies of the document and of one another are left out of them."""
    text_variants: int = 2
    query_dropout: float = 0.2
    """Probability that a token of a text query is dropped (CM3Leon 2.1)."""
    alike: float = 0.9
    """Inner product of document vectors above which two candidates are not drawn together."""
    duplicate: float = 0.98
    """Inner product of document vectors from which two documents count as copies of each other."""
    block: int = 0
    """Documents of a unit; 0: by the number of documents."""
    batch: int = 64
    seed: int = 0
    workers: int = 0
    """Units at once; 0: one below 20,000 documents, else one a core."""
    device: str = "cpu"
    executor: str = "local"
    """Where units run: local, slurm or ray; nothing of it changes the lists."""
    slurm: dict[str, str] = field(default_factory=dict)
    """Options of sbatch, as in `ExecutorOptions`."""
    overwrite: bool = False

    @property
    def where(self) -> ExecutorOptions:
        """For `run_units`."""
        return ExecutorOptions(self.executor, self.workers, device=self.device, slurm=self.slurm)

    def check(self) -> None:
        """Raises ConfigError for values out of range."""
        self.where.check()
        if not 1 <= self.keep <= MAX_KEEP or self.search < self.keep:
            raise ConfigError(
                f"--keep {self.keep} --search {self.search}; expected 1 <= keep <= {MAX_KEEP}, search >= keep"
            )
        if self.text_variants < 1 or not 0 <= self.query_dropout < 1:
            raise ConfigError(
                f"--text-variants {self.text_variants} --query-dropout {self.query_dropout}; "
                "expected at least 1 variant and a dropout of 0 or more, below 1"
            )
        if self.block < 0 or self.batch < 1:
            raise ConfigError(f"--block {self.block} --batch {self.batch}; expected block >= 0 and batch >= 1")


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


def _make(
    options: NeighbourOptions, job: Job, blocks: "NeighbourBlocks", settings: dict[str, Any], verify: str
) -> None:
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


def held_out_copies(bank: MemoryBank, held_out: Sequence[str], duplicate: float) -> np.ndarray:
    """bool [rows]: documents of `bank` that are copies of one in the banks `held_out`: the same picture, the same
    caption, or a document vector within `duplicate` of its nearest ones.

    Raises DataError for a bank of another encoder.
    """
    copies = np.zeros(len(bank), bool)
    for folder in held_out:
        other = MemoryBank.open(folder)
        _same_encoder(bank, other)
        copies |= np.isin(bank.metadata.captions, np.asarray(other.metadata.captions))
        pictures = set(_pictures(other))
        copies |= np.fromiter((name in pictures for name in _pictures(bank)), bool, len(bank))
        for start in range(0, len(other), _QUERIES):
            vectors = other.embeddings.documents(np.arange(start, min(start + _QUERIES, len(other))))
            scores, ids = bank.search(vectors, min(_NEAR, len(bank)))
            copies[bank.metadata.rows(ids[(scores >= duplicate) & (ids >= 0)])] = True
    return copies


def _pictures(bank: MemoryBank) -> Iterator[str]:
    for part, rows in enumerate(bank.settings["parts"]):
        if rows:
            yield from bank.table(part, ["image_sha256"])["image_sha256"].to_pylist()


def _same_encoder(bank: "MemoryBank | Manifest", other: "MemoryBank | Manifest") -> None:
    # Vectors of two encoders have nothing to do with each other, though all numbers fit.
    if bank.inputs["encoder"] != other.inputs["encoder"] or bank.settings["dim"] != other.settings["dim"]:
        raise DataError(
            f"two banks of different encoders: {bank.inputs['encoder'][:12]} and {other.inputs['encoder'][:12]}; "
            "make both with the same --encoder"
        )


def plan(options: NeighbourOptions, bank: Manifest, asking: Manifest) -> "NeighbourBlocks":
    """The units of a job, and the encoder that makes its text queries.

    Raises DataError for an encoder that is not the bank's, ConfigError where one is needed and there is none.
    """
    _same_encoder(bank, asking)
    own = Path(options.bank) / "encoder"
    encoder = options.encoder or (str(own) if own.is_dir() else "")
    if encoder:
        check_encoder(bank, encoder_fingerprint(encoder), encoder_width(encoder), options.bank)
    elif options.query_dropout or options.text_variants > 1:
        raise ConfigError(
            f"{options.bank} holds no encoder (precomputed vectors); give --encoder DIR, or --query-dropout 0 "
            "--text-variants 1 to query with the stored text vectors"
        )
    documents = int(asking.settings["documents"])
    block = options.block or min(1 << 20, max(4096, 1 << math.ceil(math.log2(max(1, documents / 64)))))
    return NeighbourBlocks(options, encoder, documents, block)


@dataclass(frozen=True)
class NeighbourBlocks:
    """Units: block N holds documents N x block and on."""

    options: NeighbourOptions
    encoder: str
    documents: int
    """Of the store that asks."""
    block: int
    stage: str = "neighbours"

    @property
    def count(self) -> int:
        """Number of blocks."""
        return -(-self.documents // self.block)

    def make(self, folder: Path, number: int) -> list[Path]:
        """Write the lists of one block."""
        bank = MemoryBank.open(self.options.bank, verify="none")
        asking = MemoryBank.open(self.options.queries, verify="none") if self.options.queries else bank
        first = number * self.block
        doc_ids = np.arange(first, min(first + self.block, self.documents))
        rows = asking.metadata.rows(doc_ids)
        held = np.flatnonzero(rows >= 0)
        search = _Search(bank, asking, self.options, doc_ids[held], rows[held])
        encoder = Encoder.load(self.encoder, self.options.device) if self.encoder else None
        scores, image_ids = search.by_image()
        written = [self._write(folder, IMAGE, 0, number, len(doc_ids), held, scores, image_ids)]
        for variant in range(self.options.text_variants):
            scores, ids = search.by_text(encoder, variant)
            written.append(self._write(folder, TEXT, variant, number, len(doc_ids), held, scores, ids))
            similar = search.compare(np.concatenate([image_ids, ids], 1))
            bits = np.zeros((len(doc_ids), 2 * self.options.keep), similar.dtype)
            bits[held] = similar
            written.append([_save(part_path(folder, TEXT, variant, number, "alike"), bits)])
        written.append([_save(copies_path(folder, number), np.unique(search.copies, axis=0))])
        return [path for paths in written for path in paths]

    def _write(
        self,
        folder: Path,
        kind: str,
        variant: int,
        number: int,
        count: int,
        held: np.ndarray,
        scores: np.ndarray,
        ids: np.ndarray,
    ) -> list[Path]:
        # Rows for every document of the block; those that are not in the bank have no candidates.
        all_ids = np.full((count, self.options.keep), -1, np.int32 if self.documents < 2**31 else np.int64)
        all_scores = np.full((count, self.options.keep), -np.inf, np.float16)
        all_ids[held], all_scores[held] = ids, scores_up(scores)
        paths = [part_path(folder, kind, variant, number, what) for what in ("ids", "scores")]
        return [_save(paths[0], all_ids), _save(paths[1], all_scores)]


def copies_path(folder: Path, number: int) -> Path:
    """int64 [m, 2]: pairs of documents of a block and their copies, found by vectors."""
    return folder / "copies" / f"part-{number:05d}.npy"


def _save(path: Path, array: np.ndarray) -> Path:
    with new_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)
    return path


class _Search:
    """The searches of one block."""

    def __init__(
        self, bank: MemoryBank, asking: MemoryBank, options: NeighbourOptions, doc_ids: np.ndarray, rows: np.ndarray
    ) -> None:
        """`doc_ids`, `rows`: the documents that ask, of the bank `asking`, which may be `bank` itself."""
        self._bank, self._asking, self._options = bank, asking, options
        self._doc_ids, self._rows = doc_ids, rows
        self.copies = np.zeros((0, 2), np.int64)
        """Pairs of a document and a copy of it, found so far by vectors."""

    def by_image(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 and ids int64 [n, keep] by the documents' pictures."""
        return self._search(lambda part: self._asking.embeddings.take("image", self._rows[part]))

    def by_text(self, encoder: Encoder | None, variant: int) -> tuple[np.ndarray, np.ndarray]:
        """The same by their captions with dropped tokens, or by the stored text vectors without an encoder."""
        if encoder is None:
            return self._search(lambda part: self._asking.embeddings.take("text", self._rows[part]))
        return self._search(lambda part: self._text_queries(encoder, variant, part))

    def _text_queries(self, encoder: Encoder, variant: int, part: slice) -> np.ndarray:
        # Documents of a block that are in the bank are neighbours there, too.
        rows, options = self._rows[part], self._options
        captions = self._asking.captions(int(rows[0]), int(rows[-1]) + 1)
        pairs = zip(self._doc_ids[part].tolist(), encoder.tokenize(captions), strict=True)
        dropped = [drop_tokens(row, options.query_dropout, options.seed, doc_id, variant) for doc_id, row in pairs]
        return encoder.encode_tokens(dropped, options.batch)

    def _search(self, queries_of: Callable[[slice], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        keep, count = self._options.keep, len(self._rows)
        scores = np.full((count, keep), -np.inf, np.float32)
        ids = np.full((count, keep), -1, np.int64)
        for start in range(0, count, _QUERIES):
            part = slice(start, min(start + _QUERIES, count))
            queries = queries_of(part)
            _, found = self._bank.search(queries, self._options.search)
            scores[part], ids[part] = self._score(queries, self._select(self._rows[part], found))
        return scores, ids

    def _score(self, queries: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores of ids [n, keep] from the stored vectors, both sorted anew by them."""
        scores = np.full(ids.shape, -np.inf, np.float32)
        for start in range(0, len(ids), _COMPARED):
            part = slice(start, start + _COMPARED)
            rows = self._bank.metadata.rows(ids[part])
            vectors = self._vectors(np.maximum(rows, 0))
            scores[part] = np.where(rows >= 0, np.einsum("nd,nkd->nk", queries[part], vectors), -np.inf)
        order = np.lexsort((ids, -scores), axis=1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)

    def _vectors(self, rows: np.ndarray) -> np.ndarray:
        # float32 [n, k, d]: document vectors of rows [n, k], each read once.
        needed, places = np.unique(rows, return_inverse=True)
        return self._bank.embeddings.documents(needed)[places.reshape(rows.shape)]

    def _select(self, own: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The first `keep` of candidates [n, search] that no setting can drop later: not the document, nor a copy of it
        or its caption, nor a copy of a better candidate."""
        metadata, keep = self._bank.metadata, self._options.keep
        rows = metadata.rows(ids)
        clusters, captions = metadata.clusters[rows], metadata.captions[rows]
        good = (ids >= 0) & (captions != self._asking.metadata.captions[own][:, None])
        if self._asking is self._bank:
            # Numbers of documents and clusters mean something within one bank alone.
            good &= (rows != own[:, None]) & (clusters != metadata.clusters[own][:, None])
        better = np.tri(ids.shape[1], k=-1, dtype=bool)
        for part in range(0, len(ids), _COMPARED):
            block = slice(part, part + _COMPARED)
            same = clusters[block, :, None] == clusters[block, None, :]
            good[block] &= ~(same & better & good[block, None, :]).any(2)
        # Copies by vectors cost reading vectors: only what would be kept is looked at, and again where something fell.
        found = np.full((len(ids), keep), -1, np.int64)
        looked = np.zeros_like(good)
        again = np.arange(len(ids))
        while len(again):
            order = np.argsort(~good[again], axis=1, kind="stable")[:, :keep]
            kept = np.take_along_axis(good[again], order, 1)
            found[again, : order.shape[1]] = np.where(kept, np.take_along_axis(ids[again], order, 1), -1)
            fresh = kept & ~np.take_along_axis(looked[again], order, 1)
            looked[again[:, None], order] = True
            copies = self._copies(own[again], np.where(fresh, np.take_along_axis(ids[again], order, 1), -1))
            place, column = np.nonzero(copies)
            good[again[place], order[place, column]] = False
            again = again[np.unique(place)]
        return found

    def _copies(self, own: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """bool [n, k]: which candidates `ids` (-1: none) are copies of document row `own`, by vectors; notes them."""
        near = np.zeros(ids.shape, bool)
        for start in range(0, len(ids), _COMPARED):
            part = slice(start, start + _COMPARED)
            rows = self._bank.metadata.rows(ids[part])
            mine = self._asking.embeddings.documents(own[part])
            cosines = np.einsum("nd,nkd->nk", mine, self._vectors(np.maximum(rows, 0)))
            near[part] = (rows >= 0) & (cosines >= self._options.duplicate)
        document, candidate = np.nonzero(near)
        pairs = np.stack([self._asking.metadata.doc_ids[own[document]], ids[document, candidate]], 1)
        self.copies = np.concatenate([self.copies, pairs])
        return near

    def compare(self, ids: np.ndarray) -> np.ndarray:
        """`alike` bits [n, 2 keep] of candidates `ids` [n, 2 keep]."""
        bits = [masks(np.zeros((0, ids.shape[1], ids.shape[1]), bool), self._options.keep)]
        for start in range(0, len(ids), _COMPARED):
            rows = self._bank.metadata.rows(ids[start : start + _COMPARED])
            vectors = self._vectors(np.maximum(rows, 0))
            similar = np.einsum("nid,njd->nij", vectors, vectors) > self._options.alike
            real = rows >= 0
            bits.append(masks(similar & real[:, :, None] & real[:, None, :], self._options.keep))
        return np.concatenate(bits)


def drop_tokens(tokens: list[int], share: float, seed: int, doc_id: int, variant: int) -> list[int]:
    """`tokens` without each one with probability `share`; at least one stays. Keyed by seed, document and variant."""
    if not share or len(tokens) < 2:
        return tokens
    rng = np.random.Generator(np.random.PCG64(seed_from(seed, "query dropout", doc_id, variant)))
    kept = rng.random(len(tokens)) >= share
    if not kept.any():
        kept[rng.integers(len(tokens))] = True
    return [token for token, keep in zip(tokens, kept.tolist(), strict=True) if keep]


def _write_metadata(folder: Path, bank: MemoryBank, asking: MemoryBank, blocks: int, held_out: np.ndarray) -> None:
    metadata, clusters = bank.metadata, np.asarray(bank.metadata.clusters)
    if asking is bank:
        pairs = np.concatenate([np.load(copies_path(folder, number)) for number in range(blocks)])
        clusters = join_clusters(clusters, metadata.rows(pairs))
    arrays = {"doc_ids": metadata.doc_ids, "captions": metadata.captions, "clusters": clusters, "held_out": held_out}
    if asking is not bank:
        arrays |= {f"{ASKING}/{name}": getattr(asking.metadata, name) for name in ("doc_ids", "captions")}
    for name, array in arrays.items():
        _save(folder / f"{name}.npy", np.asarray(array))


def join_clusters(clusters: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """int64 [rows]: clusters joined by pairs of rows [m, 2]; each gets the smallest number of those that it joins."""
    if len(pairs) and pairs.min() < 0:
        raise DataError("a pair of copies names a document that is not in the bank")
    names, labels = np.unique(clusters, return_inverse=True)
    parent = np.arange(len(names))
    left, right = labels[pairs[:, 0]], labels[pairs[:, 1]]
    while True:
        before = parent.copy()
        smallest = np.minimum(parent[left], parent[right])
        np.minimum.at(parent, left, smallest)
        np.minimum.at(parent, right, smallest)
        parent = parent[parent]
        if np.array_equal(before, parent):
            return names[parent][labels]


def _report(table: NeighbourTable, seconds: float) -> NeighbourReport:
    counts = []
    for kind in (IMAGE, TEXT):
        files = sorted((table.folder / folder_of(kind, 0)).glob("*.ids.npy"))
        counts.append(sum(int((np.load(path, mmap_mode="r")[:, 0] >= 0).sum()) for path in files))
    _, sizes = np.unique(table.metadata.clusters, return_counts=True)
    copies = int(sizes[sizes > 1].sum())
    return NeighbourReport(len(table), counts[0], counts[1], copies, int(sizes.max()), seconds)
