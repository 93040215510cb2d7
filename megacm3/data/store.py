"""The token store: what pretokenization leaves and training reads.

    STORE/tokens/part-00000.{bin,idx}   megatron-core's IndexedDataset, multimodal: one document a sample, one sequence
                                        a segment, mode 0 text (text ids) or 1 image (raw codes), + 2 where it is
                                        part of an answer (fine-tuning); no control tokens
    STORE/meta/part-00000.parquet       one row a document: key, shard, row, caption, hashes, size
    STORE/rejects/part-00000.parquet    what was left out, with the reason
    STORE/dup_cluster.npy               int64 [documents]: the first document with the same picture (or text)
    STORE/manifest.json                 sizes of the vocabulary, documents of each part, tokenizers' fingerprints

A document's number (doc_id) counts through the parts in order. A part without documents has no token files.
"""

import mmap
import os
import struct
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megacm3.data.documents import ANSWER, IMAGE, TEXT, Document, Segment
from megacm3.errors import DataError
from megacm3.files import read_manifest

if TYPE_CHECKING:
    import pyarrow

    from megacm3.tokenizers.vocabulary import Vocabulary

KIND = "store"
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}
"""megatron-core's codes of the two types that a store may have."""
_OPEN_PARTS = 8192
"""Parts kept mapped: each takes two mappings of the 65,530 that Linux gives a process."""


@dataclass(frozen=True)
class StoreShape:
    """The sizes that ids and segments of a store obey."""

    text_size: int
    codebook_size: int
    image_tokens: int
    image_size: int

    @property
    def dtype(self) -> np.dtype:
        """uint16 when every id fits (megatron's own rule would take int32 from 65,500 on), else int32."""
        return np.dtype(np.uint16 if max(self.text_size, self.codebook_size) <= 65536 else np.int32)

    def check(self, mode: int, tokens: np.ndarray) -> None:
        """Raises DataError for a segment that is empty, has an id out of range, or is a picture of another size."""
        if mode not in (TEXT, IMAGE, TEXT | ANSWER, IMAGE | ANSWER):
            raise DataError(f"a segment has mode {mode}; expected 0 (text) or 1 (image), + 2 in an answer")
        kind = mode & 1
        name, size = ("image", self.codebook_size) if kind == IMAGE else ("text", self.text_size)
        if len(tokens) == 0:
            raise DataError(f"a segment of {name} is empty")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= size:
            first = int(np.flatnonzero((tokens < 0) | (tokens >= size))[0])
            raise DataError(f"{name} ids {low}..{high} outside 0..{size - 1}, first at position {first}")
        if kind == IMAGE and len(tokens) != self.image_tokens:
            raise DataError(f"an image has {len(tokens)} codes; expected exactly {self.image_tokens}")


def part_name(number: int) -> str:
    """`part-00000`"""
    return f"part-{number:05d}"


def index_bytes(dtype: np.dtype, lengths: list[int], modes: list[int], bounds: list[int]) -> bytes:
    """The content of an `.idx`: tokens and mode of each sequence, and the sequence at which each document begins.

    The format is megatron-core's (header, int32 lengths, int64 byte offsets, int64 document bounds, int8 modes); its
    builder is not used, since importing it costs every worker seconds and its cast wraps ids that are too large.
    """
    code = next(code for code, known in _DTYPES.items() if known == dtype)
    sizes = np.asarray(lengths, np.int32)
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)[:-1]]) * dtype.itemsize
    arrays = (sizes, starts.astype(np.int64), np.asarray(bounds, np.int64), np.asarray(modes, np.int8))
    header = _HEADER.pack(_MAGIC, 1, code, len(lengths), len(bounds))
    return header + b"".join(array.tobytes() for array in arrays)


def _mapped(path: Path) -> np.ndarray:
    """A file's bytes. Training reads documents in any order: reading ahead would cost more than all else together."""
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    # A plain array: slicing numpy's own memmap class costs several times as much.
    return np.frombuffer(mapped, np.uint8)


class Part:
    """One `.bin`/`.idx` pair, mapped into memory.

    megatron-core's reader is not used for reading: it keeps a file handle for each part, its arrays crash the process
    when they outlive it, it accepts a truncated `.bin`, and it takes seconds to import.
    """

    def __init__(self, prefix: Path) -> None:
        """Raises DataError when the pair is missing, truncated, or not an index with modes."""
        index, data = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
        try:
            raw, self._data = _mapped(index), _mapped(data)
        except (OSError, ValueError) as fault:
            raise DataError(f"{prefix}.idx/.bin cannot be read: {fault}") from fault
        magic, version, code, sequences, bounds = _HEADER.unpack(
            raw[: _HEADER.size].tobytes().ljust(_HEADER.size, b"\0")
        )
        if magic != _MAGIC or version != 1 or code not in _DTYPES:
            raise DataError(f"{index} is not an index that this store writes (version {version}, type {code})")
        expected = _HEADER.size + sequences * (4 + 8 + 1) + bounds * 8
        if raw.size != expected or bounds < 1:
            raise DataError(f"{index} has {raw.size} bytes; {sequences} sequences with modes need {expected}")
        self.dtype = _DTYPES[code]
        self.lengths = _array(raw, np.int32, _HEADER.size, sequences)
        self.pointers = _array(raw, np.int64, _HEADER.size + 4 * sequences, sequences)
        self.bounds = _array(raw, np.int64, _HEADER.size + 12 * sequences, bounds)
        self.modes = _array(raw, np.int8, _HEADER.size + 12 * sequences + 8 * bounds, sequences)
        tokens = self._data.size
        end = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        if tokens != end or int(self.bounds[-1]) != sequences:
            raise DataError(f"{data} has {tokens} bytes; its index ends at {end}")

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def segments(self, row: int) -> list[tuple[int, np.ndarray]]:
        """(mode, int64 tokens) of each segment of document `row`: copies."""
        first, last = int(self.bounds[row]), int(self.bounds[row + 1])
        return [(int(self.modes[i]), self._tokens(i)) for i in range(first, last)]

    def segment_lengths(self, row: int) -> list[tuple[int, int]]:
        """(mode, number of tokens) of each segment of document `row`, without reading tokens."""
        first, last = int(self.bounds[row]), int(self.bounds[row + 1])
        return list(zip(self.modes[first:last].tolist(), self.lengths[first:last].tolist(), strict=True))

    def _tokens(self, i: int) -> np.ndarray:
        start = int(self.pointers[i])
        end = start + int(self.lengths[i]) * self.dtype.itemsize
        return self._data[start:end].view(self.dtype).astype(np.int64)


def _array(raw: np.ndarray, dtype: type, start: int, count: int) -> np.ndarray:
    return np.ndarray((count,), dtype, buffer=raw, offset=start)


class Store:
    """A finished store, read only. Make it with `Store.open`. It can be pickled to workers."""

    def __init__(self, folder: Path, settings: dict[str, Any], inputs: dict[str, str], fingerprint: str) -> None:
        self.folder = folder
        self.settings = settings
        """text_size, codebook_size, image_tokens, image_size, dtype, documents, tokens, parts ..."""
        self.inputs = inputs
        """Fingerprints of the tokenizers, by role."""
        self.fingerprint = fingerprint
        self.shape = StoreShape(**{name: settings[name] for name in StoreShape.__dataclass_fields__})
        self._starts = np.concatenate([[0], np.cumsum([part["documents"] for part in settings["parts"]])]).astype(
            np.int64
        )
        self._parts: OrderedDict[int, Part] = OrderedDict()

    @staticmethod
    def open(folder: str | Path, verify: str = "size") -> "Store":
        """Open a store; `verify` as in `read_manifest`.

        Raises DataError when it is missing, damaged or of another kind.
        """
        manifest = read_manifest(folder, KIND, verify=verify)
        try:
            return Store(Path(folder), manifest.settings, manifest.inputs, manifest.fingerprint)
        except KeyError as fault:
            raise DataError(f"{folder}/manifest.json lacks the setting {fault}") from fault

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_parts": OrderedDict()}

    def _locate(self, doc_id: int) -> tuple[Part, int, int]:
        """The part, its number, and the document's row in it."""
        if not 0 <= doc_id < len(self):
            raise DataError(f"document {doc_id} is not in {self.folder}; expected 0..{len(self) - 1}")
        number = int(np.searchsorted(self._starts, doc_id, side="right")) - 1
        part = self._parts.get(number)
        if part is None:
            part = self._parts[number] = self.part(number)
            if len(self._parts) > _OPEN_PARTS:
                self._parts.popitem(last=False)
        return part, number, doc_id - int(self._starts[number])

    def part(self, number: int) -> Part:
        """Open one part. Raises DataError when it does not hold what the manifest says."""
        part = Part(self.folder / "tokens" / part_name(number))
        if len(part) != self.settings["parts"][number]["documents"] or part.dtype != self.shape.dtype:
            raise DataError(f"{self.folder}/tokens/{part_name(number)} does not fit the manifest")
        return part

    def document(self, doc_id: int) -> Document:
        """Document `doc_id` with its tokens. Raises DataError for a number outside the store, and for tokens outside
        the vocabulary, which would be other tokens, or none, once they are ids.
        """
        part, number, row = self._locate(doc_id)
        segments = part.segments(row)
        for mode, tokens in segments:
            try:
                self.shape.check(mode, tokens)
            except DataError as fault:
                raise DataError(f"{self.folder}/tokens/{part_name(number)}: document {row}: {fault}") from fault
        return Document(doc_id, tuple(Segment(mode & 1, tokens, bool(mode & ANSWER)) for mode, tokens in segments))

    def segment_lengths(self, doc_id: int) -> list[tuple[int, int]]:
        """(mode, length) of each segment of document `doc_id` (documents.Shape); reads the index only."""
        part, _, row = self._locate(doc_id)
        return part.segment_lengths(row)

    def longest(self) -> int:
        """Number of the document with the most tokens, two control tokens a segment included; manifest only."""
        parts = self.settings["parts"]
        number = max(range(len(parts)), key=lambda n: parts[n]["longest"])
        return int(self._starts[number]) + parts[number]["longest_row"]

    def answers(self) -> dict[str, int]:
        """Documents whose answer has a picture ("image"), or is text alone ("text"); zeros where nothing is marked."""
        counted = [part.get("answers", {}) for part in self.settings["parts"]]
        return {name: sum(part.get(name, 0) for part in counted) for name in ("text", "image")}

    @cached_property
    def _dup_cluster(self) -> np.ndarray:
        return np.load(self.folder / "dup_cluster.npy", mmap_mode="r")

    def metadata(self, columns: Iterable[str] | None = None) -> "pyarrow.Table":
        """A table in doc_id order.

        Columns: doc_id, dup_cluster (the smallest doc_id with the same picture, or the same text where there is none)
        and those of `META_FIELDS`. All of them by default. Raises DataError for an unknown column.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        from megacm3.data.parts import META_FIELDS

        computed = {"doc_id": np.arange(len(self)), "dup_cluster": self._dup_cluster}
        wanted = list(columns) if columns is not None else [*computed, *META_FIELDS]
        unknown = [name for name in wanted if name not in computed and name not in META_FIELDS]
        if unknown:
            raise DataError(f"the store has no column {unknown[0]}; it has {', '.join([*computed, *META_FIELDS])}")
        stored = [name for name in wanted if name not in computed] or ["row"]
        paths = [self.folder / "meta" / f"{part_name(n)}.parquet" for n in range(len(self.settings["parts"]))]
        lacking = set(stored) - set(pq.read_schema(paths[0]).names) if paths else set()
        if lacking:
            raise DataError(
                f"{self.folder} has no {', '.join(sorted(lacking))} in its metadata: an earlier version made it; "
                "make it again with tools/pretokenize.py"
            )
        table = pa.concat_tables([pq.read_table(path, columns=stored) for path in paths])
        for name in wanted:
            if name in computed:
                table = table.append_column(name, pa.array(np.asarray(computed[name])))
        return table.select(wanted)

    def vocabulary(self) -> "Vocabulary":
        """The vocabulary of the store's sizes: CM3Leon's layout, or the table that the settings hold."""
        from megacm3.tokenizers.vocabulary import Vocabulary

        if "vocabulary" in self.settings:
            return Vocabulary.from_json(self.settings["vocabulary"])
        shape = self.shape
        return Vocabulary.cm3leon(shape.text_size, shape.codebook_size, image_tokens=shape.image_tokens)


@dataclass(frozen=True)
class StoreReport:
    """What `verify_store` counted."""

    documents: int
    text_segments: int
    image_segments: int
    tokens: int
    rejects: int


def verify_store(folder: str | Path) -> StoreReport:
    """Read everything: hashes, index against data, every id's range, every picture's grid, every row of metadata.

    Raises DataError at the first thing that is wrong, naming the file and the document.
    """
    import pyarrow.parquet as pq

    store = Store.open(folder, verify="sha256")
    counts = {TEXT: 0, IMAGE: 0}
    tokens = rejects = 0
    for number, expected in enumerate(store.settings["parts"]):
        name = part_name(number)
        rejects += pq.read_metadata(store.folder / "rejects" / f"{name}.parquet").num_rows
        rows = pq.read_metadata(store.folder / "meta" / f"{name}.parquet").num_rows
        if rows != expected["documents"]:
            raise DataError(f"{store.folder}/meta/{name}.parquet has {rows} rows for {expected['documents']} documents")
        if not rows:
            continue
        part = store.part(number)
        for row in range(rows):
            segments = part.segments(row)
            if not segments:
                raise DataError(f"{store.folder}/tokens/{name}: document {row} is empty")
            for mode, values in segments:
                try:
                    store.shape.check(mode, values)
                except DataError as fault:
                    raise DataError(f"{store.folder}/tokens/{name}: document {row}: {fault}") from fault
                counts[mode & 1] += 1
                tokens += len(values)
    if tokens != store.settings["tokens"] or len(store._dup_cluster) != len(store):
        raise DataError(f"{store.folder} holds {tokens} tokens; its manifest says {store.settings['tokens']}")
    return StoreReport(len(store), counts[TEXT], counts[IMAGE], tokens, rejects)


def link_or_copy(source: Path, target: Path) -> None:
    """Give `source` a second name, by a hard link where the file system has them."""
    import shutil

    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
