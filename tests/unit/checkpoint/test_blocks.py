import ctypes
import errno
import hashlib
import mmap
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from megacm3.checkpoint import blocks
from megacm3.checkpoint.blocks import BlockFile


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 1 << 13)


def written(path: Path, content: bytes, sizes: list[int], *, hashed: bool = True) -> str:
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    with BlockFile(path, hashed=hashed) as file:
        for part in data.split([*sizes, len(content) - sum(sizes)]):
            file.add(part)
        digest = file.finish()
        assert file.size == len(content)
    return digest


def refuse_at_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file system that does not know O_DIRECT."""
    really = os.open

    def fake(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really(path, flags, mode)

    monkeypatch.setattr(blocks.os, "open", fake)


def refuse_at_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file system that opens with O_DIRECT but does not write so, and then writes odd numbers of bytes."""
    really = os.write

    def fake(file: int, data: memoryview) -> int:
        if blocks.fcntl.fcntl(file, blocks.fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really(file, data[:1001])

    monkeypatch.setattr(blocks.os, "write", fake)


@pytest.mark.parametrize("how", [lambda monkeypatch: None, refuse_at_open, refuse_at_write])
@pytest.mark.parametrize("size", [2, 4096, 8192, 8193, 100_000])
def test_what_is_added_is_in_the_file(how: Any, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how(monkeypatch)
    content = random.Random(size).randbytes(size)
    digest = written(tmp_path / "a", content, [] if size < 100 else [1, 0, size // 3])
    assert (tmp_path / "a").read_bytes() == content and digest == hashlib.sha256(content).hexdigest()
    assert written(tmp_path / "a", content[:-1], [], hashed=False) == ""  # an older file leaves nothing behind
    assert (tmp_path / "a").read_bytes() == content[:-1]


def test_nothing_is_left_in_the_page_cache(tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("the file system of the temporary folder knows no O_DIRECT")
    written(tmp_path / "a", bytes(1 << 22), [])
    (tmp_path / "usual").write_bytes(bytes(1 << 22))
    assert cached_pages(tmp_path / "a") == 0 and cached_pages(tmp_path / "usual") > 0


def cached_pages(path: Path) -> int:
    """Pages of a file that the kernel holds in memory, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        found = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), found) == 0
        del start
    return sum(page & 1 for page in found)


@pytest.mark.parametrize("parts", [[10], [9000] * 11])
def test_a_write_that_fails_is_told(parts: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(blocks.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "a", bytes(sum(parts)), parts[:-1])
