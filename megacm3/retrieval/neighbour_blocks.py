"""Neighbour lists block by block: a block is a unit (units.py), computed anywhere, again, to the same bytes."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megacm3.errors import ConfigError
from megacm3.files import Manifest, new_file
from megacm3.retrieval.bank import MemoryBank, check_encoder
from megacm3.retrieval.copies import check_same_encoder
from megacm3.retrieval.encoder import Encoder, encoder_fingerprint, encoder_width
from megacm3.retrieval.neighbour_search import BlockSearch
from megacm3.retrieval.neighbours import IMAGE, TEXT, part_path, scores_up
from megacm3.retrieval.options import NeighbourOptions


def plan(options: NeighbourOptions, bank: Manifest, asking: Manifest) -> "NeighbourBlocks":
    """The units of a job, and the encoder that makes its text queries.

    Raises DataError for an encoder that is not the bank's, ConfigError where one is needed and there is none.
    """
    check_same_encoder(bank, asking)
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
    return NeighbourBlocks(options, encoder, documents, block, int(bank.settings["documents"]))


@dataclass(frozen=True)
class NeighbourBlocks:
    """Units: block N holds documents N x block and on."""

    options: NeighbourOptions
    encoder: str
    documents: int
    """Of the store that asks."""
    block: int
    candidates: int
    """Documents of the store that is searched."""
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
        search = BlockSearch(bank, asking, self.options, doc_ids[held], rows[held])
        encoder = Encoder.load(self.encoder, self.options.device) if self.encoder else None
        scores, image_ids = search.by_image()
        written = [self._write(folder, IMAGE, 0, number, len(doc_ids), held, scores, image_ids)]
        for variant in range(self.options.text_variants):
            scores, ids = search.by_text(encoder, variant)
            written.append(self._write(folder, TEXT, variant, number, len(doc_ids), held, scores, ids))
            similar = search.compare(np.concatenate([image_ids, ids], 1))
            bits = np.zeros((len(doc_ids), 2 * self.options.keep), similar.dtype)
            bits[held] = similar
            written.append([save_array(part_path(folder, TEXT, variant, number, "alike"), bits)])
        written.append([save_array(copies_path(folder, number), np.unique(search.copies, axis=0))])
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
        all_ids = np.full((count, self.options.keep), -1, np.int32 if self.candidates < 2**31 else np.int64)
        all_scores = np.full((count, self.options.keep), -np.inf, np.float16)
        all_ids[held], all_scores[held] = ids, scores_up(scores)
        paths = [part_path(folder, kind, variant, number, what) for what in ("ids", "scores")]
        return [save_array(paths[0], all_ids), save_array(paths[1], all_scores)]


def copies_path(folder: Path, number: int) -> Path:
    """int64 [m, 2]: pairs of documents of a block and their copies, found by vectors."""
    return folder / "copies" / f"part-{number:05d}.npy"


def save_array(path: Path, array: np.ndarray) -> Path:
    """Write an .npy whole or not at all."""
    with new_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)
    return path
