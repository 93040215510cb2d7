"""The memory bank: the documents of a store that have a picture and a caption, found by text or picture.

    BANK/manifest.json                        sizes, index, fingerprints of store and encoder, hashes of all files
    BANK/encoder/                             copy of the CLIP folder (not for precomputed vectors)
    BANK/meta/part-00000.parquet              doc_id, key, shard, row, caption, hashes, score of picture and caption
    BANK/emb/{image,text}/part-00000.npy      float16 [n, d], unit vectors, rows as in meta
    BANK/doc_ids.npy                          int64 [rows], ascending: the store's document numbers
    BANK/{captions,clusters}.npy              uint64, int64 [rows]: hash of the caption, cluster of near copies
    BANK/index/trained.faiss                  inverted files only: centroids and quantiser, without vectors
    BANK/index/shard-00000-of-00002.faiss     or merged.{faiss,ivfdata}
    BANK/eval/recall.json                     inverted files only: recall@10 by number of lists searched

A bank is never changed: new data is a new bank. It is joined by document number everywhere, never by order.
"""

import hashlib
import mmap as mapping
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megacm3.errors import ConfigError, DataError
from megacm3.files import Manifest, read_manifest
from megacm3.retrieval.backends import open_index
from megacm3.retrieval.encoder import Encoder, document_vectors
from megacm3.retrieval.index import VectorIndex

if TYPE_CHECKING:
    import pyarrow

KIND = "bank"
_AT_ONCE = 4096
"""Vectors made at once: the steps between need a few times their memory."""
_HELD = 16_384
"""Rows read before the pages of the mapped files are given back: they would count as the process's memory."""
META_FIELDS = {
    "doc_id": "int64",
    "key": "string",
    "shard": "string",
    "row": "int64",
    "caption": "string",
    "caption_sha1": "string",
    "image_sha256": "string",
    "phash": "uint64",
    "width": "int32",
    "height": "int32",
    "score": "float32",
}
"""Columns of meta/part-*.parquet: the store's, and `score`, the inner product of picture and caption."""


def part_file(folder: Path, what: str, number: int) -> Path:
    """Path of part `number` of "meta", "image" or "text"."""
    name = f"part-{number:05d}"
    return folder / "meta" / f"{name}.parquet" if what == "meta" else folder / "emb" / what / f"{name}.npy"


def caption_hash(caption: str) -> int:
    """64-bit hash of a caption, letter case and white space aside."""
    text = " ".join(caption.casefold().split())
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Embeddings:
    """The image and text vectors of a bank, mapped, by row."""

    def __init__(self, folder: Path, parts: Sequence[int]) -> None:
        """`parts`: rows of each part, 0 for one without files."""
        self._folder = folder
        self._starts = np.concatenate([[0], np.cumsum(np.asarray(parts, np.int64))]).astype(np.int64)
        self._maps: dict[tuple[str, int], np.ndarray] = {}
        self._read = 0

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    @property
    def dim(self) -> int:
        """Width of the vectors, of which there must be some."""
        return int(self.take("image", np.zeros(1, np.int64)).shape[1])

    def take(self, kind: str, rows: np.ndarray) -> np.ndarray:
        """float32 [len(rows), d] of "image" or "text" vectors. Raises DataError for a part of another shape."""
        rows = np.asarray(rows, np.int64)
        assert not len(rows) or (rows.min() >= 0 and rows.max() < len(self)), "rows outside the bank"
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        blocks = [self._map(kind, int(part))[rows[parts == part] - self._starts[part]] for part in np.unique(parts)]
        if not blocks:
            return np.zeros((0, 0), np.float32)
        order = np.argsort(parts, kind="stable")
        result = np.empty((len(rows), blocks[0].shape[1]), np.float32)
        result[order] = np.concatenate(blocks)
        self._read += len(rows)
        if self._read > _HELD:
            self._give_back()
        return result

    def _give_back(self) -> None:
        self._read = 0
        for array in self._maps.values():
            mapped = getattr(array, "_mmap", None)
            if mapped is not None and hasattr(mapping, "MADV_DONTNEED"):
                mapped.madvise(mapping.MADV_DONTNEED)

    def documents(self, rows: np.ndarray) -> np.ndarray:
        """float32 [len(rows), d]: document vectors, made of the stored halves."""
        result = np.zeros((0, 0), np.float32)
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start : start + _AT_ONCE]
            vectors = document_vectors(self.take("image", part), self.take("text", part))
            if not start:
                result = np.empty((len(rows), vectors.shape[1]), np.float32)
            result[start : start + _AT_ONCE] = vectors
        return result

    def _map(self, kind: str, part: int) -> np.ndarray:
        found = self._maps.get((kind, part))
        if found is None:
            path = part_file(self._folder, kind, part)
            expected = int(self._starts[part + 1] - self._starts[part])
            found = self._maps[kind, part] = load_array(path, (expected, None))
        return found


def load_array(path: Path, shape: tuple[int | None, ...]) -> np.ndarray:
    """A mapped .npy of the given shape (None: any). Raises DataError when it is missing, damaged or of another."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as fault:
        raise DataError(f"{path} is missing") from fault
    except (OSError, ValueError, EOFError) as fault:
        raise DataError(f"{path} is damaged: {fault}") from fault
    fits = len(array.shape) == len(shape) and all(w in (None, n) for w, n in zip(shape, array.shape, strict=True))
    if not fits:
        raise DataError(f"{path} has shape {array.shape}; the manifest says {shape}")
    return array


def check_encoder(bank: "Manifest | MemoryBank", fingerprint: str, dim: int, folder: str | Path) -> None:
    """Raises DataError when an encoder cannot have made the vectors of `bank`: another one, or for precomputed vectors
    one of another width."""
    expected = bank.inputs.get("encoder", "")
    if bank.settings["precomputed"]:
        fits, found = dim == bank.settings["dim"], f"of width {dim}; the bank's vectors have {bank.settings['dim']}"
    else:
        fits, found = fingerprint == expected, f"{fingerprint[:12]}; the bank's is {expected[:12]}"
    if not fits:
        raise DataError(f"another encoder than that of {folder}: {found}")


class BankMetadata:
    """What sampling needs to know of every document of a bank, mapped; by row."""

    def __init__(self, folder: Path, rows: int) -> None:
        self._folder, self._rows = folder, rows

    def __len__(self) -> int:
        return self._rows

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_rows": self._rows}

    @cached_property
    def doc_ids(self) -> np.ndarray:
        """int64 [rows], ascending."""
        return load_array(self._folder / "doc_ids.npy", (self._rows,))

    @cached_property
    def captions(self) -> np.ndarray:
        """uint64 [rows]: `caption_hash`."""
        return load_array(self._folder / "captions.npy", (self._rows,))

    @cached_property
    def clusters(self) -> np.ndarray:
        """int64 [rows]: equal for near copies (the smallest document number among them)."""
        return load_array(self._folder / "clusters.npy", (self._rows,))

    @cached_property
    def held_out(self) -> np.ndarray:
        """bool [rows]: copies of held-out documents. Neighbour folders alone have it."""
        return load_array(self._folder / "held_out.npy", (self._rows,))

    def rows(self, doc_ids: np.ndarray) -> np.ndarray:
        """int64: row of each document, -1 for one that is not in the bank."""
        doc_ids = np.asarray(doc_ids, np.int64)
        found = np.searchsorted(self.doc_ids, doc_ids)
        inside = np.minimum(found, self._rows - 1)
        return np.where(self.doc_ids[inside] == doc_ids, inside, -1)


class MemoryBank:
    """A bank on disk, read only. Make it with `MemoryBank.open`."""

    def __init__(self, folder: Path, manifest: Manifest, index: VectorIndex) -> None:
        self.folder = folder
        self.index = index
        self.settings = manifest.settings
        """dim, documents (of the store), rows, parts, index, shards, nprobe, job."""
        self.inputs = manifest.inputs
        """Fingerprints of store and encoder."""
        self.fingerprint = manifest.fingerprint
        self.dim = int(self.settings["dim"])
        self.documents = int(self.settings["documents"])
        """Documents of the store: ids are below this."""
        self.metadata = BankMetadata(folder, int(self.settings["rows"]))
        self.embeddings = Embeddings(folder, self.settings["parts"])

    @staticmethod
    def open(folder: str | Path, verify: str = "size") -> "MemoryBank":
        """Open a bank; `verify` as in `read_manifest`.

        Raises DataError when it is missing, damaged, or its counts differ.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, KIND, verify=verify)
        settings = manifest.settings
        try:
            rows, dim = settings["rows"], settings["dim"]
            index = open_index(folder, settings)
            if index.size != rows or index.dim != dim or sum(settings["parts"]) != rows:
                raise DataError(
                    f"{folder}: the index holds {index.size} vectors of width {index.dim}, the parts "
                    f"{sum(settings['parts'])} rows; the manifest says {rows} of width {dim}"
                )
            return MemoryBank(folder, manifest, index)
        except KeyError as fault:
            raise DataError(f"{folder}/manifest.json lacks the setting {fault}") from fault

    def __len__(self) -> int:
        return len(self.metadata)

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents of each query by inner product.

        queries: float32 [n, d], finite, unit length for scores to be cosines. exclude: ids that no answer may hold.
        Returns scores float32 [n, k] descending and doc_ids int64 [n, k]; where there are fewer, -inf and -1.
        Raises DataError for queries of another width or ones that are not finite, ConfigError for k below 1.
        """
        queries = np.asarray(queries)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise DataError(
                f"queries have shape {queries.shape}; {self.folder} holds vectors of width {self.dim}: "
                f"make them with the encoder of the bank ({self.inputs.get('encoder', '')[:12]})"
            )
        if k < 1:
            raise ConfigError(f"k = {k}; expected at least 1")
        if not np.isfinite(queries).all():
            bad = int((~np.isfinite(queries).all(1)).sum())
            raise DataError(f"{bad} of {len(queries)} queries are not finite")
        held = min(k, len(self))
        scores, ids = self.index.search(queries, held, exclude)
        if ids.size and int(ids.max()) >= self.documents:
            raise DataError(f"{self.folder}: the index gave document {int(ids.max())}; the store has {self.documents}")
        if held < k:
            scores = np.pad(scores, ((0, 0), (0, k - held)), constant_values=-np.inf)
            ids = np.pad(ids, ((0, 0), (0, k - held)), constant_values=-1)
        return scores, ids

    def encoder(self, device: str = "cpu") -> Encoder:
        """The encoder that made the bank. Raises ConfigError when the bank was made of precomputed vectors."""
        if not (self.folder / "encoder").is_dir():
            raise ConfigError(f"{self.folder} was made of precomputed vectors and holds no encoder; give --encoder DIR")
        encoder = Encoder.load(self.folder / "encoder", device)
        self.check_encoder(encoder)
        return encoder

    def check_encoder(self, encoder: Encoder) -> None:
        """Raises DataError when `encoder` cannot have made the bank's vectors."""
        check_encoder(self, encoder.fingerprint, encoder.dim, self.folder)

    def describe(self, doc_ids: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """`META_FIELDS` of some documents, in the order given. Raises DataError for one that is not in the bank."""
        rows = self.metadata.rows(np.asarray(doc_ids, np.int64))
        if (rows < 0).any():
            raise DataError(f"document {np.asarray(doc_ids)[rows < 0][0]} is not in {self.folder}")
        starts = np.concatenate([[0], np.cumsum(self.settings["parts"])])
        parts = np.searchsorted(starts, rows, side="right") - 1
        tables = {part: self.table(int(part)) for part in set(parts.tolist())}
        described = []
        for wanted, row, part in zip(doc_ids, rows, parts.tolist(), strict=True):
            found = tables[part].slice(int(row - starts[part]), 1).to_pylist()[0]
            if found["doc_id"] != wanted:
                raise DataError(f"{self.folder}/meta has document {found['doc_id']} in the place of {wanted}")
            described.append(found)
        return described

    def table(self, part: int, columns: Sequence[str] | None = None) -> "pyarrow.Table":
        """The metadata of one part."""
        import pyarrow.parquet as pq

        return pq.read_table(part_file(self.folder, "meta", part), columns=list(columns) if columns else None)

    def captions(self, first: int, last: int) -> list[str]:
        """The captions of rows first..last-1."""
        starts = np.concatenate([[0], np.cumsum(self.settings["parts"])])
        found: list[str] = []
        for part, rows in enumerate(self.settings["parts"]):
            low, high = max(first, starts[part]), min(last, starts[part + 1])
            if rows and low < high:
                column = self.table(part, ["caption"])["caption"]
                found += column.slice(int(low - starts[part]), int(high - low)).to_pylist()
        return found
