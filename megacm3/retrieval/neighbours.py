"""Neighbour lists of every document of a bank, read at training time without any search.

    NEIGHBOURS/manifest.json
    NEIGHBOURS/image/part-00000.{ids,scores}.npy            int32|int64, float16 [n, keep]: by the document's picture
    NEIGHBOURS/text-0/part-00000.{ids,scores}.npy           by its caption with tokens dropped, one folder a variant
    NEIGHBOURS/text-0/part-00000.alike.npy                  uint [n, 2 keep]: which candidates resemble one another
    NEIGHBOURS/{doc_ids,captions,clusters}.npy              as in the bank; clusters joined by vectors, too
    NEIGHBOURS/held_out.npy                                 bool [rows]: copies of held-out documents, never drawn
    NEIGHBOURS/asking/{doc_ids,captions}.npy                where the documents that ask are those of another bank

A part holds `block` documents of the store by number; a document that is not in the bank has candidates -1. Candidates
are the `keep` best but the document itself; every other filter is applied when sampling (sampler.py), which needs the
scores and `alike`: bit j of `alike[i]` says that candidate j (first the image list, then the text list) has a document
vector within the limit of candidate i's.
"""

from pathlib import Path
from typing import Any

import numpy as np

from megacm3.errors import DataError
from megacm3.files import Manifest, read_manifest
from megacm3.retrieval.bank import BankMetadata, load_array

KIND = "neighbours"
IMAGE, TEXT, ASKING = "image", "text", "asking"
MAX_KEEP = 32
"""Candidates of a list at most: two lists fill the 64 bits of `alike`."""


def folder_of(kind: str, variant: int) -> str:
    """Folder of a list: `image`, `text-0`, ..."""
    return IMAGE if kind == IMAGE else f"{TEXT}-{variant}"


def part_path(folder: Path, kind: str, variant: int, part: int, what: str) -> Path:
    """Path of the "ids", "scores" or "alike" of a part."""
    return folder / folder_of(kind, variant) / f"part-{part:05d}.{what}.npy"


def alike_dtype(keep: int) -> np.dtype:
    """The smallest unsigned integers with a bit for each of `2 keep` candidates."""
    return np.dtype(next(f"u{size}" for size in (1, 2, 4, 8) if 2 * keep <= 8 * size))


class NeighbourTable:
    """Neighbour lists on disk, read only and mapped. Make it with `NeighbourTable.open`; it can be pickled."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.settings = manifest.settings
        """documents, rows, keep, text_variants, query_dropout, block, alike ..."""
        self.inputs = manifest.inputs
        """Fingerprints of bank, store and encoder."""
        self.fingerprint = manifest.fingerprint
        self.documents = int(self.settings["documents"])
        """Documents of the store whose neighbours these are."""
        self.foreign = bool(self.settings["foreign"])
        """Whether the candidates are documents of another store (`inputs["candidates"]`)."""
        self.keep = int(self.settings["keep"])
        self.variants = int(self.settings["text_variants"])
        self._block = int(self.settings["block"])
        self.metadata = BankMetadata(folder, int(self.settings["rows"]))
        """Of the candidates."""
        asking = BankMetadata(folder / ASKING, int(self.settings["asking_rows"]))
        self.asking = asking if self.foreign else self.metadata
        """Of the documents that ask."""
        self._maps: dict[tuple[str, int, int, str], np.ndarray] = {}

    @staticmethod
    def open(folder: str | Path, verify: str = "size") -> "NeighbourTable":
        """Open a neighbour folder; `verify` as in `read_manifest`. Raises DataError when it is missing or damaged."""
        manifest = read_manifest(folder, KIND, verify=verify)
        try:
            return NeighbourTable(Path(folder), manifest)
        except KeyError as fault:
            raise DataError(f"{folder}/manifest.json lacks the setting {fault}") from fault

    def __len__(self) -> int:
        return self.documents

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def candidates(self, doc_id: int, kind: str, variant: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """doc_ids int64 [keep] and scores float32 [keep] by kind "image" or "text", best first, -1 and -inf for none.

        `variant`: which draw of dropped tokens; ignored for images. Raises DataError for a document or variant that the
        table does not have.
        """
        ids = self._row(doc_id, kind, variant, "ids").astype(np.int64)
        return ids, self._row(doc_id, kind, variant, "scores").astype(np.float32)

    def alike(self, doc_id: int, variant: int) -> list[int]:
        """For each candidate of the image list, then of the text list: the bits of those that it resembles."""
        return [int(bits) for bits in self._row(doc_id, TEXT, variant, "alike")]

    def _row(self, doc_id: int, kind: str, variant: int, what: str) -> np.ndarray:
        if not 0 <= doc_id < self.documents:
            raise DataError(f"document {doc_id} is not in {self.folder}; expected 0..{self.documents - 1}")
        if kind not in (IMAGE, TEXT) or not 0 <= variant < max(1, self.variants):
            raise DataError(f"{self.folder} has no list {kind} {variant}; it has {IMAGE} and {self.variants} of {TEXT}")
        part, row = divmod(doc_id, self._block)
        key = (kind, variant if kind == TEXT else 0, part, what)
        found = self._maps.get(key)
        if found is None:
            rows = min(self._block, self.documents - part * self._block)
            width = 2 * self.keep if what == "alike" else self.keep
            found = self._maps[key] = load_array(part_path(self.folder, kind, key[1], part, what), (rows, width))
        return np.asarray(found[row])


def scores_up(scores: np.ndarray) -> np.ndarray:
    """float16 that is never below the float32 score, so that a limit kept by it is kept by the score."""
    half = scores.astype(np.float16)
    return np.where(half.astype(np.float32) < scores, np.nextafter(half, np.float16(np.inf)), half)


def masks(similar: np.ndarray, keep: int) -> np.ndarray:
    """unsigned [n, 2 keep]: bit j of entry i is `similar[:, i, j]` (bool [n, 2 keep, 2 keep])."""
    weights = np.uint64(1) << np.arange(similar.shape[2], dtype=np.uint64)
    return (similar * weights).sum(2, dtype=np.uint64).astype(alike_dtype(keep))
