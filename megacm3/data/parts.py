"""Writing a store: one part at a time, then all parts under their final name."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from megacm3.data.documents import ANSWER, IMAGE, TEXT
from megacm3.data.sources import Rejected
from megacm3.data.store import KIND, Store, StoreShape, index_bytes, link_or_copy, part_name
from megacm3.errors import DataError
from megacm3.files import new_folder, read_json, sha256_file, write_json, write_manifest

META_FIELDS = {
    "key": "string",
    "shard": "string",
    "row": "int64",
    "caption": "string",
    "caption_sha1": "string",
    "image_sha256": "string",
    "phash": "uint64",
    "width": "int32",
    "height": "int32",
    "images": "int32",
    "task": "string",
}
"""Columns of meta/part-*.parquet. Hashes and size are the first picture's, null for text alone; `image_sha256` is of
the file's bytes, width and height of the upright picture before it was cropped; `task` is fine-tuning's."""
REJECT_FIELDS = {"key": "string", "shard": "string", "row": "int64", "reason": "string", "detail": "string"}


_ROWS = 65_536
"""Rows of a table in memory before they are written."""


class TableWriter:
    """A parquet file with exactly the columns `fields` (name -> arrow type), written as its rows come."""

    def __init__(self, path: Path, fields: dict[str, str]) -> None:
        self._path, self._fields = path, fields
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None
        self.count = 0
        """Rows so far."""

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self._rows.append(row)
        self.count += 1
        if len(self._rows) == _ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in self._fields.items()])
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, schema, compression="zstd")
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=schema))
        self._rows = []

    def finish(self) -> None:
        """Write what is left, and the file's end."""
        if self._rows or self._writer is None:
            self._flush()
        self._writer.close()


class PartWriter:
    """Writes `tokens.{bin,idx}`, `meta.parquet`, `rejects.parquet` and `part.json` (written last) into a folder."""

    def __init__(self, folder: Path, shape: StoreShape) -> None:
        self._folder = folder
        self._shape = shape
        self._data: IO[bytes] | None = None
        self._lengths: list[int] = []
        self._modes: list[int] = []
        self._bounds = [0]
        self._meta = TableWriter(folder / "meta.parquet", META_FIELDS)
        self._rejects = TableWriter(folder / "rejects.parquet", REJECT_FIELDS)
        self._tokens = self._longest = self._longest_row = 0
        self._answers = {"text": 0, "image": 0}

    def add(self, segments: Iterable[tuple[int, np.ndarray]], meta: dict[str, Any]) -> None:
        """Append one document of (mode, tokens); `meta` has values for some of `META_FIELDS`.

        Raises DataError for a segment out of shape: a cast to uint16 would wrap too large an id without a word.
        """
        checked = [(mode, np.asarray(tokens)) for mode, tokens in segments]
        for mode, tokens in checked:
            self._shape.check(mode, tokens)
        if self._data is None:
            self._data = open(self._folder / "tokens.bin", "wb")
        lengths = [len(tokens) for _, tokens in checked]
        self._data.write(np.concatenate([t for _, t in checked]).astype(self._shape.dtype).tobytes())
        self._lengths += lengths
        self._modes += [mode for mode, _ in checked]
        self._bounds.append(len(self._lengths))
        if sum(lengths) + 2 * len(lengths) > self._longest:
            self._longest, self._longest_row = sum(lengths) + 2 * len(lengths), self._meta.count
        self._meta.add({name: meta.get(name) for name in META_FIELDS})
        self._tokens += sum(lengths)
        modes = {mode for mode, _ in checked}
        if modes & {ANSWER | TEXT, ANSWER | IMAGE}:
            self._answers["image" if ANSWER | IMAGE in modes else "text"] += 1

    def reject(self, rejected: Rejected) -> None:
        """Note a row that gave no document."""
        self._rejects.add({name: getattr(rejected, name) for name in REJECT_FIELDS})

    def finish(self) -> dict[str, Any]:
        """Write what is left to write; gives documents, sequences, tokens, rejects and the files' hashes."""
        if self._data is not None:
            self._data.close()
            index = index_bytes(self._shape.dtype, self._lengths, self._modes, self._bounds)
            (self._folder / "tokens.idx").write_bytes(index)
        self._meta.finish()
        self._rejects.finish()
        files = {path.name: _entry(path) for path in sorted(self._folder.iterdir())}
        counts = {"documents": self._meta.count, "sequences": len(self._lengths), "tokens": self._tokens}
        counts |= {"longest": self._longest, "longest_row": self._longest_row}
        result: dict[str, Any] = counts | {"rejects": self._rejects.count, "files": files}
        if any(self._answers.values()):
            # Documents by their answer: with a picture in it, or text alone.
            result["answers"] = self._answers
        write_json(self._folder / "part.json", result)
        return result


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def read_part(folder: Path) -> dict[str, Any] | None:
    """What `PartWriter.finish` gave, or None when the folder is not a whole part."""
    if not (folder / "part.json").is_file():
        return None
    result = read_json(folder / "part.json")
    whole = all(
        (folder / n).is_file() and (folder / n).stat().st_size == e["bytes"] for n, e in result["files"].items()
    )
    return result if whole else None


def assemble(
    folder: str | Path,
    parts: list[Path],
    shape: StoreShape,
    inputs: dict[str, str],
    settings: dict[str, Any] | None = None,
    *,
    replace: bool = False,
) -> Store:
    """Put finished parts (folders of `PartWriter`) together as the store `folder`, whole or not at all.

    Raises DataError when no part holds a document.
    """
    results = [read_part(part) for part in parts]
    if not any(result and result["documents"] for result in results):
        raise DataError(f"no document is left for {folder}; see the rejects for the reasons")
    known: dict[str, dict[str, Any]] = {}
    counts: list[dict[str, Any]] = []
    with new_folder(folder, replace=replace) as temporary:
        for number, (source, result) in enumerate(zip(parts, results, strict=True)):
            assert result is not None, f"{source} is not a whole part"
            for name, entry in result["files"].items():
                stem, suffix = name.split(".")
                final = f"{stem}/{part_name(number)}.{suffix}"
                link_or_copy(source / name, temporary / final)
                known[final] = entry
            counts.append({key: value for key, value in result.items() if key != "files"})
        totals = {key: sum(part[key] for part in counts) for key in ("documents", "tokens", "rejects")}
        sizes = {name: getattr(shape, name) for name in StoreShape.__dataclass_fields__}
        everything = sizes | {"dtype": shape.dtype.name} | totals | {"parts": counts} | (settings or {})
        np.save(temporary / "dup_cluster.npy", _dup_clusters(temporary, len(parts)))
        write_manifest(temporary, KIND, everything, inputs, known)
    return Store.open(folder)


def _dup_clusters(folder: Path, parts: int) -> np.ndarray:
    # int64 [documents]: the smallest doc_id reachable over equal picture bytes, equal perceptual hashes, or (for text
    # alone) equal texts.
    import pyarrow.parquet as pq

    columns = ["image_sha256", "phash", "caption_sha1"]
    identities, all_looks, first = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)], 0
    # Part by part: hashes as texts take far more memory than as numbers.
    for part in range(parts):
        table = pq.read_table(folder / "meta" / f"{part_name(part)}.parquet", columns=columns)
        exact, near, texts = (table[name].to_pylist() for name in columns)
        names = [e or t or str(i) for i, (e, t) in enumerate(zip(exact, texts, strict=True), first)]
        identities.append(np.array([_key(name) for name in names], np.uint64))
        seen = [_key(str(h)) if h is not None else int(k) for h, k in zip(near, identities[-1], strict=True)]
        all_looks.append(np.array(seen, np.uint64))
        first += len(names)
    identity, looks = np.concatenate(identities), np.concatenate(all_looks)
    cluster = np.arange(len(identity), dtype=np.int64)
    while True:
        before = cluster.copy()
        for keys in (identity, looks):
            _, group = np.unique(keys, return_inverse=True)
            smallest = np.full(group.max(initial=-1) + 1, len(cluster), np.int64)
            np.minimum.at(smallest, group, cluster)
            cluster = smallest[group]
        if np.array_equal(before, cluster):
            return cluster


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def write_store(
    folder: str | Path,
    documents: Iterable[tuple[list[tuple[int, np.ndarray]], dict[str, Any]]],
    shape: StoreShape,
    inputs: dict[str, str] | None = None,
    *,
    documents_per_part: int = 1_000_000,
) -> Store:
    """A store from (segments as (mode, tokens), metadata) pairs in memory; for tests, conversions and small sets."""
    import tempfile

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
        parts = []
        for number, batch in enumerate(_batched(documents, documents_per_part)):
            part = Path(work, str(number))
            part.mkdir()
            writer = PartWriter(part, shape)
            for segments, meta in batch:
                writer.add(segments, meta)
            writer.finish()
            parts.append(part)
        return assemble(folder, parts, shape, inputs or {})


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
