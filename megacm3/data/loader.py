"""From the stream to training steps: who gets which sequences, as tensors, read ahead by worker processes.

Step s is made of sequences s x global_batch and on; rank r of the data-parallel group takes the r-th equal part of
them. So the state is one number, and neither ranks nor workers change what a step contains.
"""

import hashlib
import itertools
from collections.abc import Iterator
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
    samples_sha256: str
    counts: dict[str, int]


class _Steps(torch.utils.data.Dataset):
    """Step number -> arrays of one rank."""

    def __init__(self, stream: Stream, first: int, start_step: int, global_batch: int, part: range) -> None:
        self._stream, self._first, self._start_step = stream, first, start_step
        self._global_batch, self._part = global_batch, part

    def __getitem__(self, step: int) -> _Arrays | Megacm3Error:
        try:
            return self._read(step)
        except Megacm3Error as error:
            # Raised in the training process: torch would wrap it into a traceback.
            return error

    def _read(self, step: int) -> _Arrays:
        begin = self._first + (step - self._start_step) * self._global_batch
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
            digest.hexdigest(),
            dict(zip(COUNTERS, totals.tolist(), strict=True)),
        )


class _From:
    """The numbers from `start` on, without end, as a sampler."""

    def __init__(self, start: int) -> None:
        self._start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._start)


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
    ) -> None:
        """start_sequence: first sequence of `start_step`, by default start_step * global_batch; another one after
        training on with another global batch. workers: processes that read ahead, 0 = none.

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
        self._steps = _Steps(stream, self.start_sequence, start_step, global_batch, part)

    def next_sequence(self, step: int) -> int:
        """The sequence that step `step` begins with: the whole state, beside the stream's fingerprint."""
        return self.start_sequence + (step - self.start_step) * self.global_batch

    def __iter__(self) -> Iterator[Step]:
        """Steps from `start_step` on. Raises DataError when a store is damaged or a worker dies."""
        steps = iter(
            torch.utils.data.DataLoader(
                self._steps,
                batch_size=None,
                sampler=_From(self.start_step),
                num_workers=self.workers,
                collate_fn=_same,
                # Its own generator: the loader must not draw from the one that dropout uses.
                generator=torch.Generator(),
                prefetch_factor=2 if self.workers else None,
                multiprocessing_context="fork" if self.workers else None,
            )
        )
        for number in itertools.count(self.start_step):
            try:
                arrays = next(steps)
            except RuntimeError as fault:
                if "DataLoader worker" not in str(fault):
                    raise
                raise DataError(f"a loader process died ({str(fault).splitlines()[0]}); see data.workers") from fault
            if isinstance(arrays, Megacm3Error):
                raise arrays
            yield self._step(number, arrays)

    def _step(self, number: int, arrays: _Arrays) -> Step:
        names = ("tokens", "targets", "documents", "numbers")
        tensors = {name: torch.from_numpy(np.ascontiguousarray(getattr(arrays, name))) for name in names}
        cuts = range(0, len(arrays.numbers), self.micro_batch)
        micro = [{name: tensor[i : i + self.micro_batch] for name, tensor in tensors.items()} for i in cuts]
        return Step(number, micro, arrays.samples_sha256, arrays.counts)


def _same(value: Any) -> Any:
    return value


def check_resume(saved: dict[str, Any], stream: Stream) -> None:
    """Raise CheckpointError, naming what differs, unless `saved` (a `Stream.description`) is that of `stream`."""
    now = stream.description
    differing = list(_paths(saved, now))
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
