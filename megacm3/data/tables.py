"""Readers of tables: parquet, JSON lines (text, pairs, interleaved), plain lines, and data sets of `datasets`.

A pair's picture is bytes, a struct of bytes and path, or a path below the table's folder. Interleaved documents are
OBELICS-like (`texts` and `images`, two lists of one length with null in either) or a `text` with `<image>` where each
of `images` belongs.
"""

import base64
import binascii
import errno
import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias

from megacm3.data.images import Reject
from megacm3.data.sources import (
    IMAGE_FIELDS,
    ReadOptions,
    Rejected,
    Sample,
    Shard,
    caption_of,
    clean_text,
    inside,
    parse_json,
)
from megacm3.errors import DataError

KEY_FIELDS = ("key", "__key__", "id", "uid")
_BATCH = 256
"""Rows of a parquet file read at once."""
_NO_FILE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
"""What opening a picture gives when its row is wrong; other faults are the disk's."""


Row: TypeAlias = tuple[int, dict[str, Any] | Reject]
"""Position and record of a row, or why it cannot be read."""


def read_parquet(shard: Shard, options: ReadOptions) -> Iterator[Sample | Rejected]:
    """The rows of one parquet file. Raises DataError when it is no parquet file or has no column of text."""
    return _samples(parquet_rows(shard, lambda columns: _columns(shard.path, columns, options)), shard, options)


def _columns(path: str, columns: list[str], options: ReadOptions) -> list[str]:
    _check_columns(path, columns)
    return columns if options.pictures else [name for name in columns if name not in IMAGE_FIELDS]


def parquet_rows(shard: Shard, choose: Callable[[list[str]], list[str]] = list) -> Iterator[Row]:
    """The records of one parquet file; `choose` gives the columns to read. Raises DataError when it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(shard.path)
    except (pa.ArrowException, UnicodeDecodeError) as fault:
        raise DataError(f"{shard.path} is not a whole parquet file: {str(fault).splitlines()[0]}") from fault
    row = 0
    try:
        for batch in file.iter_batches(batch_size=_BATCH, columns=choose(file.schema_arrow.names)):
            for record in _records(batch):
                yield row, record
                row += 1
    except (pa.ArrowException, UnicodeDecodeError, OSError) as fault:
        raise DataError(f"{shard.path} is damaged at row {row}: {str(fault).splitlines()[0]}") from fault


def _records(batch: Any) -> list[dict[str, Any] | Reject]:
    # Text that is no UTF-8 and dates that Python has not are found out when a row becomes objects.
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, LookupError):
        return [_record(batch.slice(row, 1)) for row in range(batch.num_rows)]


def _record(one: Any) -> dict[str, Any] | Reject:
    try:
        return one.to_pylist()[0]
    except UnicodeDecodeError as fault:
        return Reject("invalid_utf8", str(fault))
    except (ValueError, OverflowError, LookupError) as fault:
        return Reject("unreadable_row", f"{type(fault).__name__}: {fault}")


def read_jsonl(shard: Shard, options: ReadOptions) -> Iterator[Sample | Rejected]:
    """One JSON object a line; empty lines are skipped. Pictures' paths are relative to the file's folder."""
    return _samples(jsonl_rows(shard), shard, options)


def jsonl_rows(shard: Shard) -> Iterator[Row]:
    """The objects of one file of JSON lines."""
    for row, line in _lines(shard.path):
        try:
            yield row, parse_json(line)
        except Reject as reject:
            yield row, reject


def _samples(rows: Iterator[Row], shard: Shard, options: ReadOptions) -> Iterator[Sample | Rejected]:
    for row, record in rows:
        if isinstance(record, Reject):
            yield Rejected(str(row), shard.name, row, record.reason, record.detail)
        else:
            yield sample_of(record, shard, row, options)


def read_lines(shard: Shard, options: ReadOptions) -> Iterator[Sample | Rejected]:
    """One text a line; empty lines are skipped."""
    for row, line in _lines(shard.path):
        yield sample_of({"text": line}, shard, row, options)


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    opened: IO[bytes] = gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")  # type: ignore[assignment]
    try:
        with opened as file:
            for row, line in enumerate(file):
                if line.strip():
                    yield row, line.rstrip(b"\r\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as fault:
        raise DataError(f"{path} is damaged: {fault}") from fault


def _open_dataset(path: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    folder = Path(path)
    try:
        if (folder / "metadata.csv").is_file() or (folder / "metadata.parquet").is_file():
            data = datasets.load_dataset("imagefolder", data_dir=path, split="train")
        else:
            data = datasets.load_from_disk(path)
    except (FileNotFoundError, ValueError, datasets.exceptions.DatasetsError) as fault:
        raise DataError(f"{path} cannot be read by datasets: {str(fault).splitlines()[0]}") from fault
    if isinstance(data, datasets.DatasetDict):
        raise DataError(
            f"{path} holds the splits {', '.join(data)}; give one of them, such as {path}/{next(iter(data))}"
        )
    encoded = datasets.Features({name: _encoded(feature) for name, feature in data.features.items()})
    return data if encoded == data.features else data.cast(encoded)


def _encoded(feature: Any) -> Any:
    """A feature of `datasets` whose pictures stay encoded, also those in lists."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(_encoded(feature.feature), length=feature.length)
    if isinstance(feature, dict):
        return {name: _encoded(inner) for name, inner in feature.items()}
    return feature


def dataset_rows(path: str) -> int:
    """Number of rows of a data set saved by `datasets` or of an imagefolder. Raises DataError."""
    return len(_open_dataset(path))


def read_dataset(shard: Shard, options: ReadOptions) -> Iterator[Sample | Rejected]:
    """Rows `shard.rows` of a data set; its pictures stay encoded. Raises DataError when it has no column of text."""
    data = _open_dataset(shard.path)
    _check_columns(shard.path, data.column_names)
    if not options.pictures:
        data = data.remove_columns([name for name in data.column_names if name in IMAGE_FIELDS])
    return _samples(_rows_of(data, shard), shard, options)


def set_rows(shard: Shard) -> Iterator[Row]:
    """The records of rows `shard.rows` of a data set; its pictures stay encoded."""
    return _rows_of(_open_dataset(shard.path), shard)


def _rows_of(data: Any, shard: Shard) -> Iterator[Row]:
    assert shard.rows is not None
    return ((row, data[row]) for row in range(*shard.rows))


def _check_columns(path: str, columns: list[str]) -> None:
    if "texts" in columns or caption_of(dict.fromkeys(columns, "")) is not None:
        return
    raise DataError(f"{path} has the columns {', '.join(columns)}; expected one of caption, text, texts")


def sample_of(record: dict[str, Any], shard: Shard, row: int, options: ReadOptions) -> Sample | Rejected:
    """What a table's record gives."""
    key = str(next((record[name] for name in KEY_FIELDS if record.get(name) is not None), row))
    try:
        parts = _parts(record, Path(shard.path), options)
    except Reject as reject:
        return Rejected(key, shard.name, row, reject.reason, reject.detail)
    return Sample(key, shard.name, row, parts, _meta(record))


def _meta(record: dict[str, Any]) -> dict[str, Any]:
    plain = (str, int, float, bool)
    return {name: value for name, value in record.items() if isinstance(value, plain) and name not in IMAGE_FIELDS}


def _parts(record: dict[str, Any], table: Path, options: ReadOptions) -> tuple[str | bytes, ...]:
    if isinstance(record.get("texts"), list):
        return _interleaved_lists(record, table, options)
    text = record.get("text")
    if not isinstance(text, bytes):
        text = caption_of(record)
    if text is None:
        raise Reject("no_caption", f"its fields are {', '.join(record)}")
    if isinstance(record.get("images"), list) and isinstance(text, str):
        return _interleaved_text(text, record["images"], table, options)
    caption = clean_text(text)
    name = next((name for name in IMAGE_FIELDS if name in record), None)
    if name is None or not options.pictures:
        return (caption,)
    return (caption, picture_bytes(record[name], table))


def _interleaved_lists(record: dict[str, Any], table: Path, options: ReadOptions) -> tuple[str | bytes, ...]:
    texts, images = record["texts"], record.get("images") or [None] * len(record["texts"])
    if len(texts) != len(images):
        raise Reject("unequal_lists", f"{len(texts)} texts and {len(images)} images")
    parts: list[str | bytes] = []
    for text, image in zip(texts, images, strict=True):
        if (text is None) == (image is None):
            raise Reject("unequal_lists", "each place holds either a text or an image")
        if text is not None:
            parts.append(clean_text(text))
        elif options.pictures:
            parts.append(picture_bytes(image, table))
    return _not_empty(parts)


def _interleaved_text(text: str, images: list[Any], table: Path, options: ReadOptions) -> tuple[str | bytes, ...]:
    pieces = text.split("<image>")
    if len(pieces) != len(images) + 1:
        raise Reject("unequal_lists", f"{len(pieces) - 1} times <image> in the text and {len(images)} images")
    parts: list[str | bytes] = []
    for position, piece in enumerate(pieces):
        if piece.strip():
            parts.append(clean_text(piece))
        if position < len(images) and options.pictures:
            parts.append(picture_bytes(images[position], table))
    return _not_empty(parts)


def _not_empty(parts: list[str | bytes]) -> tuple[str | bytes, ...]:
    if not parts:
        raise Reject("empty_text", "neither text nor image")
    return tuple(parts)


def picture_bytes(value: Any, table: Path) -> bytes:
    """The bytes of a picture: themselves, a struct of bytes and path, a data URL, or a path in the table's folder.

    Raises Reject: no_image, corrupt_image, outside_folder, no_path.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise Reject("no_image", f"a {type(value).__name__} instead of bytes or a path")
    if value.startswith("data:"):
        try:
            return base64.b64decode(value.partition(",")[2], validate=True)
        except (binascii.Error, ValueError) as fault:
            raise Reject("corrupt_image", f"data URL: {fault}") from fault
    folder = table if table.is_dir() else table.parent
    path = inside(folder, value)
    try:
        return path.read_bytes()
    except OSError as fault:
        if fault.errno not in _NO_FILE:
            raise
        raise Reject("no_image", f"{value} does not exist beside {table.name}") from fault
