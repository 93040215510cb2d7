"""safetensors files, written header first and read slice by slice, so that memory does not grow with the file."""

import json
import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megacm3.checkpoint.blocks import BlockFile
from megacm3.errors import CheckpointError, Megacm3Error

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""torch dtype -> its name in a safetensors header."""

DTYPES = {code: dtype for dtype, code in CODES.items()}

MAX_HEADER = 100_000_000
"""Bytes of the longest header that safetensors reads."""

OPEN_FILES = 64
"""Files that `OpenFiles` keeps mapped."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file to be written."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return self.dtype.itemsize * math.prod(self.shape)


def in_file_order(entries: Iterable[Entry]) -> list[Entry]:
    """Widest dtype first, so that every tensor begins at a multiple of its item size; otherwise as given."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def header_bytes(entries: Sequence[Entry], metadata: dict[str, str]) -> bytes:
    """Length and JSON header of a file that holds `entries` in this order, padded to 8 bytes."""
    tree: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for entry in entries:
        assert entry.key not in tree, f"{entry.key} twice in one file"
        offsets = [at, at + entry.bytes]
        tree[entry.key] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        at += entry.bytes
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def file_bytes(entries: Sequence[Entry], metadata: dict[str, str]) -> int:
    """Size of the file that `write_tensors` makes."""
    return len(header_bytes(entries, metadata)) + sum(entry.bytes for entry in entries)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, one-dimensional uint8, without a copy where it is contiguous and on the CPU."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)


def write_tensors(
    path: Path,
    entries: Sequence[Entry],
    metadata: dict[str, str],
    values: Callable[[Entry], Iterator[torch.Tensor]],
    done: Callable[[int], None] = lambda count: None,
    *,
    hashed: bool = True,
) -> dict[str, Any]:
    """Write and fsync a safetensors file; return its manifest entry {"bytes", "sha256"}.

    entries: in file order. values: a tensor's data, row-major, in as many pieces as it likes. done: told the bytes of
    each piece. Hashing and writing run beside; without `hashed` "sha256" is empty.
    """
    with BlockFile(path, hashed=hashed) as file:
        file.add(torch.frombuffer(bytearray(header_bytes(entries, metadata)), dtype=torch.uint8))
        for entry in entries:
            count = 0
            for tensor in values(entry):
                assert tensor.dtype == entry.dtype, f"{entry.key}: {tensor.dtype} written as {entry.dtype}"
                data = raw(tensor)
                file.add(data)
                count += len(data)
                done(len(data))
            assert count == entry.bytes, f"{entry.key}: {count} bytes written of {entry.bytes}"
        digest = file.finish()
    return {"bytes": file.size, "sha256": digest}


def read_header(path: Path, error: type[Megacm3Error] = CheckpointError) -> dict[str, dict[str, Any]]:
    """Key -> {"dtype", "shape", "data_offsets"} of a safetensors file, checked against the file's size.

    Raises `error` with the path, and the tensor's name where one is at fault: data cut off, offsets that overlap, leave
    gaps or do not fit dtype and shape.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else MAX_HEADER + 1
            text = file.read(length) if length <= min(MAX_HEADER, size - 8) else b""
    except FileNotFoundError as fault:
        raise error(f"{path} is missing") from fault
    try:
        tree = json.loads(text)
        tree.pop("__metadata__", None)
        fields = {key: (item["dtype"], [*item["shape"]], [*item["data_offsets"]]) for key, item in tree.items()}
    except (ValueError, AttributeError, KeyError, TypeError) as fault:
        raise error(f"{path} is not a whole safetensors file: its header cannot be read ({size} bytes)") from fault
    at, data = 0, size - 8 - length
    for key, (dtype, shape, offsets) in sorted(fields.items(), key=lambda item: item[1][2]):
        if dtype not in DTYPES:
            raise error(f"{path}: tensor {key} has dtype {dtype}; expected one of {', '.join(DTYPES)}")
        wanted = Entry(key, DTYPES[dtype], tuple(shape)).bytes
        if len(offsets) != 2 or offsets[1] - offsets[0] != wanted:
            raise error(f"{path}: tensor {key} lies at bytes {offsets}, but {dtype} {shape} takes {wanted} bytes")
        if offsets[0] != at:
            what = "overlaps the tensor before it" if offsets[0] < at else "leaves a gap before it"
            raise error(f"{path}: tensor {key} begins at byte {offsets[0]}; expected {at} (it {what})")
        at = offsets[1]
        if at > data:
            raise error(f"{path} is cut off: tensor {key} ends at byte {at} of the data; the file has {data}")
    if at != data:
        raise error(f"{path} has {data - at} bytes after its last tensor; expected none")
    return tree


class OpenFiles:
    """Slices of the tensors in a folder's safetensors files, memory-mapped, the last `OPEN_FILES` kept open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: OrderedDict[str, Any] = OrderedDict()

    def slice(self, file: str, key: str, place: tuple[slice, ...]) -> torch.Tensor:
        """Part of a tensor, a view of the mapped file. Raises CheckpointError with file and key."""
        try:
            if file not in self._open:
                if len(self._open) == OPEN_FILES:
                    self._open.popitem(last=False)
                self._open[file] = safe_open(str(self.folder / file), framework="pt")
            self._open.move_to_end(file)
            return self._open[file].get_slice(key)[place]
        except (SafetensorError, OSError) as fault:
            raise CheckpointError(f"{self.folder / file}: {key} cannot be read: {fault}") from fault
