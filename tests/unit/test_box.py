"""Boxes against NumPy: every operation is compared with the set of elements it stands for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distckpt.layout import box as box_module
from distckpt.layout.box import (
    MAX_PIECE_NBYTES,
    Box,
    Shape,
    cut,
    cut_count,
    elements_before,
    flat_boxes,
    piece_count,
    pieces,
    row_major_strides,
    runs,
)

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
solid_shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: Shape, *, min_extent: int = 0) -> Box:
    offset, extents = [], []
    for size in shape:
        start = draw(st.integers(0, max(0, size - min_extent)))
        offset.append(start)
        extents.append(draw(st.integers(min(min_extent, size - start), size - start)))
    return Box(tuple(offset), tuple(extents))


@st.composite
def shape_and_boxes(draw: st.DrawFn, count: int) -> tuple[Shape, list[Box]]:
    shape = draw(shapes)
    return shape, [draw(boxes_in(shape)) for _ in range(count)]


@st.composite
def shape_and_solid_box(draw: st.DrawFn) -> tuple[Shape, Box]:
    shape = draw(solid_shapes)
    return shape, draw(boxes_in(shape, min_extent=1))


def mask(shape: Shape, *boxes: Box) -> np.ndarray:
    """How often each element of a tensor of `shape` is in the boxes."""
    counts = np.zeros(shape, int)
    for box in boxes:
        counts[tuple(slice(start, start + extent) for start, extent in zip(*box, strict=True))] += 1
    return counts


def flat(shape: Shape, box: Box) -> np.ndarray:
    """Row-major indices of the elements of a box, in its own row-major order."""
    indices = np.arange(math.prod(shape)).reshape(shape)
    return indices[tuple(slice(start, start + extent) for start, extent in zip(*box, strict=True))].ravel()


@given(shape_and_solid_box())
def test_elements_before_a_position(case: tuple[Shape, Box]) -> None:
    shape, box = case
    found = [elements_before(box, shape, position) for position in range(math.prod(shape) + 1)]
    assert found == np.searchsorted(flat(shape, box), np.arange(math.prod(shape) + 1)).tolist()


@given(solid_shapes)
def test_row_major_strides(shape: Shape) -> None:
    assert row_major_strides(shape) == tuple(stride // 8 for stride in np.empty(shape, np.int64).strides)


@given(shape_and_boxes(2))
def test_intersect_is_the_common_elements(case: tuple[Shape, list[Box]]) -> None:
    shape, (a, b) = case
    common = a.intersect(b)
    expected = mask(shape, a) * mask(shape, b)
    assert np.array_equal(mask(shape, common) if common else np.zeros(shape, int), expected)
    assert common == b.intersect(a)
    assert common is None or common.numel == expected.sum() > 0


@given(shape_and_boxes(2))
def test_overlap_is_the_intersection_as_indices(case: tuple[Shape, list[Box]]) -> None:
    shape, (a, b) = case
    numbers = np.arange(math.prod(shape)).reshape(shape)
    of_a, of_b = (numbers[(*(slice(i, i + n) for i, n in zip(*box, strict=True)), ...)] for box in (a, b))
    overlap, common = a.overlap(b), a.intersect(b)
    if overlap is None or common is None:
        assert overlap is common is None
    else:
        assert np.array_equal(of_a[overlap.own], of_b[overlap.others])
        assert of_a[overlap.own].shape == common.shape


@given(shape_and_boxes(2))
def test_contains_means_no_element_is_left_out(case: tuple[Shape, list[Box]]) -> None:
    shape, (a, b) = case
    if b.numel:
        assert a.contains(b) == bool(np.all(mask(shape, a) >= mask(shape, b)))


@given(shape_and_boxes(1))
def test_boxes_made_inside_are_within(case: tuple[Shape, list[Box]]) -> None:
    shape, (box,) = case
    assert box.within(shape)
    assert Box.whole(shape).contains(box)
    assert box.numel == mask(shape, box).sum()


@pytest.mark.parametrize(
    ("box", "shape"),
    [
        (Box((0,), (4,)), (3,)),
        (Box((2,), (2,)), (3,)),
        (Box((-1,), (2,)), (3,)),
        (Box((0,), (-1,)), (3,)),
        (Box((0, 0), (1, 1)), (3,)),
        (Box((0,), (1, 1)), (3, 3)),
        (Box((4,), (0,)), (3,)),
    ],
)
def test_not_within(box: Box, shape: Shape) -> None:
    assert not box.within(shape)


def test_a_scalar_is_one_element() -> None:
    scalar = Box.whole(())
    assert scalar.numel == 1
    assert scalar.within(())
    assert scalar.intersect(scalar) == scalar
    assert pieces(scalar, 8) == [scalar]
    assert runs(scalar, ()) == ([0], 1)


@given(shape_and_solid_box())
def test_relative_to_moves_the_origin(case: tuple[Shape, Box]) -> None:
    shape, outer = case
    inner = Box(outer.offset, tuple(1 for _ in shape))
    assert inner.relative_to(outer) == Box((0,) * len(shape), inner.shape)
    assert outer.relative_to(Box.whole(shape)) == outer


@given(shape_and_boxes(1), st.integers(1, 40))
def test_cut_tiles_the_box_in_order(case: tuple[Shape, list[Box]], max_numel: int) -> None:
    shape, (box,) = case
    parts = list(cut(box, max_numel))
    assert all(0 < part.numel <= max_numel for part in parts)
    elements = [flat(shape, part) for part in parts]
    assert np.array_equal(np.concatenate([np.zeros(0, int), *elements]), flat(shape, box))
    assert len(parts) == cut_count(box.shape, max_numel)


@given(shape_and_solid_box(), st.integers(1, 40))
def test_parts_of_a_contiguous_box_are_contiguous(case: tuple[Shape, Box], max_numel: int) -> None:
    shape, box = case
    if len(runs(box, shape).starts) == 1:
        assert all(len(runs(part, shape).starts) == 1 for part in cut(box, max_numel))


@given(shape_and_boxes(1), st.integers(-3, 700), st.integers(-3, 700))
def test_flat_boxes_are_the_range_in_order(case: tuple[Shape, list[Box]], start: int, stop: int) -> None:
    shape, (box,) = case
    parts = flat_boxes(box, start, stop)
    assert all(part.numel for part in parts)
    assert len(parts) <= max(1, 2 * len(shape) - 1)
    elements = [flat(shape, part) for part in parts]
    assert np.array_equal(np.concatenate([np.zeros(0, int), *elements]), flat(shape, box)[max(start, 0) : max(stop, 0)])


@given(shape_and_solid_box())
@example(((3, 4, 2), Box((1, 0, 0), (2, 4, 2))))
@example(((3, 4, 2), Box((1, 2, 0), (2, 2, 2))))
@example(((3, 4, 2), Box((1, 2, 1), (2, 2, 1))))
def test_runs_are_maximal_and_cover_the_box(case: tuple[Shape, Box]) -> None:
    shape, box = case
    found = runs(box, shape)
    elements = [np.arange(start, start + found.numel) for start in found.starts]
    expected = flat(shape, box)
    assert np.array_equal(np.concatenate(elements), expected)
    assert len(found.starts) == 1 + np.count_nonzero(np.diff(expected) != 1)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1 << 21,), ((1 << 21) + 1,), (3, 1_000_003), (5000, 7, 1111)])
@pytest.mark.parametrize("itemsize", [1, 4, 16])
def test_pieces_are_counted_and_small(shape: Shape, itemsize: int) -> None:
    parts = pieces(Box.whole(shape), itemsize)
    assert len(parts) == piece_count(shape, itemsize)
    assert sum(part.numel for part in parts) == math.prod(shape)
    assert all(part.numel * itemsize <= MAX_PIECE_NBYTES for part in parts)


def test_eight_mebibytes_are_one_piece() -> None:
    assert piece_count((1024, 2048), 4) == 1
    assert piece_count((1024, 2049), 4) == 2


def test_the_number_of_pieces_follows_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert piece_count((4, 3, 2), 4) == 1
    with monkeypatch.context() as patched:
        patched.setattr(box_module, "MAX_PIECE_NBYTES", 16 * 4)
        assert piece_count((4, 3, 2), 4) == len(pieces(Box.whole((4, 3, 2)), 4)) == 2
    assert piece_count((4, 3, 2), 4) == 1
