"""The safetensors of an export: planned from shapes alone, then streamed tensor by tensor."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megacm3.checkpoint.boxes import whole
from megacm3.checkpoint.reshard import row_chunks
from megacm3.checkpoint.tensors import DTYPES, Entry, OpenFiles, in_file_order, read_header, write_tensors
from megacm3.convert.folder import INDEX, SINGLE
from megacm3.convert.names import OPT_OFFSET, Name, head_rows
from megacm3.files import write_json

if TYPE_CHECKING:
    from megacm3.convert.to_hf import Export

EXTRAS = "extras.safetensors"
"""File of an imported checkpoint with what only the Hugging Face class has, under its own names."""


class _Values:
    """Every tensor of an export: its entry, and its data in pieces."""

    def __init__(self, export: "Export") -> None:
        self._export = export
        self._names = {name.hf: name for name in export.table}
        self._kept: dict[str, Entry] = {}
        if EXTRAS in export.checkpoint.manifest.files:
            header = read_header(export.checkpoint.folder / EXTRAS)
            self._kept = {key: Entry(key, DTYPES[e["dtype"]], tuple(e["shape"])) for key, e in header.items()}
        self._files = OpenFiles(export.checkpoint.folder)

    def entries(self) -> list[Entry]:
        """In the order in which the model uses them; what only the class has comes last."""
        entries = [Entry(name.hf, self._export.dtype, name.hf_shape) for name in self._export.table]
        entries += [entry for key, entry in self._kept.items() if key not in self._names]
        if self._export.vq is not None:
            entries += [Entry(key, tensor.dtype, tensor.shape) for key, tensor in self._export.vq.tensors.items()]
        return entries

    def __call__(self, entry: Entry) -> Iterator[torch.Tensor]:
        name = self._names.get(entry.key)
        if name is None and self._export.vq is not None:
            yield self._export.vq.read(entry.key)
        elif name is None:
            yield self._kept_rows(entry.key, entry.shape)
        elif name.form == "positions":
            kept = self._kept.get(entry.key)
            shape = (OPT_OFFSET, entry.shape[1])
            yield (
                torch.zeros(shape, dtype=entry.dtype)
                if kept is None
                else self._kept_rows(entry.key, shape).to(entry.dtype)
            )
            yield from self._read(name)
        elif name.form == "heads":
            (rows,) = self._read(name)
            yield rows[head_rows(name.shape[0], name.heads)]
        else:
            yield from self._read(name)

    def _kept_rows(self, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._files.slice(EXTRAS, key, whole(shape).within(whole(shape)))

    def _read(self, name: Name) -> Iterator[torch.Tensor]:
        for chunk in row_chunks(whole(name.shape), self._export.dtype):
            out = torch.empty(chunk.shape, dtype=self._export.dtype)
            self._export.checkpoint.read(self._export.source_kind, name.logical, chunk, out)
            yield out


def shards(entries: list[Entry], limit: int) -> list[list[Entry]]:
    """Entries in order, cut so that no shard is larger than `limit` bytes where more than one tensor lies in it."""
    cut: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if cut[-1] and size + entry.bytes > limit:
            cut.append([])
            size = 0
        cut[-1].append(entry)
        size += entry.bytes
    return cut


def weight_bytes(export: "Export") -> int:
    """Bytes of all tensors."""
    return sum(entry.bytes for entry in _Values(export).entries())


def write_weights(export: "Export", folder: Path, shard_bytes: int, done: Callable[[int], None]) -> None:
    """One file, or several with their index."""
    values = _Values(export)
    entries = values.entries()
    cut = shards(entries, shard_bytes)
    files = [SINGLE] if len(cut) == 1 else [f"model-{i + 1:05d}-of-{len(cut):05d}.safetensors" for i in range(len(cut))]
    for file, part in zip(files, cut, strict=True):
        write_tensors(folder / file, in_file_order(part), {"format": "pt"}, values, done, hashed=False)
    if len(cut) > 1:
        places = {entry.key: file for file, part in zip(files, cut, strict=True) for entry in part}
        size = sum(entry.bytes for entry in entries)
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})
