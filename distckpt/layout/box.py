"""A shard as a box: an axis-aligned block of a global tensor, in elements."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from types import EllipsisType
from typing import NamedTuple

Shape = tuple[int, ...]

#: Largest piece in bytes. A piece is written by one rank, has one checksum, and fits the staging buffers.
MAX_PIECE_NBYTES = 8 << 20

#: Largest number of dimensions of a dataset (HDF5: H5S_MAX_RANK).
MAX_NDIM = 32


class Box(NamedTuple):
    """A block of a global tensor.

    Attributes:
        offset: Start in the global tensor, in elements, one per dimension.
        shape: Extent in elements, one per dimension. A zero extent makes the box empty.
    """

    offset: Shape
    shape: Shape

    @classmethod
    def whole(cls, shape: Shape) -> Box:
        """The box that covers all of a tensor of `shape`."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def within(self, shape: Shape) -> bool:
        """Whether the box lies inside a tensor of `shape`."""
        return len(shape) == len(self.shape) == len(self.offset) and all(
            0 <= start and 0 <= extent and start + extent <= size
            for start, extent, size in zip(self.offset, self.shape, shape, strict=True)
        )

    def contains(self, other: Box) -> bool:
        """Whether every element of `other` is in this box; `other` is not empty."""
        return all(
            start <= other_start and other_start + other_extent <= start + extent
            for start, extent, other_start, other_extent in zip(
                self.offset, self.shape, other.offset, other.shape, strict=True
            )
        )

    def intersect(self, other: Box) -> Box | None:
        """The common block, or None when no element is in both."""
        starts: list[int] = []
        extents: list[int] = []
        for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True):
            start = max(a, b)
            extent = min(a + n, b + m) - start
            if extent <= 0:
                return None
            starts.append(start)
            extents.append(extent)
        return Box(tuple(starts), tuple(extents))

    def overlap(self, other: Box) -> Overlap | None:
        """The common block as indices of arrays, or None when no element is in both."""
        own: list[slice] = []
        others: list[slice] = []
        for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True):
            start = max(b, a)
            stop = min(b + m, a + n)
            if start >= stop:
                return None
            own.append(slice(start - a, stop - a))
            others.append(slice(start - b, stop - b))
        return Overlap((*own, ...), (*others, ...))

    def relative_to(self, outer: Box) -> Box:
        """The same block in the coordinates of `outer`."""
        return Box(tuple(a - b for a, b in zip(self.offset, outer.offset, strict=True)), self.shape)


#: An index that gives an array, even for zero dimensions.
Index = tuple[slice | EllipsisType, ...]


class Overlap(NamedTuple):
    """The common block of two boxes.

    Attributes:
        own: Its index in an array of the first box's elements.
        others: Its index in an array of the second box's.
    """

    own: Index
    others: Index


def _rows(box: Box, axis: int, start: int, extent: int) -> Box:
    """`extent` rows of a box along `axis`, from its row `start` on."""
    return Box(
        (*box.offset[:axis], box.offset[axis] + start, *box.offset[axis + 1 :]),
        (*box.shape[:axis], extent, *box.shape[axis + 1 :]),
    )


def _leading_axis(box: Box) -> int:
    """The first dimension along which a box of more than one element can be cut."""
    return next(axis for axis, extent in enumerate(box.shape) if extent > 1)


def cut(box: Box, max_numel: int) -> Iterator[Box]:
    """Cut a box, in row-major order, into boxes of at most `max_numel` elements.

    Whole rows of the leading dimension stay together where they fit, so that a piece of a contiguous box is
    contiguous. An empty box gives no pieces. The result depends on nothing but the arguments: writer and reader find
    the same pieces.
    """
    numel = box.numel
    if numel == 0:
        return
    if numel <= max_numel:
        yield box
        return
    axis = _leading_axis(box)
    row_numel = numel // box.shape[axis]
    step = max(1, max_numel // row_numel)
    for start in range(0, box.shape[axis], step):
        yield from cut(_rows(box, axis, start, min(step, box.shape[axis] - start)), max_numel)


@lru_cache(maxsize=1 << 14)
def cut_count(shape: Shape, max_numel: int) -> int:
    """How many boxes `cut` makes of a box of `shape`."""
    numel = math.prod(shape)
    if numel <= max_numel:
        return min(numel, 1)
    axis = _leading_axis(Box(shape, shape))
    row_shape = shape[axis + 1 :]
    row_numel = math.prod(row_shape)
    if row_numel > max_numel:
        return shape[axis] * cut_count(row_shape, max_numel)
    return -(-shape[axis] // (max_numel // row_numel))


def _max_piece_numel(itemsize: int) -> int:
    return max(1, MAX_PIECE_NBYTES // itemsize)


def pieces(box: Box, itemsize: int) -> list[Box]:
    """The pieces of a shard: what is written, checksummed and verified as a unit, at most `MAX_PIECE_NBYTES` each."""
    max_numel = _max_piece_numel(itemsize)
    return [box] if 0 < box.numel <= max_numel else list(cut(box, max_numel))


def piece_count(shape: Shape, itemsize: int) -> int:
    """How many pieces a shard of `shape` has; the number of its checksums."""
    return cut_count(shape, _max_piece_numel(itemsize))


def flat_boxes(box: Box, start: int, stop: int) -> list[Box]:
    """The elements `start` to `stop` (exclusive) of a box, counted in row-major order, as boxes in that order.

    At most 2 * ndim - 1 boxes, none of them empty.
    """
    start, stop = max(start, 0), min(stop, box.numel)
    if start >= stop:
        return []
    if stop - start == box.numel:
        return [box]
    axis = _leading_axis(box)
    row_numel = box.numel // box.shape[axis]
    first, head = divmod(start, row_numel)
    last, tail = divmod(stop, row_numel)
    if first == last:
        return flat_boxes(_rows(box, axis, first, 1), head, tail)
    found: list[Box] = []
    if head:
        found += flat_boxes(_rows(box, axis, first, 1), head, row_numel)
        first += 1
    if first < last:
        found.append(_rows(box, axis, first, last - first))
    if tail:
        found += flat_boxes(_rows(box, axis, last, 1), 0, tail)
    return found


def first_element(box: Box, global_shape: Shape) -> int:
    """Position of a box's first element in the flattened dataset."""
    position = 0
    for size, start in zip(global_shape, box.offset, strict=True):
        position = position * size + start
    return position


@lru_cache(maxsize=1 << 14)  # models repeat few shapes
def row_major_strides(shape: Shape) -> Shape:
    """In elements, of a packed tensor."""
    strides = [1]
    for extent in shape[:0:-1]:
        strides.append(strides[-1] * extent)
    return tuple(reversed(strides[: len(shape)]))


def elements_before(box: Box, global_shape: Shape, position: int) -> int:
    """How many elements of a box come before a position in the flattened dataset."""
    row_numel = math.prod(global_shape[1:])
    if global_shape and position % row_numel == 0:  # the usual case
        return min(max(position // row_numel - box.offset[0], 0), box.shape[0]) * math.prod(box.shape[1:])
    coordinates = []
    for size in reversed(global_shape):
        position, coordinate = divmod(position, size)
        coordinates.append(coordinate)
    if position:  # behind the last element
        return box.numel
    before, row_numel = 0, box.numel
    for coordinate, start, extent in zip(reversed(coordinates), *box, strict=True):
        row_numel //= extent
        before += min(max(coordinate - start, 0), extent) * row_numel
        if not start <= coordinate < start + extent:
            break
    return before


def run_axis(box: Box, global_shape: Shape) -> int:
    """The dimension from which on a non-empty box is one run in the file: trailing ones are covered whole."""
    axis = len(global_shape) - 1
    while axis > 0 and box.shape[axis] == global_shape[axis]:
        axis -= 1
    return max(axis, 0)


def is_contiguous(box: Box, global_shape: Shape) -> bool:
    """Whether a non-empty box is one range of bytes in the file."""
    if box.shape == global_shape or box.shape[1:] == global_shape[1:]:
        return True
    return all(extent == 1 for extent in box.shape[: run_axis(box, global_shape)])


class Runs(NamedTuple):
    """Where a box lies in a row-major array: equally long contiguous runs, in elements.

    Attributes:
        starts: First element of each run in the flattened global array, ascending.
        numel: Elements per run.
    """

    starts: list[int]
    numel: int


def runs(box: Box, global_shape: Shape) -> Runs:
    """The contiguous runs of a non-empty box in a row-major array of `global_shape`."""
    axis = len(global_shape)
    numel = 1
    # Trailing dimensions that the box covers whole join into one run, and so does the first that it does not.
    while axis > 0:
        axis -= 1
        numel *= box.shape[axis]
        if box.shape[axis] != global_shape[axis]:
            break
    starts = [0]
    for size, start, extent in zip(global_shape[:axis], box.offset[:axis], box.shape[:axis], strict=True):
        starts = [i for s in starts for i in range(s * size + start, s * size + start + extent)]
    stride = math.prod(global_shape[axis:])
    inner = 0
    for size, start in zip(global_shape[axis:], box.offset[axis:], strict=True):
        inner = inner * size + start
    return Runs([s * stride + inner for s in starts], numel)
