import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megacm3.checkpoint import blocks
from megacm3.checkpoint import tensors as module
from megacm3.checkpoint.tensors import Entry, OpenFiles, file_bytes, in_file_order, read_header, write_tensors
from megacm3.errors import CheckpointError


def write(path: Path, values: dict[str, torch.Tensor], pieces: int = 1) -> dict[str, Any]:
    entries = in_file_order(Entry(key, value.dtype, tuple(value.shape)) for key, value in values.items())
    return write_tensors(path, entries, {"format": "pt"}, lambda entry: iter(values[entry.key].chunk(pieces)))


def test_safetensors_reads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 4096)  # many writes and hashes a tensor, and blocks used again
    values = {
        "odd": torch.randn(3).bfloat16(),
        "wide": torch.randn(1700, 5),
        "double": torch.randn(2).double(),
        "ids": torch.arange(7),
        "transposed": torch.randn(4, 6).T,
    }
    path = tmp_path / "a.safetensors"
    entry = write(path, values, 3)
    found = load_file(path)
    assert all(torch.equal(found[key], value) for key, value in values.items()) and found.keys() == values.keys()
    assert entry == {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    order = in_file_order(Entry(key, value.dtype, tuple(value.shape)) for key, value in values.items())
    assert file_bytes(order, {"format": "pt"}) == entry["bytes"]
    with safe_open(str(path), "pt") as file:
        assert file.metadata() == {"format": "pt"}
    header = read_header(path)
    assert all(
        item["data_offsets"][0] % torch.zeros((), dtype=values[key].dtype).itemsize == 0 for key, item in header.items()
    )


def forge(path: Path, header: dict[str, Any], data: int) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


def tensor(low: int, high: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(high - low) // 4] if shape is None else shape, "data_offsets": [low, high]}


@pytest.mark.parametrize(
    "header, data, message",
    [
        (
            {"a": tensor(0, 8), "b": tensor(4, 12)},
            12,
            "tensor b begins at byte 4; expected 8 (it overlaps the tensor before it)",
        ),
        (
            {"a": tensor(0, 8), "b": tensor(12, 16)},
            16,
            "tensor b begins at byte 12; expected 8 (it leaves a gap before it)",
        ),
        ({"a": tensor(0, 8, [3])}, 8, "tensor a lies at bytes [0, 8], but F32 [3] takes 12 bytes"),
        ({"a": tensor(0, 8)}, 7, "is cut off: tensor a ends at byte 8 of the data; the file has 7"),
        ({"a": tensor(0, 8)}, 9, "has 1 bytes after its last tensor"),
        ({"a": tensor(0, 8, dtype="Q7")}, 8, "tensor a has dtype Q7"),
        ({"a": {"dtype": "F32"}}, 8, "its header cannot be read"),
    ],
)
def test_headers_that_lie_are_refused(header: dict[str, Any], data: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    forge(path, header, data)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 1 << 62), struct.pack("<Q", 50) + b"{}"])
def test_files_that_are_no_safetensors_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_header(path)
    with pytest.raises(CheckpointError, match="is missing"):
        read_header(tmp_path / "b.safetensors")


def test_only_some_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPEN_FILES", 2)
    for name in "abcd":
        write(tmp_path / name, {"x": torch.full((4, 4), float(ord(name)))})
    files = OpenFiles(tmp_path)
    for name in "abcdabcd":
        assert files.slice(name, "x", (slice(1, 2), slice(0, 3))).tolist() == [[float(ord(name))] * 3]
    assert len(files._open) == 2
    with pytest.raises(CheckpointError, match="x2 cannot be read"):
        files.slice("a", "x2", (slice(0, 1),))
