"""ZeRO-3's walk through a micro-batch, by hand. Against real ranks: tests/dist/test_estimate.py."""

import pytest

from megacm3.planning.zero3 import gathering, micro_batch_order

SIZES = (("embed", 8), ("a", 1), ("b", 2), ("c", 4), ("head", 8))
FAR = 10**9


def order(again: bool = False) -> tuple[str, ...]:
    return micro_batch_order(["embed"], [["a", "b"], ["c"]], "head", again)


def test_the_order_of_use() -> None:
    assert order() == ("embed", "a", "b", "c", "head", "head", "c", "b", "a", "embed")
    assert order(again=True) == ("embed", "a", "b", "c", "head", "head", "c", "c", "a", "b", "b", "a", "embed")


@pytest.mark.parametrize(
    "again, reach, ahead, live, numbers, peak",
    [
        (False, FAR, 0, FAR, 23, 23),  # all are kept
        (False, 0, FAR, FAR, 23, 23),  # all are gathered at the first module
        (False, 0, 0, FAR, 46, 8),  # none is kept: twice each, one at a time
        (True, 0, 0, FAR, 53, 8),  # the blocks a third time
        (False, 17, 0, FAR, 34, 12),  # head and c are kept (0 and 16 numbers between), b (24) is not
        (True, 25, 0, FAR, 34, 12),  # b comes again after 16 + 2 x 4 + 1 + 4 numbers; once run again, it is kept
    ],
)
def test_what_is_gathered(again: bool, reach: int, ahead: int, live: int, numbers: int, peak: int) -> None:
    found = gathering(order(again), SIZES, reach, ahead, live)
    assert (found.numbers, found.peak) == (numbers, peak)


def test_a_tied_table_is_gathered_at_both_ends() -> None:
    tied = micro_batch_order(["embed"], [["a", "b"], ["c"]], "embed", False)
    assert gathering(tied, SIZES[:-1], 0, 0, FAR).numbers == 4 * 8 + 2 * 7
    assert gathering(tied, SIZES[:-1], 1, 0, FAR).numbers == 3 * 8 + 2 * 7


def test_gathering_in_advance_stops_at_what_may_be_whole() -> None:
    found = gathering(order(), SIZES, 0, 1, 12)
    assert found.peak < 12 + 8
    assert 23 < found.numbers <= 46
