"""Boxes of logical tensors: what every checkpoint, reshard and conversion copies from and to."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megacm3.parallel.parts import Part


@dataclass(frozen=True)
class Box:
    """The elements [offset, offset + shape) of a tensor, along every dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        """As slices: `0:32,64:128`. `parse` reads it back."""
        return ",".join(f"{low}:{low + size}" for low, size in zip(self.offset, self.shape, strict=True))

    @staticmethod
    def parse(text: str) -> "Box":
        """The inverse of `str`. Raises ValueError for anything else."""
        pairs = [tuple(int(number) for number in part.split(":")) for part in text.split(",")]
        if any(len(pair) != 2 or not 0 <= pair[0] < pair[1] for pair in pairs):
            raise ValueError(f"'{text}' is not a box such as 0:32,64:128")
        return Box(tuple(low for low, _ in pairs), tuple(high - low for low, high in pairs))

    def intersection(self, other: "Box") -> "Box | None":
        """The box that both cover, None where there is none."""
        low = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        ends = zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        shape = tuple(min(a + n, b + m) - c for (a, n, b, m), c in zip(ends, low, strict=True))
        return Box(low, shape) if all(size > 0 for size in shape) else None

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """The slices of a tensor that holds `outer` at which this box lies."""
        starts = [low - origin for low, origin in zip(self.offset, outer.offset, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.shape, strict=True))


def whole(shape: tuple[int, ...]) -> Box:
    """The box of a whole tensor."""
    return Box((0,) * len(shape), shape)


def row_width(shape: tuple[int, ...]) -> int:
    """Elements in one row (one step along the first dimension) of a tensor."""
    return math.prod(shape[1:])


def boxes_of_range(part: Part, width: int, start: int, stop: int) -> Iterator[tuple[Box, slice]]:
    """The boxes of a part's logical tensor that lie in elements [start, stop) of the flattened local tensor.

    width: elements in a row of the local tensor. At most three boxes: the end of a row, whole rows, the beginning of a
    row. Each comes with the slice of the range [start, stop) that holds it, row-major.
    """
    first = part.start * width
    low, high = max(start, first), min(stop, first + part.shape[0] * width)
    while low < high:
        row, column = divmod(low - first, width)
        if column or high - low < width:
            size = min(width - column, high - low)
            rows = 1
        else:
            rows = (high - low) // width
            size = rows * width
        if len(part.shape) == 1:
            box = Box((part.offset[0] + row,), (rows,))
        else:
            box = Box((part.offset[0] + row, part.offset[1] + column), (rows, size // rows))
        yield box, slice(low - start, low - start + size)
        low += size
