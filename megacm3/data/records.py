"""Readers of formats that need packages of their own: TFRecord (`tfrecord`), Common Crawl's WARC and WET (datatrove).

Both packages pass over damage in silence (checksums that nobody compares, archives that end early), so the framing is
checked before anything is read.
"""

import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megacm3.data.images import Reject
from megacm3.data.sources import ReadOptions, Rejected, Sample, Shard, clean_text
from megacm3.data.tables import sample_of
from megacm3.errors import ConfigError, DataError

TFRECORD_FIELDS = {"image/encoded": "image", "image/caption": "caption", "image/key": "key", "caption": "caption"}
"""Names of tf.train.Example's features -> names that every table has; other names stay."""
_CRC_SHIFT = 0xA282EAD8
"""TFRecord masks its CRC-32C: rotated right by 15 bits, plus this constant (tensorflow/core/lib/hash/crc32c.h)."""


def read_tfrecord(shard: Shard, options: ReadOptions) -> Iterator[Sample | Rejected]:
    """The tf.train.Examples of one file. Raises DataError for a truncated file or a wrong checksum."""
    try:
        from google.protobuf.message import DecodeError
        from tfrecord import example_pb2, iterator_utils  # noqa: F401 - a broken installation shows here
        from tfrecord.reader import tfrecord_iterator
    except ImportError as fault:
        raise ConfigError(f"{shard.path}: TFRecord needs the package tfrecord (megacm3's extra tfrecord)") from fault
    packed = shard.path.endswith(".gz")
    _check_tfrecord(shard.path, packed)
    for row, data in enumerate(tfrecord_iterator(shard.path, compression_type="gzip" if packed else None)):
        example = example_pb2.Example()
        try:
            example.ParseFromString(bytes(data))
        except DecodeError as fault:
            yield Rejected(str(row), shard.name, row, "invalid_example", str(fault))
            continue
        yield sample_of(_record(example), shard, row, options)


def _record(example: Any) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name, feature in example.features.feature.items():
        values = getattr(feature, feature.WhichOneof("kind") or "bytes_list").value
        value = values[0] if len(values) == 1 else list(values)
        name = TFRECORD_FIELDS.get(name, name)
        if name != "image" and isinstance(value, bytes) and name not in ("text", "caption"):
            value = value.decode("utf-8", "replace")
        record["text" if name == "caption" else name] = value
    return record


def _check_tfrecord(path: str, packed: bool) -> None:
    from crc32c import crc32c

    def masked(data: bytes) -> int:
        crc = crc32c(data)
        return ((crc >> 15 | crc << 17) + _CRC_SHIFT) & 0xFFFFFFFF

    def part(file: IO[bytes], size: int, row: int) -> bytes:
        data, found = file.read(size), file.read(4)
        if len(data) != size or len(found) != 4:
            raise DataError(f"{path} is damaged: it ends inside record {row}")
        if struct.unpack("<I", found)[0] != masked(data):
            raise DataError(f"{path} is damaged: the checksum of record {row} is wrong")
        return data

    opened: IO[bytes] = gzip.open(path, "rb") if packed else open(path, "rb")  # type: ignore[assignment]
    row = 0
    try:
        with opened as file:
            while start := file.read(1):
                head = start + file.read(7)
                if len(head) != 8 or file.read(4) != struct.pack("<I", masked(head)):
                    raise DataError(f"{path} is damaged: the length of record {row} is cut off or wrong")
                part(file, struct.unpack("<Q", head)[0], row)
                row += 1
    except (EOFError, gzip.BadGzipFile, zlib.error) as fault:
        raise DataError(f"{path} is damaged: {fault}") from fault


def read_warc(shard: Shard, options: ReadOptions) -> Iterator[Sample | Rejected]:
    """The texts of a Common Crawl file: WET's as they are, WARC's pages through trafilatura.

    Records that are no text (requests, pictures) are passed over. Raises DataError when the file is cut off.
    """
    extract = _extractor(shard)
    _check_gzip(shard.path)
    for row, document in enumerate(_documents(shard)):
        key = str(document.id)
        try:
            text = clean_text((extract(document.text) or "") if extract else document.text)
        except Reject as reject:
            # A page without text is the rule on the web, no sign of damage: counted apart from faults.
            yield Rejected(key, shard.name, row, f"filter:{reject.reason}", reject.detail)
            continue
        meta = {name: str(document.metadata[name]) for name in ("url", "date") if document.metadata.get(name)}
        yield Sample(key, shard.name, row, (text,), meta)


def _documents(shard: Shard) -> Iterator[Any]:
    path = Path(shard.path)
    try:
        from datatrove.pipeline.readers import WarcReader

        reader = WarcReader(str(path.parent), compression="infer")
    except ImportError as fault:
        raise ConfigError(f"{path}: WARC needs megacm3's extra crawl and the library libmagic: {fault}") from fault
    try:
        yield from reader.read_file(path.name)
    except ImportError as fault:
        raise ConfigError(f"{path}: WARC needs megacm3's extra crawl and the library libmagic: {fault}") from fault
    except Exception as fault:
        # warcio raises its own classes, all of them derived from Exception alone.
        if type(fault).__module__.startswith("warcio"):
            raise DataError(f"{path} is damaged: {fault}") from fault
        raise


def _extractor(shard: Shard) -> Any:
    if ".wet" in Path(shard.path).name.lower():
        return None
    try:
        from datatrove.pipeline.extractors import Trafilatura

        # Without deduplication, which would make a text depend on what the same process read before.
        return Trafilatura(deduplicate=False).extract
    except ImportError as fault:
        raise ConfigError(f"{shard.path}: WARC needs trafilatura (megacm3's extra crawl)") from fault


def _check_gzip(path: str) -> None:
    if not path.endswith(".gz"):
        return
    try:
        with gzip.open(path, "rb") as file:
            while file.read(1 << 22):
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error) as fault:
        raise DataError(f"{path} is damaged: {fault}") from fault
