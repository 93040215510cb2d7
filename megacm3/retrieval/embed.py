"""The first stage of a bank: vectors and metadata of each part of the store, read from the original input."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megacm3.data.images import ImageLimits, Picture, Reject, open_image
from megacm3.data.sources import ReadOptions, Sample, Shard, find_shards, read_shard
from megacm3.data.store import Store
from megacm3.errors import DataError
from megacm3.files import new_file
from megacm3.retrieval.bank import META_FIELDS, part_file
from megacm3.retrieval.encoder import Encoder, normalise
from megacm3.retrieval.precomputed import Precomputed

_ANY_SIZE = ImageLimits(max_pixels=1 << 40, min_side=1, max_aspect=float("inf"))
"""The store has refused what it did not want; what it holds is taken as it is."""
_ALL_ROWS = 1 << 62
"""More rows than a data set has."""


@dataclass(frozen=True)
class EmbedParts:
    """Units: part N of the store becomes part N of the bank."""

    store: str
    encoder: str
    """CLIP folder, or empty for precomputed vectors."""
    precomputed: str
    inputs: tuple[str, ...]
    """Paths and globs of what the store was made from; unused for precomputed vectors."""
    count: int
    batch: int = 64
    device: str = "cpu"
    stage: str = "embed"

    def make(self, folder: Path, number: int) -> list[Path]:
        """Write meta, image and text vectors of one part; nothing for a part without captioned pictures."""
        store = Store.open(self.store, verify="none")
        rows = wanted_rows(store, number)
        if not rows:
            return []
        if self.precomputed:
            image, text = Precomputed.open(self.precomputed).vectors(rows)
        else:
            image, text = self._encode(store, rows)
        try:
            image, text = normalise(image), normalise(text)
        except DataError as fault:
            raise DataError(f"vectors of part {number} of {self.store}: {fault}") from fault
        scores = np.einsum("nd,nd->n", image, text)
        paths = [part_file(folder, what, number) for what in ("image", "text", "meta")]
        for path, vectors in zip(paths, (image, text), strict=False):
            with new_file(path) as temporary, open(temporary, "wb") as file:
                np.save(file, vectors.astype(np.float16))
        _write_meta(paths[2], [row | {"score": float(score)} for row, score in zip(rows, scores, strict=True)])
        return paths

    def _encode(self, store: Store, rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        encoder = Encoder.load(self.encoder, self.device)
        image = np.zeros((len(rows), encoder.dim), np.float32)
        text = np.zeros((len(rows), encoder.dim), np.float32)
        partial = bool(store.settings.get("pretokenize", {}).get("allow_partial"))
        documents = read_documents(self.inputs, rows, partial)
        for batch in _batched(documents, self.batch):
            places = [place for place, _ in batch]
            image[places] = encoder.encode_images([picture for _, picture in batch], self.batch)
            text[places] = encoder.encode_texts([rows[place]["caption"] for place in places], self.batch)
        return image, text


def wanted_rows(store: Store, part: int) -> list[dict[str, Any]]:
    """Metadata of the documents of a part that have a picture and a caption, with their doc_id."""
    import pyarrow.parquet as pq

    starts = np.concatenate([[0], np.cumsum([entry["documents"] for entry in store.settings["parts"]])])
    table = pq.read_table(store.folder / "meta" / f"part-{part:05d}.parquet").to_pylist()
    if len(table) != store.settings["parts"][part]["documents"]:
        raise DataError(f"{store.folder}/meta/part-{part:05d}.parquet has {len(table)} rows; the manifest differs")
    documents = [row | {"doc_id": int(starts[part]) + n} for n, row in enumerate(table)]
    return [row for row in documents if row["images"] and row["caption"]]


def read_documents(
    inputs: tuple[str, ...], rows: list[dict[str, Any]], allow_partial: bool = False
) -> Iterator[tuple[int, Picture]]:
    """(index into `rows`, first picture) of each of the given documents, from the original input.

    rows: dicts with shard, key, row, caption, image_sha256, as stores and banks have them. allow_partial: as when the
    store was made. Raises DataError when the input is not what they were made from: a shard or a document is missing, a
    picture or a caption is another one.
    """
    places = {(row["shard"], row["key"], row["row"]): n for n, row in enumerate(rows)}
    needed = list(dict.fromkeys(row["shard"] for row in rows))
    found = 0
    for shard in _shards(inputs, needed):
        for item in read_shard(shard, ReadOptions(allow_partial=allow_partial)):
            place = places.get((item.shard, item.key, item.row))
            if place is None or not isinstance(item, Sample):
                continue
            yield place, _picture(item, rows[place])
            found += 1
    if found < len(rows):
        raise DataError(
            f"--input has {found} of the {len(rows)} documents that were looked for in {len(needed)} shards; "
            "give what the store was made from"
        )


def _shards(inputs: tuple[str, ...], needed: list[str]) -> list[Shard]:
    # A data set's shards are named by their rows: each is cut out of the whole set.
    shards = {shard.name: shard for shard in find_shards(inputs, _ALL_ROWS)}
    whole = {shard.name.rpartition("[")[0]: (shard, shard.rows[1]) for shard in shards.values() if shard.rows}
    for name in needed:
        base, _, span = name.rpartition("[")
        rows = re.fullmatch(r"(\d+):(\d+)\]", span)
        if rows and base in whole and int(rows[2]) <= whole[base][1]:
            shards[name] = replace(whole[base][0], name=name, rows=(int(rows[1]), int(rows[2])))
    lacking = [name for name in needed if name not in shards]
    if lacking:
        raise DataError(
            f"--input has no shard {lacking[0]}, which the store was made from; it has {', '.join(list(shards)[:3])}"
            f"{' ...' if len(shards) > 3 else ''}: give the same --input as to tools/pretokenize.py"
        )
    return [shards[name] for name in needed]


def _picture(sample: Sample, row: dict[str, Any]) -> Picture:
    data = next(part for part in sample.parts if isinstance(part, bytes))
    if hashlib.sha256(data).hexdigest() != row["image_sha256"]:
        raise DataError(f"the picture of {sample.shard}, key {sample.key}, is not the one that the store was made from")
    if sample.caption != row["caption"]:
        raise DataError(f"the caption of {sample.shard}, key {sample.key}, is not the one that the store was made from")
    try:
        return open_image(data, _ANY_SIZE)
    except Reject as fault:
        raise DataError(f"the picture of {sample.shard}, key {sample.key}, cannot be read: {fault}") from fault


def _batched(items: Iterator[tuple[int, Picture]], size: int) -> Iterator[list[tuple[int, Picture]]]:
    batch: list[tuple[int, Picture]] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _write_meta(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in META_FIELDS.items()])
    columns = {name: [row[name] for row in rows] for name in META_FIELDS}
    with new_file(path) as temporary:
        pq.write_table(pa.Table.from_pydict(columns, schema=schema), temporary, compression="zstd")
