"""An index such as `[10:20, ..., 3]` as boxes of a stored tensor."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import SupportsIndex

from distckpt.layout.box import Box, Shape, cut

BasicIndex = SupportsIndex | slice | EllipsisType
Index = BasicIndex | tuple[BasicIndex, ...]

#: A gap between two rows that is not worth reading: a page. In bytes.
_GAP_NBYTES = 4096

#: Most bytes that are read at once when some of them are then left out.
_AT_ONCE_NBYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Selection:
    """What an index takes of a tensor.

    Attributes:
        ranges: The elements along each dimension of the tensor; ascending.
        dropped: Dimensions that the index names with an int, so that the result does not have them.
    """

    ranges: tuple[range, ...]
    dropped: frozenset[int]

    @property
    def extents(self) -> Shape:
        """Number of elements along each dimension of the tensor."""
        return tuple(map(len, self.ranges))

    @property
    def shape(self) -> Shape:
        """Shape of the result."""
        return tuple(extent for axis, extent in enumerate(self.extents) if axis not in self.dropped)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a selection that is read at once.

    Attributes:
        box: What to read, of the tensor.
        steps: Which of the elements to keep: every step-th along each dimension.
        taken: Where they go, in a tensor of shape `Selection.extents`.
    """

    box: Box
    steps: tuple[int, ...]
    taken: Box


def select(index: Index, shape: Shape) -> Selection:
    """Read an index as NumPy and torch do.

    Args:
        index: Ints, slices with positive steps, and at most one `...`, alone or in a tuple.
        shape: Shape of the tensor.

    Raises:
        IndexError: An int is out of bounds, or there are too many dimensions.
        TypeError: The index has something else in it, such as None, a bool or a mask.
        ValueError: A step is not positive.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    dots = [position for position, item in enumerate(items) if item is Ellipsis]
    if len(dots) > 1:
        raise IndexError("an index can have only one ellipsis ('...')")
    position = dots[0] if dots else len(items)
    missing = len(shape) - (len(items) - len(dots))
    if missing < 0:
        raise IndexError(f"too many indices: expected at most {len(shape)}, for the shape {shape}. Got {len(items)}.")
    items[position : position + 1] = [slice(None)] * missing
    ranges = tuple(_range(item, size, axis) for axis, (item, size) in enumerate(zip(items, shape, strict=True)))
    dropped = frozenset(axis for axis, item in enumerate(items) if not isinstance(item, slice))
    return Selection(ranges, dropped)


def _range(item: object, size: int, axis: int) -> range:
    """The elements that one item of an index takes of a dimension."""
    if isinstance(item, slice):
        start, stop, step = item.indices(size)
        if step < 0:
            raise ValueError(f"a slice must have a step > 0. Got {item}. Use flip() on the result.")
        return range(start, max(start, stop), step)
    number = _as_int(item)
    if number is None:
        raise TypeError(
            f"an index can have ints, slices and '...'. Got {'None' if item is None else type(item).__name__}. "
            "Read a slice, then index the result."
        )
    if not -size <= number < size:
        raise IndexError(f"index {number} is out of bounds for dimension {axis} of size {size}")
    return range(number % size, number % size + 1)


def _as_int(item: object) -> int | None:
    """An int, or what stands for one; None for anything else, such as a mask."""
    try:
        return None if isinstance(item, bool) else operator.index(item)  # type: ignore[arg-type]
    except TypeError:
        return None


def parts_of(selection: Selection, shape: Shape, itemsize: int) -> Iterator[Part]:
    """The boxes to read so that all of a selection is there; one, if no step is larger than 1.

    Between elements that are far apart nothing is read. Elements that are close are read with what is between them, a
    bounded amount at once.

    Args:
        selection: What is wanted.
        shape: Shape of the tensor.
        itemsize: Bytes per element.
    """
    extents = selection.extents
    if 0 in extents:
        return
    steps = [taken.step if len(taken) > 1 else 1 for taken in selection.ranges]
    apart = {
        axis for axis, step in enumerate(steps) if (step - 1) * math.prod(shape[axis + 1 :]) * itemsize >= _GAP_NBYTES
    }
    close = math.prod(step for axis, step in enumerate(steps) if axis not in apart)
    max_numel = max(1, _AT_ONCE_NBYTES // (close * itemsize)) if close > 1 else math.prod(extents)
    for rows in _rows_apart(extents, apart):
        for taken in cut(rows, max_numel):
            yield _part(selection.ranges, steps, taken)


def _rows_apart(extents: Shape, apart: set[int]) -> Iterator[Box]:
    """A box cut into single rows along some dimensions."""
    starts = (range(extent) if axis in apart else (0,) for axis, extent in enumerate(extents))
    shape = tuple(1 if axis in apart else extent for axis, extent in enumerate(extents))
    return (Box(start, shape) for start in itertools.product(*starts))


def _part(ranges: Sequence[range], steps: Sequence[int], taken: Box) -> Part:
    offset = tuple(found[start] for found, start in zip(ranges, taken.offset, strict=True))
    shape = tuple((extent - 1) * step + 1 for extent, step in zip(taken.shape, steps, strict=True))
    return Part(Box(offset, shape), tuple(steps), taken)
