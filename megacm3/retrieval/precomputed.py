"""Vectors that were made elsewhere, in the folders that clip-retrieval writes, joined to a store by key.

    DIR/img_emb/*.npy    DIR/text_emb/*.npy    [n, d] each
    DIR/metadata/*.parquet                     columns key, and where there are: shard, caption

Files are taken in the order of the numbers in their names; the three lists must have the same lengths. Rows are joined
by `key` (and `shard` where the metadata has it), and a caption that differs from the store's is an error: joining such
folders by order has given people the wrong rows.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megacm3.errors import DataError
from megacm3.files import sha256_file, sha256_json

PREFIX = "precomputed:"
_FOLDERS = ("img_emb", "text_emb", "metadata")


def _number(path: Path) -> tuple[int, str]:
    numbers = re.findall(r"\d+", path.stem)
    return (int(numbers[-1]) if numbers else -1, path.name)


def _files(folder: Path) -> list[tuple[Path, Path, Path]]:
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist (expected --encoder precomputed:DIR)")
    lists = []
    for name in _FOLDERS:
        suffix = "*.parquet" if name == "metadata" else "*.npy"
        lists.append(sorted((folder / name).glob(suffix), key=_number))
    counts = [len(found) for found in lists]
    if len(set(counts)) != 1 or not counts[0]:
        listed = ", ".join(f"{n} in {name}" for n, name in zip(counts, _FOLDERS, strict=True))
        raise DataError(f"{folder} holds {listed}; expected the same number of files in each, at least one")
    return list(zip(*lists, strict=True))


@dataclass(frozen=True)
class Precomputed:
    """An opened folder of vectors."""

    folder: Path
    dim: int

    @staticmethod
    def open(folder: str | Path) -> "Precomputed":
        """Check counts and widths. Raises DataError when they differ."""
        folder = Path(folder)
        dims = set()
        for image, text, meta in _files(folder):
            import pyarrow.parquet as pq

            rows = pq.read_metadata(meta).num_rows
            for path in (image, text):
                array = _load(path)
                if array.ndim != 2 or len(array) != rows:
                    raise DataError(f"{path} has shape {array.shape}; {meta} has {rows} rows")
                dims.add(array.shape[1])
        if len(dims) != 1:
            raise DataError(f"{folder} holds vectors of widths {sorted(dims)}; expected one width")
        return Precomputed(folder, dims.pop())

    @cached_property
    def fingerprint(self) -> str:
        """Of all its files, which are read for it."""
        paths = [path for files in _files(self.folder) for path in files]
        return sha256_json({path.relative_to(self.folder).as_posix(): sha256_file(path) for path in paths})

    def vectors(self, wanted: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """Image and text vectors, float32 [len(wanted), d], of documents given by `key`, `shard` and `caption`.

        Raises DataError for a document without vectors, a key of two rows, a caption that is not the document's.
        """
        image = np.zeros((len(wanted), self.dim), np.float32)
        text = np.zeros((len(wanted), self.dim), np.float32)
        places = _Places(wanted)
        for image_file, text_file, meta in _files(self.folder):
            source, target = places.match(meta)
            if target:
                image[target] = _load(image_file)[source]
                text[target] = _load(text_file)[source]
        if not places.found.all():
            first = wanted[int((~places.found).argmax())]["key"]
            lacking = int((~places.found).sum())
            raise DataError(f"{self.folder} has no vectors for {lacking} documents of the store (first key: {first})")
        return image, text


class _Places:
    """Where the rows of a metadata file go."""

    def __init__(self, wanted: Sequence[dict[str, Any]]) -> None:
        self.found = np.zeros(len(wanted), bool)
        self._wanted = wanted
        self._by_key: dict[str, list[int]] = {}
        for n, row in enumerate(wanted):
            self._by_key.setdefault(row["key"], []).append(n)

    def match(self, meta: Path) -> tuple[list[int], list[int]]:
        """Rows of the file, and the wanted documents that they belong to."""
        import pyarrow.parquet as pq

        names = pq.read_schema(meta).names
        if "key" not in names:
            raise DataError(f"{meta} has no column key; it has {', '.join(names)}")
        rows = pq.read_table(meta, columns=[name for name in ("key", "shard", "caption") if name in names]).to_pylist()
        source, target = [], []
        for number, row in enumerate(rows):
            near = self._by_key.get(row["key"], [])
            if "shard" in row:
                near = [n for n in near if self._wanted[n]["shard"] == row["shard"]]
            if len(near) > 1 or any(self.found[n] for n in near):
                raise DataError(f"{meta}: key {row['key']} names more than one row or document; give a column shard")
            for n in near:
                _check_caption(meta, row["key"], row.get("caption"), self._wanted[n]["caption"])
                self.found[n] = True
                source.append(number)
                target.append(n)
        return source, target


def _check_caption(meta: Path, key: str, found: str | None, expected: str) -> None:
    if found is not None and " ".join(found.split()) != " ".join(expected.split()):
        raise DataError(f"{meta}: key {key} has the caption {found[:60]!r}; the store has {expected[:60]!r}")


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as fault:
        raise DataError(f"{path} is damaged: {fault}") from fault
