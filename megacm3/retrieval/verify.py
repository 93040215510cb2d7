"""Checks of a whole bank and of a whole neighbour folder: hashes, counts, vectors, ids, and a share computed again."""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megacm3.command import progress, seed_from
from megacm3.errors import ConfigError, DataError
from megacm3.files import MANIFEST, read_json, read_manifest
from megacm3.retrieval.bank import KIND as BANK_KIND
from megacm3.retrieval.bank import MemoryBank, caption_hash, part_file
from megacm3.retrieval.copies import held_out_copies
from megacm3.retrieval.neighbour_blocks import plan
from megacm3.retrieval.neighbours import IMAGE, TEXT, NeighbourTable, part_path
from megacm3.retrieval.options import NeighbourOptions
from megacm3.retrieval.shards import FaissShards
from megacm3.retrieval.units import one_thread

_PROBES = 1000
"""Documents looked for with their own vectors."""


@dataclass(frozen=True)
class BankCheck:
    """What was checked of a bank."""

    rows: int
    documents: int
    shards: int
    found_first: float
    """Share of documents, drawn at random, that their own vector finds in the first place."""


@dataclass(frozen=True)
class NeighbourCheck:
    """What was checked of a neighbour folder."""

    documents: int
    lists: int
    candidates: int
    recomputed: int
    """Documents whose lists were computed again and came out the same; 0 when the bank was not at hand."""
    held_out: int
    """Documents marked as copies of held-out ones."""
    held_out_banks: int
    """Held-out banks from which the marks were found again; 0 when not all of them were at hand."""


def verify_bank(folder: str | Path) -> BankCheck:
    """Read a bank from end to end. Raises DataError at the first thing that is wrong, naming the file."""
    bank = MemoryBank.open(folder, verify="sha256")
    parts = bank.settings["parts"]
    start = 0
    for number, rows in enumerate(parts):
        if rows:
            _check_part(bank, number, start, rows)
        start += rows
    doc_ids = np.asarray(bank.metadata.doc_ids)
    if not (np.diff(doc_ids) > 0).all() or doc_ids[0] < 0 or doc_ids[-1] >= bank.documents:
        raise DataError(f"{folder}/doc_ids.npy is not ascending within 0..{bank.documents - 1}")
    if isinstance(bank.index, FaissShards) and not np.array_equal(bank.index.ids(), doc_ids):
        raise DataError(f"{folder}: the index holds other document numbers than doc_ids.npy")
    return BankCheck(len(bank), bank.documents, bank.settings["shards"], _found_first(bank))


def _check_part(bank: MemoryBank, number: int, start: int, rows: int) -> None:
    meta = part_file(bank.folder, "meta", number)
    table = bank.table(number, ["doc_id", "caption"])
    if len(table) != rows:
        raise DataError(f"{meta} has {len(table)} rows; the manifest says {rows}")
    span = np.arange(start, start + rows)
    if not np.array_equal(table["doc_id"].to_numpy(), bank.metadata.doc_ids[span]):
        raise DataError(f"{meta} has other document numbers than doc_ids.npy")
    hashes = np.array([caption_hash(caption) for caption in table["caption"].to_pylist()], np.uint64)
    if not np.array_equal(hashes, bank.metadata.captions[span]):
        raise DataError(f"{meta} has other captions than captions.npy")
    for kind in ("image", "text"):
        for first in range(0, rows, 65_536):
            vectors = bank.embeddings.take(kind, span[first : first + 65_536])
            lengths = np.linalg.norm(vectors, axis=1)
            # float16 components: a unit vector stays within a thousandth.
            if vectors.shape[1] != bank.dim or not (np.abs(lengths - 1) < 2e-3).all():
                raise DataError(f"{part_file(bank.folder, kind, number)} holds vectors that are not of length 1")


def _found_first(bank: MemoryBank) -> float:
    rng = np.random.default_rng(seed_from("verify bank", len(bank)))
    rows = rng.choice(len(bank), min(_PROBES, len(bank)), replace=False)
    own = bank.metadata.doc_ids[rows]
    vectors = bank.embeddings.documents(rows)
    _, ids = bank.search(vectors, 1)
    # Documents with equal vectors may stand for one another.
    rivals = bank.embeddings.documents(np.maximum(bank.metadata.rows(ids[:, 0]), 0))
    equal = np.einsum("nd,nd->n", vectors, rivals) > 1 - 1e-4
    return float(((ids[:, 0] == own) | equal).mean())


def verify_neighbours(
    folder: str | Path, bank: str | Path = "", encoder: str | Path = "", share: float = 0.01
) -> NeighbourCheck:
    """Read a neighbour folder from end to end, and compute the blocks of a random `share` of the documents again.

    `bank`, `encoder`: where they are; empty: a bank beside `folder` that fits, and the encoder in it. Without a bank
    nothing is computed again. Raises DataError at the first thing that is wrong, naming the file.
    """
    table = NeighbourTable.open(folder, verify="sha256")
    if not 0 <= share <= 1:
        raise ConfigError(f"share = {share}; expected a number between 0 and 1")
    candidates = _check_lists(table)
    found = Path(bank) if bank else find_beside(Path(folder), BANK_KIND, table.inputs.get("bank", ""))
    recomputed = banks = 0
    asking = find_beside(Path(folder), BANK_KIND, table.inputs["queries"]) if table.foreign else None
    if found is not None:
        opened = MemoryBank.open(found)
        if opened.fingerprint != table.inputs.get("bank"):
            raise DataError(
                f"{folder} was made with bank {table.inputs.get('bank', '')[:12]}; {found} is {opened.fingerprint[:12]}"
            )
        if share > 0 and (asking is not None or not table.foreign):
            recomputed = _recompute(table, opened, str(asking or ""), str(encoder), share)
        banks = _check_marks(table, opened)
    marked = int(table.metadata.held_out.sum())
    return NeighbourCheck(len(table), 1 + table.variants, candidates, recomputed, marked, banks)


def _check_marks(table: NeighbourTable, bank: MemoryBank) -> int:
    """Find the copies of held-out documents again; gives the number of their banks, 0 where not all lie beside."""
    names = [name for name in table.inputs if name.startswith("held_out_")]
    beside = [find_beside(table.folder, BANK_KIND, table.inputs[name]) for name in names]
    held_out = [str(path) for path in beside if path is not None]
    if len(held_out) < len(names):
        return 0
    if not np.array_equal(held_out_copies(bank, held_out, table.settings["duplicate"]), table.metadata.held_out):
        raise DataError(f"{table.folder}/held_out.npy marks other documents than the copies of {', '.join(held_out)}")
    return len(held_out)


def find_beside(folder: Path, kind: str, fingerprint: str) -> Path | None:
    """A folder beside `folder` whose manifest has this kind and fingerprint, or None."""
    for path in sorted(folder.resolve().parent.glob(f"*/{MANIFEST}")):
        try:
            raw = read_json(path)
        except DataError:
            # Whatever lies beside is not what is being checked.
            continue
        if isinstance(raw, dict) and raw.get("kind") == kind and raw.get("fingerprint") == fingerprint:
            return path.parent
    return None


def _check_lists(table: NeighbourTable) -> int:
    """Number of candidates; every list: sorted, ids of the bank, no document its own neighbour."""
    block, total = table.settings["block"], 0
    for kind, variant in [(IMAGE, 0), *((TEXT, v) for v in range(table.variants))]:
        for part in range(-(-len(table) // block)):
            path = part_path(table.folder, kind, variant, part, "ids")
            ids = np.load(path).astype(np.int64)
            scores = np.load(part_path(table.folder, kind, variant, part, "scores")).astype(np.float32)
            expected = (min(block, len(table) - part * block), table.keep)
            if ids.shape != expected or scores.shape != expected:
                raise DataError(f"{path} has shape {ids.shape}, its scores {scores.shape}; expected {expected}")
            there = ids >= 0
            own = np.arange(part * block, part * block + len(ids))[:, None]
            wrong = {
                "a document that is not in the bank": (table.metadata.rows(ids) < 0) & there,
                "a document as its own neighbour": (ids == own) & (not table.foreign),
                "scores that are not descending": np.pad(scores[:, 1:] > scores[:, :-1], ((0, 0), (1, 0))),
                "a score of no candidate": np.isfinite(scores) != there,
                "a score above 1": scores > 1.002,
            }
            for what, where in wrong.items():
                if where.any():
                    raise DataError(f"{path} has {what} (document {part * block + int(where.any(1).argmax())})")
            total += int(there.sum())
    return total


def _recompute(table: NeighbourTable, bank: MemoryBank, queries: str, encoder: str, share: float) -> int:
    names = ("keep", "search", "text_variants", "query_dropout", "alike", "duplicate", "block", "batch", "seed")
    settings = {name: table.settings[name] for name in names}
    manifest = read_manifest(bank.folder, BANK_KIND)
    options = NeighbourOptions(bank=str(bank.folder), output="", encoder=encoder, queries=queries, **settings)
    blocks = plan(options, manifest, read_manifest(queries, BANK_KIND) if queries else manifest)
    rng = np.random.default_rng(seed_from("verify neighbours", table.fingerprint))
    chosen = rng.choice(blocks.count, max(1, math.ceil(share * blocks.count)), replace=False)
    documents = 0
    for number in progress(np.sort(chosen).tolist(), unit="block", description="recompute"):
        with tempfile.TemporaryDirectory() as folder:
            with one_thread():
                paths = blocks.make(Path(folder), number)
            for path in paths:
                name = path.relative_to(folder)
                if path.read_bytes() != (table.folder / name).read_bytes():
                    raise DataError(f"{table.folder / name} differs from what the same bank and settings give now")
        documents += min(blocks.block, blocks.documents - number * blocks.block)
    return documents
