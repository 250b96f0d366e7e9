"""Tilings: check that boxes tile a shape (no overlap, no gap), and find the variables that are tiled alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from distckpt.layout.box import Box, Shape
from distckpt.layout.records import Shard, Variable

_FEW_BOXES = 4
_MAX_CELLS = 1 << 20

_Ints = npt.NDArray[np.int64]


class Pair(NamedTuple):
    """Indices of two boxes that have elements in common."""

    first: int
    second: int


class Gap(NamedTuple):
    """The elements of a shape that are in none of some disjoint boxes.

    Attributes:
        numel: Number of missing elements.
        first: A box of missing elements that has the first of them; None if the boxes are too irregular to find it.
    """

    numel: int
    first: Box | None


def find_overlap(boxes: Sequence[Box]) -> Pair | None:
    """Find two boxes that overlap; None if there are none.

    Fast if the boxes form a grid, regular or not; else nearly linear in time as long as few boxes share a stretch of
    the axis along which they differ most.

    Args:
        boxes: Boxes with elements, all with the same number of dimensions.
    """
    if len(boxes) <= _FEW_BOXES:
        pairs = combinations(range(len(boxes)), 2)
        return next((Pair(i, j) for i, j in pairs if boxes[i].intersect(boxes[j])), None)
    starts = np.array([box.offset for box in boxes], np.int64).reshape(len(boxes), -1)
    stops = starts + np.array([box.shape for box in boxes], np.int64).reshape(len(boxes), -1)
    if _is_grid(starts, stops) and len(set(boxes)) == len(boxes):
        return None
    return _sweep(starts, stops)


def _is_grid(starts: _Ints, stops: _Ints) -> bool:
    """Whether any two boxes have, along each axis, either the same interval or disjoint ones.

    Two different boxes then have disjoint intervals along some axis, so they are disjoint.
    """
    for axis in range(starts.shape[1]):
        order = np.argsort(starts[:, axis], kind="stable")
        start, stop = starts[order, axis], stops[order, axis]
        same = (start[1:] == start[:-1]) & (stop[1:] == stop[:-1])
        if not np.all(same | (start[1:] >= stop[:-1])):
            return False
    return True


def _sweep(starts: _Ints, stops: _Ints) -> Pair | None:
    """Compare each box with those before it that reach its start, along the axis with the most different starts."""
    count, ndim = starts.shape
    axis = max(range(ndim), key=lambda axis: len(np.unique(starts[:, axis])), default=0)
    if ndim == 0:
        return Pair(0, 1)
    order = np.argsort(starts[:, axis], kind="stable")
    starts, stops = starts[order], stops[order]
    reach = np.maximum.accumulate(stops[:, axis])
    first = np.searchsorted(reach, starts[:, axis], side="right")
    for i in range(1, count):
        earlier = slice(first[i], i)
        common = np.all((starts[earlier] < stops[i]) & (stops[earlier] > starts[i]), axis=1)
        if common.any():
            other = first[i] + int(common.argmax())
            return Pair(*sorted((int(order[other]), int(order[i]))))
    return None


def find_gap(boxes: Sequence[Box], shape: Shape) -> Gap | None:
    """The elements of `shape` that are in none of the boxes; None if the boxes fill it.

    Args:
        boxes: Disjoint boxes with elements, inside `shape`.
        shape: Global shape.
    """
    missing = math.prod(shape) - sum(box.numel for box in boxes)
    return Gap(missing, _first_gap(boxes, shape)) if missing else None


def _first_gap(boxes: Sequence[Box], shape: Shape) -> Box | None:
    """The first empty cell of the grid formed by the bounds of the boxes; None if the grid has too many cells."""
    starts = np.array([box.offset for box in boxes], np.int64).reshape(len(boxes), len(shape))
    stops = starts + np.array([box.shape for box in boxes], np.int64).reshape(len(boxes), len(shape))
    bounds = [
        np.unique(np.concatenate((starts[:, axis], stops[:, axis], [0, size]))) for axis, size in enumerate(shape)
    ]
    cells = [len(bound) - 1 for bound in bounds]
    if math.prod(cells) > _MAX_CELLS:
        return None
    filled = np.zeros(cells, bool)
    first = [np.searchsorted(bound, starts[:, axis]) for axis, bound in enumerate(bounds)]
    last = [np.searchsorted(bound, stops[:, axis]) for axis, bound in enumerate(bounds)]
    for i in range(len(boxes)):
        filled[tuple(slice(a[i], b[i]) for a, b in zip(first, last, strict=True))] = True
    cell = np.unravel_index(int(filled.argmin()), filled.shape)
    offset = tuple(int(bound[i]) for bound, i in zip(bounds, cell, strict=True))
    stop = tuple(int(bound[i + 1]) for bound, i in zip(bounds, cell, strict=True))
    return Box(offset, tuple(b - a for a, b in zip(offset, stop, strict=True)))


# ---- variables that are tiled alike ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tilings:
    """The different tilings of some variables. A model has thousands of variables, and a few tilings.

    Attributes:
        distinct: The different lists of shards, in order of the first variable that has each.
        which: For each variable: index of its tiling.
    """

    distinct: list[list[Shard]]
    which: list[int]


def tilings_of(variables: Sequence[Variable]) -> Tilings:
    """Find the variables that are tiled alike. Fast if they share one list, as in a decoded manifest."""
    distinct: list[list[Shard]] = []
    by_value: dict[tuple[Shard, ...], int] = {}
    by_identity: dict[int, int] = {}
    which = []
    for variable in variables:
        index = by_identity.get(id(variable.shards))
        if index is None:
            index = by_identity[id(variable.shards)] = by_value.setdefault(tuple(variable.shards), len(distinct))
            if index == len(distinct):
                distinct.append(variable.shards)
        which.append(index)
    return Tilings(distinct, which)
