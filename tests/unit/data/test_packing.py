"""The keyed permutation, and sequences of a fixed length from samples."""

import numpy as np
import pytest

from megacm3.data.packing import Permutation, blocks_needed, fit_whole, pack_blocks, pack_whole


@pytest.mark.parametrize("size", [1, 2, 3, 10, 4096, 4097, 5000, 65537])
def test_permutation_reaches_every_number_once(size: int) -> None:
    sent = Permutation(size, 7, "epoch", 0)(np.arange(size))
    assert np.array_equal(np.sort(sent), np.arange(size))


@pytest.mark.parametrize("size", [1000, 6000])
def test_permutation_is_pointwise_and_keyed(size: int) -> None:
    first, second = Permutation(size, 1), Permutation(size, 2)
    everything = first(np.arange(size))
    places = np.array([[5, 999], [0, 5]])
    assert np.array_equal(first(places), everything[places])
    assert not np.array_equal(everything, second(np.arange(size)))
    assert np.array_equal(everything, Permutation(size, 1)(np.arange(size)))


@pytest.mark.parametrize("size", [7, 5000])
def test_permutation_is_uniform(size: int) -> None:
    # Over many keys a place goes to every number equally often, and so do ordered pairs of places.
    keys, bins = 2000, min(size, 10)
    rows = np.stack([Permutation(size, "uniform", key)(np.array([0, 3, 4])) for key in range(keys)])
    assert (rows[:, 1] != rows[:, 2]).all()
    rows = rows * bins // size
    for place in range(3):
        counts, expected = np.bincount(rows[:, place], minlength=bins), keys / bins
        assert ((counts - expected) ** 2 / expected).sum() < bins + 5 * np.sqrt(2 * bins)
    pairs = np.zeros((bins, bins))
    np.add.at(pairs, (rows[:, 1], rows[:, 2]), 1)
    cells = ~np.eye(bins, dtype=bool) if bins == size else np.ones((bins, bins), bool)
    expected = keys / cells.sum()
    assert ((pairs[cells] - expected) ** 2 / expected).sum() < cells.sum() + 5 * np.sqrt(2 * cells.sum())


def test_permutation_of_a_large_range_has_no_order_left() -> None:
    size = 100_000_000
    sent = Permutation(size, 0)(np.arange(20_000))
    assert len(np.unique(sent)) == 20_000
    share = np.bincount(sent * 16 // size, minlength=16) / 20_000
    assert abs(share - 1 / 16).max() < 0.01
    assert abs(np.corrcoef(sent[:-1], sent[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(sent, np.arange(20_000))[0, 1]) < 0.03


def rebuild(packed: object, lengths: np.ndarray) -> list[list[tuple[int, int]]]:
    """Of each sequence the (sample, position) of every token."""
    return [
        [(piece.sample, at) for piece in pieces for at in range(piece.start, piece.stop)]
        for pieces in packed.pieces  # type: ignore[attr-defined]
    ]


def test_blocks_are_the_concatenation_cut() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = rng.integers(2, 40, rng.integers(1, 30))
        size, sequences = int(rng.integers(20, 50)), int(rng.integers(1, 12))
        spans = rng.poisson(1, sequences)
        packed = pack_blocks(lengths, size, spans)
        stream = [(i, at) for i, length in enumerate(lengths) for at in range(length)]
        made = rebuild(packed, lengths)
        flat = [token for sequence in made for token in sequence]
        # Nothing is lost inside, the rest is counted, and room for the spans is kept.
        assert flat == stream[: len(flat)]
        assert packed.cut == len(stream) - len(flat)
        assert packed.cut_samples == len({i for i, _ in stream[len(flat) :]})
        assert all(len(tokens) + 3 * n <= size for tokens, n in zip(made, packed.spans, strict=True))
        if packed.cut:
            assert all(len(tokens) + 3 * n == size for tokens, n in zip(made, packed.spans, strict=True))


def test_blocks_without_spans_are_the_papers() -> None:
    lengths = np.array([10, 7, 13])
    made = rebuild(pack_blocks(lengths, 10, np.zeros(3, int)), lengths)
    stream = [(i, at) for i, length in enumerate(lengths) for at in range(length)]
    assert made == [stream[:10], stream[10:20], stream[20:]]


def test_a_window_that_is_too_short_leaves_no_block_empty() -> None:
    packed = pack_blocks(np.array([50, 50]), 30, np.zeros(4, int))
    filled = [sum(piece.stop - piece.start for piece in pieces) for pieces in packed.pieces]
    assert sum(filled) == 100 and min(filled) == max(filled) == 25


def test_blocks_needed() -> None:
    assert blocks_needed(np.array([60, 34]), 50, 1.0) == 2.0


def test_whole_keeps_samples_and_fills_by_best_fit() -> None:
    lengths = np.array([30, 60, 20, 50, 40, 95])
    fitted = fit_whole(lengths, 100, np.zeros(6, int))
    assert sorted(i for group in fitted for i in group) == list(range(6))
    assert sorted(int(lengths[group].sum()) for group in fitted) == [95, 100, 100]


def test_whole_leaves_room_for_the_spans_of_the_first_sample() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths, spans = rng.integers(2, 70, 40), rng.poisson(1, 40)
        size = int((lengths + 3 * spans).max() + rng.integers(0, 40))
        for group in fit_whole(lengths, size, spans):
            assert lengths[group].sum() + 3 * spans[group[0]] <= size


def test_whole_gives_the_asked_number_of_sequences_and_counts_the_rest() -> None:
    rng = np.random.default_rng(0)
    lengths, spans = rng.integers(5, 60, 64), rng.poisson(1, 64)
    needed = len(fit_whole(lengths, 80, spans))
    for sequences in (needed - 5, needed, needed + 5):
        packed = pack_whole(lengths, 80, spans, sequences, np.random.default_rng(1))
        assert len(packed.pieces) == len(packed.spans) == sequences
        assert all(packed.pieces)
        placed = [piece.sample for pieces in packed.pieces for piece in pieces]
        assert len(placed) == len(set(placed)) == 64 - packed.cut_samples
        assert packed.cut == lengths.sum() - lengths[placed].sum()
        assert (packed.cut > 0) == (sequences < needed)
        for pieces, n in zip(packed.pieces, packed.spans, strict=True):
            assert all(piece.start == 0 and piece.stop == lengths[piece.sample] for piece in pieces)
            assert n == spans[pieces[0].sample]
            assert sum(piece.stop for piece in pieces) + 3 * n <= 80


def test_whole_orders_sequences_at_random() -> None:
    # Best fit begins with the longest samples; a window must not.
    lengths = np.arange(10, 74)
    packed = pack_whole(lengths, 80, np.zeros(64, int), 64, np.random.default_rng(0))
    first = [pieces[0].stop for pieces in packed.pieces if len(pieces) == 1]
    assert abs(np.corrcoef(first, np.arange(len(first)))[0, 1]) < 0.4
