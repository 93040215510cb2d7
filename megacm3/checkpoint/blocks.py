"""A file written in aligned blocks past the page cache, each hashed and written while the next is filled.

Why past it: what a save writes is not read again soon, and in the page cache it would push out the token files that the
loader has mapped, cost one more copy and leave the disk idle until the kernel decides to write.
"""

import errno
import fcntl
import hashlib
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType

import torch

BLOCK = 1 << 24
"""Bytes written and hashed at once."""

RING = 4
"""Blocks in memory: one being filled, the others being hashed and written."""

ALIGNMENT = 4096
"""Bytes: what the address, offset and length of a write past the page cache must be a multiple of, on every disk."""

_DIRECT = getattr(os, "O_DIRECT", 0)


class BlockFile:
    """A new file, or an existing one written anew; `finish` makes it durable. A context manager.

    Where the file system knows no writes past the page cache (some network and memory file systems), the same blocks go
    through it.
    """

    def __init__(self, path: Path, *, hashed: bool) -> None:
        self.size = 0
        """Bytes added."""
        self._digest = hashlib.sha256() if hashed else None
        self._file = _open(path)
        self._hashing, self._writing = ThreadPoolExecutor(1, "hash"), ThreadPoolExecutor(1, "write")
        self._block, self._filled = _new_block(), 0
        self._sent: deque[tuple[torch.Tensor, list[Future[None]]]] = deque()

    def __enter__(self) -> "BlockFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        for pool in (self._hashing, self._writing):
            pool.shutdown(cancel_futures=True)
        os.close(self._file)

    def add(self, data: torch.Tensor) -> None:
        """Append one-dimensional uint8 data, in host memory. Raises OSError of an earlier block's write."""
        self.size += len(data)
        while len(data):
            count = min(len(data), BLOCK - self._filled)
            self._block[self._filled : self._filled + count].copy_(data[:count])
            self._filled += count
            data = data[count:]
            if self._filled == BLOCK:
                self._send()

    def finish(self) -> str:
        """Write what is left and fsync; return the hex sha256, "" where it is not hashed. Raises OSError."""
        self._send()
        for _, work in self._sent:
            _settle(work)
        os.ftruncate(self._file, self.size)
        os.fsync(self._file)
        return self._digest.hexdigest() if self._digest else ""

    def _send(self) -> None:
        """Hand the block over, filled up with zeros where it is the last, and take the next."""
        filled = self._filled
        padded = filled + -filled % ALIGNMENT
        self._block[filled:padded] = 0
        data = memoryview(self._block.numpy())  # type: ignore[arg-type]
        work = [self._writing.submit(_write, self._file, data[:padded])]
        if self._digest:
            work.append(self._hashing.submit(self._digest.update, data[:filled]))
        self._sent.append((self._block, work))
        if len(self._sent) < RING:
            self._block = _new_block()
        else:
            self._block, oldest = self._sent.popleft()
            _settle(oldest)
        self._filled = 0


def _settle(work: list[Future[None]]) -> None:
    wait(work)
    for future in work:
        future.result()


def _new_block() -> torch.Tensor:
    """Bytes that begin at a page."""
    return torch.frombuffer(mmap.mmap(-1, BLOCK), dtype=torch.uint8)


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as fault:
        if fault.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _write(file: int, data: memoryview) -> None:
    while data:
        try:
            data = data[os.write(file, data) :]
        except OSError as fault:
            flags = fcntl.fcntl(file, fcntl.F_GETFL)
            # Refused only now, or what an interrupted write left is not aligned: the rest goes through the page cache.
            if fault.errno != errno.EINVAL or not flags & _DIRECT:
                raise
            fcntl.fcntl(file, fcntl.F_SETFL, flags & ~_DIRECT)
