"""What the placements of a mesh leave to one rank: intervals of each dimension, and the boxes that they make.

Follows from the definition of torch's placements alone: each mesh dimension cuts what the ones before it left, as
`torch.chunk` does. A rank's elements along a dimension need not be neighbours then.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from distckpt.layout.box import Box, Shape


class Cut(NamedTuple):
    """How one mesh dimension cuts a tensor dimension.

    Attributes:
        n_parts: Ranks along the mesh dimension.
        part: Which of them this rank is.
        split: First cut into so many chunks, then each chunk among the ranks (`_StridedShard.split_factor`).
    """

    n_parts: int
    part: int
    split: int = 1


class Interval(NamedTuple):
    """Elements along one dimension, from `start` to `stop` (exclusive)."""

    start: int
    stop: int


def left_over(size: int, cuts: Sequence[Cut]) -> list[Interval]:
    """The elements of a dimension that some cuts, made one after the other, leave to a rank: disjoint, in the order in
    which the rank keeps them; neighbours are joined.

    Args:
        size: Elements along the dimension.
        cuts: In order of the mesh dimensions.
    """
    left = [Interval(0, size)]
    for cut in cuts:
        chunks = [_chunk(left, cut.split, i) for i in range(cut.split)]
        left = _join(interval for chunk in chunks for interval in _chunk(chunk, cut.n_parts, cut.part))
    return [interval for interval in left if interval.start < interval.stop]


def inner_first(cuts: Sequence[Cut]) -> list[Cut] | None:
    """The cuts in the order in which they were made, if their splits say no more than that order; else None.

    FSDP over tensor parallelism cuts the tensor for the inner mesh dimension first, but has to state its placements
    from the outer one inwards: the split then equals the number of all inner shards. What FSDP holds is the cut made in
    the real order, which is another one where sizes do not divide.
    """
    order: list[Cut] = []
    inner = 1
    for cut in reversed(cuts):
        if cut.split not in (1, inner):
            return None
        order = [*order, cut._replace(split=1)] if cut.split == inner else [cut, *order]
        inner *= cut.n_parts
    return order


def _chunk(intervals: Sequence[Interval], count: int, index: int) -> list[Interval]:
    """One of the chunks that `torch.chunk` makes of joined intervals; empty where there are fewer chunks."""
    total = sum(interval.stop - interval.start for interval in intervals)
    step = -(-total // count)
    return list(_clip(intervals, step * index, step * (index + 1)))


def _clip(intervals: Sequence[Interval], start: int, stop: int) -> Iterator[Interval]:
    """The elements from number `start` to number `stop` of joined intervals."""
    passed = 0
    for first, last in intervals:
        low, high = max(first, first + start - passed), min(last, first + stop - passed)
        if low < high:
            yield Interval(low, high)
        passed += last - first


def _join(intervals: Iterator[Interval]) -> list[Interval]:
    joined: list[Interval] = []
    for interval in intervals:
        if joined and joined[-1].stop == interval.start:
            joined[-1] = Interval(joined[-1].start, interval.stop)
        else:
            joined.append(interval)
    return joined


def boxes_of(intervals: Sequence[Sequence[Interval]]) -> tuple[Box, ...]:
    """All combinations of the intervals of each dimension, as boxes in row-major order; at least one, maybe empty."""
    if not all(intervals):
        return (Box((0,) * len(intervals), local_shape(intervals)),)
    combinations = itertools.product(*intervals)
    return tuple(Box(tuple(a for a, _ in cell), tuple(b - a for a, b in cell)) for cell in combinations)


def joined(boxes: Sequence[Box]) -> list[Box]:
    """Where each of the boxes of `boxes_of` lies in the rank's own tensor."""
    ndim = len(boxes[0].offset)
    places: list[dict[int, int]] = []
    for axis in range(ndim):
        extents = {box.offset[axis]: box.shape[axis] for box in boxes}
        starts = itertools.accumulate(extents.values(), initial=0)
        places.append(dict(zip(extents, starts, strict=False)))
    return [Box(tuple(places[axis][box.offset[axis]] for axis in range(ndim)), box.shape) for box in boxes]


def local_shape(intervals: Sequence[Sequence[Interval]]) -> Shape:
    """Shape of what a rank holds of a tensor."""
    return tuple(sum(stop - start for start, stop in along) for along in intervals)


def max_flat_boxes(ndim: int) -> int:
    """How many boxes a range of elements of a tensor can need, see `layout.box.flat_boxes`."""
    return max(1, 2 * ndim - 1)
