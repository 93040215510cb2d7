"""From the stream to training steps: who gets which sequences, as tensors, read ahead by worker processes.

Step s is made of sequences s x global_batch and on; rank r of the data-parallel group takes the r-th equal part of
them. So the state is one number, and neither ranks nor workers change what a step contains.
"""

import ctypes
import hashlib
import itertools
import signal
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from megacm3.data.stream import Stream
from megacm3.data.windows import COUNTERS
from megacm3.errors import CheckpointError, ConfigError, DataError, Megacm3Error

IGNORED = -100
"""Target of a position that bears no loss: torch's `ignore_index`."""


@dataclass(frozen=True)
class Step:
    """One rank's part of a training step, with what is known of the whole step."""

    number: int
    first_sequence: int
    """The global batch is made of global_batch sequences from this one on."""
    micro_batches: list[dict[str, torch.Tensor]]
    """For each accumulation: tokens int64 [b, L], targets int64 [b, L] (-100 = no loss), documents int32 [b, L] (index
    of the sample at each position, -1 = padding), numbers int64 [b] (of the sequences in the stream)."""
    samples_sha256: str
    """Of the sample numbers of the whole global batch: the same on all ranks, whatever their number."""
    counts: dict[str, int]
    """`windows.COUNTERS` summed over the whole global batch."""


class _Arrays(NamedTuple):
    # What a worker sends: arrays, not tensors, so that no shared memory is needed.
    tokens: np.ndarray
    targets: np.ndarray
    documents: np.ndarray
    numbers: np.ndarray
    first_sequence: int
    samples_sha256: str
    counts: dict[str, int]


class _Steps(torch.utils.data.Dataset):
    """First sequence of a step -> arrays of one rank."""

    def __init__(self, stream: Stream, global_batch: int, part: range) -> None:
        self._stream, self._global_batch, self._part = stream, global_batch, part

    def __getitem__(self, begin: int) -> _Arrays | Megacm3Error:
        try:
            return self._read(begin)
        except Megacm3Error as error:
            # Raised in the training process: torch would wrap it into a traceback.
            return error

    def _read(self, begin: int) -> _Arrays:
        digest, totals, rows = hashlib.sha256(), np.zeros(len(COUNTERS), np.int64), []
        for number in range(begin, begin + self._global_batch):
            digest.update(np.array([*self._stream.samples(number), -1], "<i8").tobytes())
            totals += list(self._stream.counts(number).values())
            if number - begin in self._part:
                rows.append(self._stream.sequence(number))
        tokens = np.stack([row.tokens for row in rows])
        mask = np.stack([row.loss_mask for row in rows])
        return _Arrays(
            tokens[:, :-1],
            np.where(mask, tokens[:, 1:], IGNORED),
            np.stack([row.documents for row in rows]),
            np.array([row.number for row in rows], np.int64),
            begin,
            digest.hexdigest(),
            dict(zip(COUNTERS, totals.tolist(), strict=True)),
        )


def jump(sequence: int, size: int, skip: Sequence[list[int]]) -> int:
    """The first sequence from `sequence` on from which `size` sequences touch no range [first, end) of `skip`."""
    for first, end in sorted(skip):
        if sequence < end and sequence + size > first:
            sequence = end
    return sequence


class _Begins:
    """The first sequences of step after step, without end, as a sampler."""

    def __init__(self, start: int, size: int, skip: Sequence[list[int]]) -> None:
        self._start, self._size, self._skip = start, size, skip

    def __iter__(self) -> Iterator[int]:
        sequence = self._start
        while True:
            sequence = jump(sequence, self._size, self._skip)
            yield sequence
            sequence += self._size


class Loader:
    """Iterating gives one `Step` after another, without end."""

    def __init__(
        self,
        stream: Stream,
        dp_rank: int,
        dp_size: int,
        micro_batch: int,
        global_batch: int,
        start_step: int = 0,
        workers: int = 0,
        start_sequence: int | None = None,
        skip: Sequence[list[int]] = (),
    ) -> None:
        """start_sequence: first sequence of `start_step`, by default start_step * global_batch; another one after
        training on with another global batch. workers: processes that read ahead, 0 = none. skip: ranges [first, end)
        of sequences that no step reads.

        Raises ConfigError when global_batch is not a multiple of micro_batch * dp_size.
        """
        unit = micro_batch * dp_size
        if global_batch % unit or global_batch < 1:
            below = global_batch // unit * unit
            nearest = f"{below} or {below + unit}" if below else str(unit)
            raise ConfigError(
                f"train.global_batch = {global_batch} is not a multiple of train.micro_batch x data-parallel ranks = "
                f"{micro_batch} x {dp_size} = {unit}; nearest: {nearest}"
            )
        assert 0 <= dp_rank < dp_size
        self.stream, self.micro_batch, self.global_batch = stream, micro_batch, global_batch
        self.start_step, self.workers = start_step, workers
        self.start_sequence = start_step * global_batch if start_sequence is None else start_sequence
        share = global_batch // dp_size
        part = range(dp_rank * share, (dp_rank + 1) * share)
        self._steps, self._skip = _Steps(stream, global_batch, part), skip

    def __iter__(self) -> Iterator[Step]:
        """Steps from `start_step` on. Raises DataError when a store is damaged or a worker dies."""
        steps = iter(
            torch.utils.data.DataLoader(
                self._steps,
                batch_size=None,
                sampler=_Begins(self.start_sequence, self.global_batch, self._skip),
                num_workers=self.workers,
                collate_fn=_same,
                # Its own generator: the loader must not draw from the one that dropout uses.
                generator=torch.Generator(),
                prefetch_factor=2 if self.workers else None,
                multiprocessing_context="fork" if self.workers else None,
                worker_init_fn=_begin_worker,
            )
        )
        try:
            for number in itertools.count(self.start_step):
                try:
                    arrays = next(steps)
                except RuntimeError as fault:
                    if "DataLoader worker" not in str(fault):
                        raise
                    raise DataError(
                        f"a loader process died ({str(fault).splitlines()[0]}); see data.workers"
                    ) from fault
                if isinstance(arrays, Megacm3Error):
                    raise arrays
                yield self._step(number, arrays)
        finally:
            if self.workers:
                steps._shutdown_workers()  # type: ignore[attr-defined]  # its own deletion waits for the garbage collector

    def _step(self, number: int, arrays: _Arrays) -> Step:
        names = ("tokens", "targets", "documents", "numbers")
        tensors = {name: torch.from_numpy(np.ascontiguousarray(getattr(arrays, name))) for name in names}
        cuts = range(0, len(arrays.numbers), self.micro_batch)
        micro = [{name: tensor[i : i + self.micro_batch] for name, tensor in tensors.items()} for i in cuts]
        return Step(number, arrays.first_sequence, micro, arrays.samples_sha256, arrays.counts)


def _begin_worker(_: int) -> None:
    """A worker leaves signals to the trainer, and dies with it, however that ends: it holds copies of its sockets."""
    signal.set_wakeup_fd(-1)  # the trainer's
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _same(value: Any) -> Any:
    return value


def check_resume(saved: dict[str, Any], stream: Stream, free: Collection[str] = ()) -> None:
    """Raise CheckpointError, naming what differs, unless `saved` (a `Stream.description`) is that of `stream`.

    free: entries of the description that may differ.
    """
    before, now = ({k: v for k, v in tree.items() if k not in free} for tree in (saved, stream.description))
    differing = list(_paths(before, now))
    if differing:
        listed = "; ".join(differing[:5])
        raise CheckpointError(
            f"the checkpoint was trained on another stream of data: {listed}; "
            "set these back, or start a new run from its weights"
        )


def _paths(saved: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted(saved.keys() | now.keys()):
            yield from _paths(saved.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        for i, pair in enumerate(zip(saved, now, strict=True)):
            yield from _paths(*pair, f"{path}[{i}]")
    elif saved != now:
        yield f"{path} was {saved}, is now {now}"
