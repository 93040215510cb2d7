import pytest
import torch

from megacm3.checkpoint.boxes import Box, boxes_of_range, whole
from megacm3.parallel.parts import Part


def test_text_and_back() -> None:
    box = Box((3, 0), (2, 7))
    assert str(box) == "3:5,0:7" and Box.parse("3:5,0:7") == box and box.numel == 14
    for wrong in ("", "3", "5:3", "-1:2", "1:1,0:2", "1:2:3", "a:b"):
        with pytest.raises(ValueError):
            Box.parse(wrong)


def test_intersection() -> None:
    a, b = Box((0, 4), (6, 4)), Box((5, 6), (9, 9))
    assert a.intersection(b) == Box((5, 6), (1, 2)) == b.intersection(a)
    assert a.intersection(Box((6, 4), (1, 1))) is None
    assert Box((5, 6), (1, 2)).within(a) == (slice(5, 6), slice(2, 4))


@pytest.mark.parametrize(
    "start, stop", [(0, 60), (0, 1), (59, 60), (3, 4), (3, 9), (4, 20), (7, 53), (13, 14), (25, 35)]
)
@pytest.mark.parametrize("columns_offset", [0, 5])
def test_any_flat_range_becomes_boxes_that_hold_it(start: int, stop: int, columns_offset: int) -> None:
    """A local tensor of 12 rows of 5: rows 0-6 are of one logical tensor, 7-11 of another, each a share of its rows."""
    width = 5
    wide = width + columns_offset
    a = Part("a", (20, wide), (3, columns_offset), (7, width), 0)
    b = Part("b", (9, wide), (0, columns_offset), (5, width), 7)
    whole_tensors = {p.name: torch.randn(p.global_shape) for p in (a, b)}
    pieces = [whole_tensors[p.name][Box(p.offset, p.shape).within(whole(p.global_shape))] for p in (a, b)]
    local = torch.cat(pieces).reshape(-1)
    fragment, covered = local[start:stop], 0
    for part in (a, b):
        boxes = list(boxes_of_range(part, width, start, stop))
        assert len(boxes) <= 3
        for box, place in boxes:
            expected = whole_tensors[part.name][box.within(whole(part.global_shape))]
            assert torch.equal(fragment[place].view(box.shape), expected)
            covered += box.numel
    assert covered == stop - start


def test_vectors_have_rows_of_one() -> None:
    part = Part("norm", (8,), (0,), (8,), 0)
    assert list(boxes_of_range(part, 1, 2, 5)) == [(Box((2,), (3,)), slice(0, 3))]
