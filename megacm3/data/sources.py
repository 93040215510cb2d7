"""Readers: every input format becomes the same `Sample`, or a `Rejected` that says why not.

A shard is one file (or one range of a data set's rows); it is read from its begin to its end, in order, and gives for
each of its rows one Sample or one Rejected, so that nothing is lost unseen. Text and picture belong together by key,
never by the order of two lists. A shard that is damaged as a whole raises DataError.
"""

import hashlib
import json
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacm3.data.images import Reject
from megacm3.errors import DataError
from megacm3.files import sha256_json

if TYPE_CHECKING:
    from megacm3.sft.read import SftOptions

logger = logging.getLogger(__name__)

CAPTION_FIELDS = ("caption", "text", "TEXT", "alt")
"""Names of a caption, in the order in which they are looked for."""
IMAGE_FIELDS = ("image", "jpg", "jpeg", "png", "webp", "img", "file_name")
"""Names of a picture (bytes, a struct of bytes and path, or a path), in the order in which they are looked for."""
_EDGE = 1 << 16
"""Bytes at either end of a shard that identify it, with its size."""


@dataclass(frozen=True)
class Sample:
    """One document as the input has it: texts (str) and encoded pictures (bytes) in their order."""

    key: str
    """Unique in its shard."""
    shard: str
    """Name of the shard, the same wherever the folder lies."""
    row: int
    """Position in the shard, rejects counted."""
    parts: tuple[str | bytes, ...]
    """(caption, picture) for a pair, (text,) for text, any order for interleaved documents."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Further fields of the input."""
    answers: tuple[bool, ...] = ()
    """Fine-tuning: for each part whether it belongs to the answer; empty elsewhere."""
    task: str = ""
    """Fine-tuning: name of the task."""

    @property
    def caption(self) -> str:
        """The texts of the document, one line each; in fine-tuning a line for each run of texts between pictures."""
        if not self.answers:
            return "\n".join(part for part in self.parts if isinstance(part, str))
        runs = "".join(part if isinstance(part, str) else "\0" for part in self.parts)
        return "\n".join(run.strip() for run in runs.split("\0") if run.strip())

    @property
    def images(self) -> int:
        """Number of pictures."""
        return sum(isinstance(part, bytes) for part in self.parts)


@dataclass(frozen=True)
class Rejected:
    """A row that gives no sample."""

    key: str
    shard: str
    row: int
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Shard:
    """One unit of reading: `read` with its arguments gives its rows."""

    name: str
    """Relative to the inputs' common folder, with the row range for a part of a data set."""
    path: str
    """Where it is."""
    kind: str
    """Which reader reads it: a key of `readers()`."""
    rows: tuple[int, int] | None = None
    """First row and the row after the last one, for a part of a data set."""
    files: tuple[str, ...] = ()
    """Fine-tuning: all files of a release, such as questions and annotations; `path` is the first of them."""
    images: str = ""
    """Fine-tuning: folder of the pictures that are named by path; empty = that of `path`."""


@dataclass(frozen=True)
class ReadOptions:
    """How shards are read."""

    allow_partial: bool = False
    """Take what is readable of a damaged shard (with a reject row that says so) instead of refusing it."""
    pictures: bool = True
    """Read the pictures' bytes; without them only captions are given (text tokenizer)."""
    text_filters: tuple[str, ...] = ()
    """datatrove's filters (data/filters.py), for texts that have no picture."""
    sft: "SftOptions | None" = None
    """Fine-tuning: read records of tasks (sft/read.py) instead of captions and texts."""


def clean_text(raw: str | bytes) -> str:
    """Text in NFC without control characters (newline and tab stay) and without white space at its ends.

    Raises Reject: invalid_utf8, nul_in_text, empty_text.
    """
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw.encode("utf-8").decode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as fault:
        raise Reject("invalid_utf8", str(fault)) from fault
    if "\0" in text:
        raise Reject("nul_in_text", repr(text[:80]))
    text = unicodedata.normalize("NFC", text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n"))
    if not text.isprintable():
        text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
    text = text.strip()
    if not text:
        raise Reject("empty_text")
    return text


def readers() -> dict[str, Callable[[Shard, ReadOptions], Iterator[Sample | Rejected]]]:
    """Reader by kind of shard."""
    from megacm3.data import records, tables, tars

    return {
        "webdataset": tars.read_webdataset,
        "parquet": tables.read_parquet,
        "jsonl": tables.read_jsonl,
        "lines": tables.read_lines,
        "dataset": tables.read_dataset,
        "tfrecord": records.read_tfrecord,
        "warc": records.read_warc,
    }


def read_shard(shard: Shard, options: ReadOptions = ReadOptions()) -> Iterator[Sample | Rejected]:
    """The rows of one shard, in order. Raises DataError when the shard as a whole is damaged."""
    try:
        for item in _items(shard, options):
            if isinstance(item, Rejected):
                yield replace(item, key=writable(item.key), detail=writable(item.detail))
            else:
                yield item if item.key.isascii() else replace(item, key=writable(item.key))
    except OSError as fault:
        raise DataError(f"{shard.path} cannot be read: {fault}") from fault


def _items(shard: Shard, options: ReadOptions) -> Iterator[Sample | Rejected]:
    if options.sft is not None:
        from megacm3.sft.read import read_sft

        return read_sft(shard, options.sft)
    items = readers()[shard.kind](shard, options)
    if options.text_filters and (options.pictures or shard.kind in ("warc", "lines")):
        from megacm3.data.filters import filter_texts

        return filter_texts(items, options.text_filters)
    return items


def find_shards(inputs: str | Iterable[str], rows_per_unit: int = 10_000) -> list[Shard]:
    """The shards that the given paths and glob patterns name, sorted by name.

    Patterns may hold `*`, `?`, `**` and braces (`{000..127}`). A path is a tar, parquet, jsonl or txt file, a folder of
    such files, a data set saved by `datasets`, or an imagefolder.
    Raises DataError when a pattern matches nothing or a path is of no known kind.
    """
    patterns = [inputs] if isinstance(inputs, str) else list(inputs)
    paths = sorted({path for pattern in patterns for path in expand(pattern)})
    if not paths:
        raise DataError("no input given; expected --input with a path or a glob pattern")
    base = _common_folder(paths)
    shards = [shard for path in paths for shard in _shards_of(path, base, rows_per_unit)]
    if not shards:
        raise DataError(f"--input {' '.join(patterns)} holds no shard with a row")
    names = [shard.name for shard in shards]
    assert len(set(names)) == len(names), "shard names repeat"
    return shards


def expand(pattern: str) -> list[str]:
    """Absolute paths that a path or pattern names; of a folder that is no data set, the shards in it.

    Raises DataError when there is nothing.
    """
    import glob

    from braceexpand import braceexpand

    found: list[str] = []
    try:
        singles = [pattern] if os.path.exists(pattern) else list(braceexpand(pattern))
    except ValueError as fault:
        raise DataError(f"--input {pattern} matches no file, and its braces are not balanced") from fault
    for single in singles:
        matches = [single] if os.path.exists(single) else glob.glob(single, recursive=True)
        if not matches:
            raise DataError(f"--input {single} matches no file or folder")
        found += matches
    files = []
    for path in found:
        inside = _files_below(path) if os.path.isdir(path) and not _is_dataset(path) else []
        if os.path.isdir(path) and not inside and not _is_dataset(path):
            raise DataError(f"--input {path} is a folder without .tar, .parquet, .jsonl or .txt files or a data set")
        files += inside or [path]
    return [os.path.abspath(path) for path in files]


_KINDS = {
    ".tar": "webdataset",
    ".tar.gz": "webdataset",
    ".tgz": "webdataset",
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".tfrecord": "tfrecord",
    ".tfrecord.gz": "tfrecord",
    ".warc": "warc",
    ".warc.gz": "warc",
    ".wet": "warc",
    ".wet.gz": "warc",
    ".txt": "lines",
}
_DATASET_FILES = ("dataset_info.json", "dataset_dict.json", "state.json", "metadata.csv", "metadata.parquet")


def _kind(path: str) -> str | None:
    # TensorFlow's writers put the shard's number behind the suffix: name.tfrecord-00000-of-00010.
    name = re.sub(r"(\.tfrecord)s?(-\d+-of-\d+)?", r"\1", os.path.basename(path).lower())
    return next((kind for suffix, kind in _KINDS.items() if name.endswith(suffix)), None)


def _is_dataset(path: str) -> bool:
    return os.path.isdir(path) and any(os.path.isfile(os.path.join(path, name)) for name in _DATASET_FILES)


def _files_below(folder: str) -> list[str]:
    # A folder of tars has txt files only inside them; a folder with a metadata.jsonl has captions only in that.
    names = sorted(name for name in os.listdir(folder) if _kind(name) and not name.startswith("."))
    for kind in ("webdataset", "parquet", "tfrecord", "warc", "jsonl", "lines"):
        chosen = [name for name in names if _kind(name) == kind]
        if chosen:
            if len(chosen) < len(names):
                other = next(name for name in names if name not in chosen)
                left = f"{len(names) - len(chosen)} files of other kinds, such as {other}, are left out"
                logger.info("%s: %d files of kind %s are read; %s", folder, len(chosen), kind, left)
            return [os.path.join(folder, name) for name in chosen]
    return []


def _common_folder(paths: list[str]) -> str:
    return os.path.commonpath([os.path.dirname(path) for path in paths])


def _shards_of(path: str, base: str, rows_per_unit: int) -> list[Shard]:
    name = os.path.relpath(path, base).replace(os.sep, "/")
    if writable(name) != name:
        raise DataError(f"--input {writable(path)} has a name that is not UTF-8; rename it")
    if _is_dataset(path):
        from megacm3.data import tables

        total = tables.dataset_rows(path)
        starts = range(0, total, rows_per_unit)
        return [
            Shard(
                f"{name}[{start}:{min(start + rows_per_unit, total)}]",
                path,
                "dataset",
                (start, min(start + rows_per_unit, total)),
            )
            for start in starts
        ]
    kind = _kind(path)
    if kind is None or os.path.isdir(path):
        raise DataError(f"--input {path} is of no known kind; expected {', '.join(_KINDS)} or a data set folder")
    return [Shard(name, path, kind)]


def identify(shards: list[Shard]) -> str:
    """sha256 over the shards' names, sizes and both ends: another file under the same name gives another value.

    Enough to see a change without reading hundreds of terabytes twice; the folder's place does not count.
    """
    return sha256_json(identities(shards))


def identities(shards: list[Shard]) -> list[list[str]]:
    """[name, sha256 of size and both ends] of each shard."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(_identity, shards))
    return [[shard.name, identity] for shard, identity in zip(shards, found, strict=True)]


def _identity(shard: Shard) -> str:
    if shard.files:
        return sha256_json([_identity(Shard(shard.name, path, shard.kind)) for path in shard.files])
    path = Path(shard.path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return sha256_json([[p.relative_to(path).as_posix(), p.stat().st_size] for p in files])
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        digest.update(file.read(_EDGE))
        file.seek(max(0, size - _EDGE))
        digest.update(file.read(_EDGE))
    return digest.hexdigest()


def iter_texts(
    shards: Iterable[Shard],
    on_reject: Callable[[Rejected], None] | None = None,
    text_filters: tuple[str, ...] = (),
) -> Iterator[str]:
    """The texts of all shards, cleaned, without reading pictures."""
    options = ReadOptions(pictures=False, text_filters=text_filters)
    for shard in shards:
        for item in read_shard(shard, options):
            if isinstance(item, Sample):
                yield from (part for part in item.parts if isinstance(part, str))
            elif on_reject:
                on_reject(item)


def caption_of(record: dict[str, Any]) -> str | None:
    """The first caption field of a record, or None."""
    return next((record[name] for name in CAPTION_FIELDS if isinstance(record.get(name), str)), None)


def parse_json(raw: bytes | str) -> dict[str, Any]:
    """A JSON object. Raises Reject: invalid_json."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as fault:
        # Beside what is no JSON: numbers of thousands of digits, brackets nested too deep.
        raise Reject("invalid_json", str(fault)) from fault
    if not isinstance(value, dict):
        raise Reject("invalid_json", f"a {type(value).__name__} instead of an object")
    return value


def inside(folder: str | Path, name: str) -> Path:
    """`folder`/`name`, which must lie below the folder. Raises Reject: outside_folder, no_path."""
    try:
        path = Path(folder, name)
        below = path.resolve().is_relative_to(Path(folder).resolve())
    except (ValueError, RuntimeError) as fault:
        # A NUL or a lone surrogate in it, or a link to itself.
        raise Reject("no_path", f"{name!r}: {fault}") from fault
    if not below:
        raise Reject("outside_folder", name)
    return path


def writable(text: str) -> str:
    """`text` with lone surrogates spelt out: names of files need not be Unicode, a store's columns must be."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
