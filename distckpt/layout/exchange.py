"""The exchange: variables that ranks read or write together, as ranges of the file.

Several ranks may want the same bytes of a file (replicas), or narrow strips that lie between those of other ranks
(columns). Such variables are cut into ranges that are contiguous in the file. In each round every rank moves one unit
of ranges between the file and shared memory of its node. Each rank copies the elements that it wants from the units of
all ranks, or copies the elements that it holds into them. So each byte is read once, and file accesses are long. The
parts of a unit that ranks of another node want are sent to them (see `layout.parcels`).

This is two-phase I/O (R. Thakur, W. Gropp, E. Lusk: Data Sieving and Collective I/O in ROMIO, Frontiers '99) with
shared memory in place of messages between the ranks of a node.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distckpt.layout.box import Box, Shape, is_contiguous, pieces, run_axis
from distckpt.layout.dtypes import dtype_info
from distckpt.layout.records import Variable
from distckpt.layout.tiling import find_overlap

#: Runs shorter than this are exchanged if other ranks hold the elements between them. In bytes.
NARROW_NBYTES = 64 << 10

_Ints = npt.NDArray[np.int64]


class Span(NamedTuple):
    """Elements `start` to `stop` (exclusive) of a tensor in row-major order: one range of bytes in the file."""

    start: int
    stop: int


class Range(NamedTuple):
    """A span of a variable, and its place in the memory of the mover that moves it.

    Attributes:
        variable: Index of the variable.
        span: The elements.
        place: Position of the first byte in that memory; a multiple of the element size.
    """

    variable: int
    span: Span
    place: int


class InFile(NamedTuple):
    """A variable whose bytes are exchanged.

    Attributes:
        key: Checkpoint key.
        offset: Position of its dataset in the file, in bytes.
        shape: Global shape.
        itemsize: Bytes per element.
    """

    key: str
    offset: int
    shape: Shape
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Size of its dataset in bytes."""
        return math.prod(self.shape) * self.itemsize


class PieceSpan(NamedTuple):
    """A piece and its hull, in which elements of other pieces may lie.

    Attributes:
        span: The hull: from the first element to just past the last, in row-major order.
        box: The piece.
        checksum: Index of its checksum.
    """

    span: Span
    box: Box
    checksum: int


#: The ranges that one mover moves in one round.
Unit = list[Range]


# ---- choice of variables to exchange -----------------------------------------------------------------------------


@lru_cache(maxsize=1 << 14)  # models repeat few shapes
def hull(box: Box, shape: Shape) -> Span:
    """The smallest span that contains a box; (0, 0) for an empty box."""
    first = last = 0
    for size, offset, extent in zip(shape, box.offset, box.shape, strict=True):
        if extent == 0:
            return Span(0, 0)
        first = first * size + offset
        last = last * size + offset + extent - 1
    return Span(first, last + 1)


def hulls_that_meet(hulls: _Ints) -> list[int]:
    """Indices of the variables for which the hulls of at least two ranks overlap.

    Args:
        hulls: For each rank and variable, (start, stop) of the elements that it holds; shape (ranks, variables, 2).
    """
    order = np.argsort(hulls[:, :, 0], axis=0, kind="stable")
    starts = np.take_along_axis(hulls[:, :, 0], order, axis=0)
    stops = np.take_along_axis(hulls[:, :, 1], order, axis=0)
    reached = np.maximum.accumulate(stops, axis=0)
    meets = (starts[1:] < reached[:-1]) & (stops[1:] > starts[1:])
    found: list[int] = np.flatnonzero(meets.any(axis=0)).tolist()
    return found


def is_worth_exchanging(boxes: Sequence[Box], shape: Shape, itemsize: int) -> bool:
    """Whether some of the boxes overlap, or one of them is narrow. Each box must have elements."""
    return any(is_narrow(box, shape, itemsize) for box in boxes) or find_overlap(boxes) is not None


def is_narrow(box: Box, shape: Shape, itemsize: int) -> bool:
    """Whether a non-empty box consists of several runs in the file, each shorter than `NARROW_NBYTES`."""
    return not is_contiguous(box, shape) and math.prod(box.shape[run_axis(box, shape) :]) * itemsize < NARROW_NBYTES


# ---- as ranges of the file ---------------------------------------------------------------------------------------


def piece_spans(variable: Variable, firsts: Iterable[int]) -> list[PieceSpan]:
    """The pieces of a stored variable, sorted by their first element.

    Args:
        variable: The variable.
        firsts: Its `ChecksumIndex.firsts`.
    """
    itemsize = dtype_info(variable.dtype).itemsize
    return sorted(
        PieceSpan(hull(piece, variable.shape), piece, first + number)
        for shard, first in zip(variable.shards, firsts, strict=True)
        for number, piece in enumerate(pieces(Box(shard.offset, shard.shape), itemsize))
    )


def bands(spans: Sequence[Span]) -> list[Span]:
    """Join spans that overlap; a rank that reads a whole band has read its pieces whole. `spans` must be sorted."""
    joined: list[Span] = []
    for span in spans:
        if joined and span.start < joined[-1].stop:
            joined[-1] = Span(joined[-1].start, max(joined[-1].stop, span.stop))
        else:
            joined.append(span)
    return joined


def filled_bands(boxes: Sequence[Box], shape: Shape) -> list[Span]:
    """The bands that disjoint boxes fill without a hole, so that one rank can write each as one range of the file."""
    spans = sorted((hull(box, shape), box.numel) for box in boxes)
    joined = bands([span for span, _ in spans])
    starts = [band.start for band in joined]
    held = [0] * len(joined)
    for span, numel in spans:
        held[bisect.bisect_right(starts, span.start) - 1] += numel
    return [band for band, numel in zip(joined, held, strict=True) if numel == band.stop - band.start]


def cut_at_multiples(spans: Iterable[Span], file: InFile, nbytes: int) -> list[Span]:
    """Cut spans at the multiples of `nbytes` in the file.

    Ranks that write such parts share no page, write none twice, and let the page cache use its largest pages. An
    element in which a multiple lies becomes a span of its own.
    """
    parts = []
    for start, stop in spans:
        while start < stop:
            left = nbytes - (file.offset + start * file.itemsize) % nbytes
            end = min(start + max(left // file.itemsize, 1), stop)
            parts.append(Span(start, end))
            start = end
    return parts


def strided_pieces_within(pieces: Iterable[PieceSpan], boxes: Iterable[Box]) -> dict[PieceSpan, Box]:
    """Map each piece that is not contiguous in the file, and lies within one of the boxes, to that box.

    Only boxes with the piece's extent in all dimensions but the first are considered, which makes the search fast among
    the boxes of thousands of ranks.
    """
    strided = [piece for piece in pieces if piece.span.stop - piece.span.start != piece.box.numel]
    of_width: dict[tuple[Shape, Shape], list[Box]] = {}
    for box in boxes if strided else ():
        of_width.setdefault(_width(box), []).append(box)
    found: dict[PieceSpan, Box] = {}
    for piece in strided:
        start = piece.box.offset[0]
        stop = start + piece.box.shape[0]
        for box in of_width.get(_width(piece.box), ()):
            if box.offset[0] <= start and stop <= box.offset[0] + box.shape[0]:
                found[piece] = box
                break
    return found


def _width(box: Box) -> tuple[Shape, Shape]:
    """Offset and shape of a box without the first dimension."""
    return box.offset[1:], box.shape[1:]
