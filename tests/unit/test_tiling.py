"""Whether boxes tile a shape, against counting elements with NumPy."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.layout.box import Box, Shape
from distckpt.layout.tiling import find_gap, find_overlap


def counts(shape: Shape, boxes: list[Box]) -> np.ndarray:
    found = np.zeros(shape, int)
    for box in boxes:
        found[tuple(slice(start, start + extent) for start, extent in zip(*box, strict=True))] += 1
    return found


@st.composite
def tilings(draw: st.DrawFn) -> tuple[Shape, list[Box]]:
    """A tiling made by cutting boxes in two, again and again: regular grids are rare among them."""
    shape = tuple(draw(st.lists(st.integers(1, 8), min_size=1, max_size=3)))
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 12))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.shape[axis]))
        first = Box(box.offset, (*box.shape[:axis], at, *box.shape[axis + 1 :]))
        offset = (*box.offset[:axis], box.offset[axis] + at, *box.offset[axis + 1 :])
        second = Box(offset, (*box.shape[:axis], box.shape[axis] - at, *box.shape[axis + 1 :]))
        boxes += [half for half in (first, second) if half.numel]
    return shape, draw(st.permutations(boxes))


@st.composite
def any_boxes(draw: st.DrawFn) -> tuple[Shape, list[Box]]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    boxes = []
    for _ in range(draw(st.integers(0, 9))):
        offset = tuple(draw(st.integers(0, size - 1)) for size in shape)
        boxes.append(Box(offset, tuple(draw(st.integers(1, n - a)) for a, n in zip(offset, shape, strict=True))))
    return shape, boxes


@given(tilings())
def test_a_tiling_has_neither_overlap_nor_gap(case: tuple[Shape, list[Box]]) -> None:
    shape, boxes = case
    assert find_overlap(boxes) is None
    assert find_gap(boxes, shape) is None


@given(any_boxes())
def test_overlaps_are_found_and_real(case: tuple[Shape, list[Box]]) -> None:
    shape, boxes = case
    pair = find_overlap(boxes)
    assert (pair is not None) == bool(np.any(counts(shape, boxes) > 1))
    if pair:
        assert pair.first != pair.second
        assert boxes[pair.first].intersect(boxes[pair.second])


@given(tilings(), st.data())
def test_gaps_are_counted_and_located(case: tuple[Shape, list[Box]], data: st.DataObject) -> None:
    shape, boxes = case
    kept = data.draw(st.lists(st.sampled_from(boxes), unique=True))
    missing = counts(shape, kept) == 0
    gap = find_gap(kept, shape)
    assert (gap.numel if gap else 0) == missing.sum()
    if gap:
        assert gap.first is not None
        assert gap.first.offset == tuple(int(i) for i in np.argwhere(missing)[0])
        assert np.all(counts(shape, [gap.first])[~missing] == 0)


def test_scalars_and_empty_shapes() -> None:
    scalar = Box.whole(())
    assert find_gap([scalar], ()) is None
    assert find_gap([], ()) == (1, scalar)
    assert find_gap([], (3, 0)) is None
    assert find_overlap([scalar] * 2) == (0, 1)
    assert find_overlap([scalar] * 9) is not None


@pytest.mark.parametrize(
    "mesh", [(16384, 1), (1, 16384), (128, 128)], ids=["rows of 16,384 ranks", "columns", "128 x 128"]
)
def test_grids_of_many_ranks_take_no_quadratic_time(mesh: tuple[int, int]) -> None:
    rows, columns = mesh
    boxes = [Box((3 * i, 5 * j), (3, 5)) for i in range(rows) for j in range(columns)]
    started = time.process_time()
    assert find_overlap(boxes) is None
    assert find_gap(boxes, (3 * rows, 5 * columns)) is None
    assert find_gap(boxes[:-1], (3 * rows, 5 * columns)) == (15, boxes[-1])
    assert time.process_time() - started < 2


def test_irregular_tilings_of_many_ranks_take_no_quadratic_time() -> None:
    numel, ranks = 3 * 1_000_003, 4096
    bounds = [numel * i // ranks for i in range(ranks + 1)]
    row = 1_000_003
    cuts = sorted({*bounds, *range(0, numel + 1, row)})
    boxes = [Box((a // row, a % row), (1, b - a)) for a, b in pairwise(cuts)]
    started = time.process_time()
    assert find_overlap(boxes) is None
    assert find_overlap([*boxes, Box((1, 500), (1, 1))]) is not None
    assert time.process_time() - started < 2


def test_the_place_of_a_gap_is_left_out_where_it_would_cost_too_much() -> None:
    """Boxes along a diagonal: the grid of their bounds has as many cells as there are pairs of them."""
    diagonal = [Box((2 * i, 2 * i), (1, 1)) for i in range(2000)]
    gap = find_gap(diagonal, (4000, 4000))
    assert gap == (math.prod((4000, 4000)) - 2000, None)
