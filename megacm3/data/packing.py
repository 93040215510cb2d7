"""Samples into sequences of a fixed length, and the keyed permutation that orders them.

`blocks` (the papers' way): samples one after another, cut wherever a sequence is full. `whole`: a sample is never cut;
sequences are filled by best fit, the room left is padding. Both fill a fixed number of sequences from one window of
samples, so that a sequence's number says which window it is in: what a window has too much is left out and counted,
what it has too little becomes padding, spread so that no sequence is empty.

Only lengths are needed here: no token is read.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megacm3.command import seed_from

_ROUNDS = 8
"""Rounds of the Feistel network; 4 are enough in theory for good round functions, the rest is cheap."""


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    # The finaliser of splitmix64 (Steele et al. 2014): every input bit reaches every output bit.
    values = (values + key) * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Permutation:
    """A keyed pseudo-random permutation of 0..size-1, computed point by point in constant memory.

    A balanced Feistel network permutes the smallest power of four that holds `size`; a value outside 0..size-1 is sent
    through again until it falls inside (cycle walking), fewer than four times on average. Up to `TABLE` numbers are
    shuffled outright: on a few bits a network reaches too few of the permutations.
    """

    TABLE = 4096

    def __init__(self, size: int, *key: int | str) -> None:
        assert 0 < size < 1 << 62
        self.size = size
        rng = np.random.Generator(np.random.PCG64(seed_from("permutation", size, *key)))
        self._table = rng.permutation(size) if size <= self.TABLE else None
        self._half = np.uint64(((size - 1).bit_length() + 1) // 2)
        self._low = np.uint64((1 << int(self._half)) - 1)
        self._keys = rng.integers(0, 1 << 63, _ROUNDS, dtype=np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """int64, the shape of `positions` (each 0..size-1): where each position is sent."""
        if self._table is not None:
            return self._table[positions]
        values = np.asarray(positions).astype(np.uint64).ravel()
        pending = np.arange(len(values))
        while len(pending):
            values[pending] = self._network(values[pending])
            pending = pending[values[pending] >= self.size]
        return values.astype(np.int64).reshape(np.shape(positions))

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._low
        for key in self._keys:
            left, right = right, left ^ (_mix(right, key) & self._low)
        return (left << self._half) | right


class Piece(NamedTuple):
    """Tokens [start, stop) of the window's sample `sample`."""

    sample: int
    start: int
    stop: int


@dataclass(frozen=True)
class Packed:
    """A window's sequences."""

    pieces: tuple[tuple[Piece, ...], ...]
    """Of each sequence, in order."""
    spans: tuple[int, ...]
    """CM3 spans of each sequence."""
    cut: int
    """Tokens left out because the window's sequences were full."""
    cut_samples: int
    """Samples left out, wholly or in part, for the same reason."""


def blocks_needed(lengths: np.ndarray, size: int, spans: float) -> float:
    """Sequences of `size` tokens that samples of these lengths fill, with `spans` CM3 spans each on average."""
    return float(lengths.sum()) / (size - 3 * spans)


def pack_blocks(lengths: np.ndarray, size: int, spans: np.ndarray) -> Packed:
    """Cut the samples' concatenation into one sequence for each entry of `spans`.

    lengths: int64 [samples]. size: tokens of a sequence, those that CM3 adds included. spans: int64 [sequences]; a
    sequence with n of them holds size - 3n tokens before the rearrangement. Where the samples fill less than all
    sequences, every sequence is made shorter by the same share.
    """
    rooms = size - 3 * spans
    total, needed = int(lengths.sum()), int(rooms.sum())
    cuts = np.concatenate([[0], np.cumsum(rooms)])
    if total < needed:
        cuts = cuts * total // needed
    ends = np.cumsum(lengths)
    first = np.searchsorted(ends, cuts[:-1], side="right")
    last = np.searchsorted(ends, cuts[1:], side="left")
    begins = (ends - lengths).tolist()
    ends_list, pieces = ends.tolist(), []
    for a, b, begin, end in zip(first.tolist(), last.tolist(), cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        inside = range(a, b + 1) if end > begin else ()
        cut_out = (Piece(i, max(begin - begins[i], 0), min(end, ends_list[i]) - begins[i]) for i in inside)
        pieces.append(tuple(cut_out))
    cut = max(0, total - needed)
    cut_samples = int((ends > cuts[-1]).sum()) if cut else 0
    return Packed(tuple(pieces), tuple(spans.tolist()), cut, cut_samples)


def fit_whole(lengths: np.ndarray, size: int, spans: np.ndarray) -> list[list[int]]:
    """Sample numbers of each sequence, by best fit, longest samples first; as many sequences as needed.

    spans: int64 [samples]. The first sample of a sequence decides with its entry how many spans the sequence has, so
    that the number of spans does not depend on how well a sample fits. Every `lengths[i] + 3 * spans[i]` is at most
    `size`.
    """
    assert bool((lengths + 3 * spans <= size).all())
    sequences: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # sorted (room left, sequence)
    sizes, counts = lengths.tolist(), spans.tolist()
    shortest = min(sizes, default=0)
    for i in np.argsort(-lengths, kind="stable").tolist():
        at = bisect_left(rooms, (sizes[i], -1))
        if at < len(rooms):
            room, sequence = rooms.pop(at)
            sequences[sequence].append(i)
            room -= sizes[i]
        else:
            sequence, room = len(sequences), size - 3 * counts[i] - sizes[i]
            sequences.append([i])
        if room >= shortest:
            insort(rooms, (room, sequence))
    return sequences


def pack_whole(lengths: np.ndarray, size: int, spans: np.ndarray, sequences: int, rng: np.random.Generator) -> Packed:
    """Exactly `sequences` sequences of whole samples, in random order.

    Too many: the last of the random order are left out. Too few: sequences of several samples are split, so that none
    is empty as long as there are as many samples as sequences. Arguments as in `fit_whole`.
    """
    fitted = fit_whole(lengths, size, spans)
    order = rng.permutation(len(fitted)).tolist()
    chosen = [fitted[i] for i in order[:sequences]]
    left = [i for number in order[sequences:] for i in fitted[number]]
    crowded = [group for group in chosen if len(group) > 1]
    while len(chosen) < sequences:
        group = crowded.pop() if crowded else []
        chosen.append([group.pop()] if group else [])
        if len(group) > 1:
            crowded.append(group)
    chosen = [chosen[i] for i in rng.permutation(sequences)]
    counts = tuple(int(spans[group[0]]) if group else 0 for group in chosen)
    pieces = tuple(tuple(Piece(i, 0, int(lengths[i])) for i in group) for group in chosen)
    return Packed(pieces, counts, int(lengths[left].sum()), len(left))
