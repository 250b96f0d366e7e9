"""Indices as boxes to read, against NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.layout import slicing
from distckpt.layout.box import Box, Shape
from distckpt.layout.slicing import parts_of, select


@st.composite
def indices(draw: st.DrawFn, shape: Shape) -> Any:
    """An index of ints, slices and perhaps an ellipsis, as NumPy takes it."""
    items = [draw(index_items(size)) for size in shape[: draw(st.integers(0, len(shape)))]]
    if draw(st.booleans()):
        trailing = len(shape) - len(items)
        # The items behind the ellipsis index the last dimensions.
        behind = [draw(index_items(size)) for size in shape[len(shape) - draw(st.integers(0, trailing)) :]]
        items += [..., *behind]
    return items[0] if len(items) == 1 and draw(st.booleans()) else tuple(items)


def index_items(size: int) -> st.SearchStrategy[int | slice]:
    bounds = st.none() | st.integers(-size - 2, size + 2)
    slices = st.builds(slice, bounds, bounds, st.none() | st.integers(1, size + 2))
    return slices | st.integers(-size, size - 1) if size else slices


shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
cases = shapes.flatmap(lambda shape: st.tuples(st.just(shape), indices(shape)))


def part_of(array: np.ndarray, box: Box) -> np.ndarray:
    return array[(..., *(slice(start, start + extent) for start, extent in zip(*box, strict=True)))]


@pytest.mark.parametrize("gap_nbytes", [1, 17, 4096], ids=["all apart", "some apart", "all close"])
@pytest.mark.parametrize("at_once_nbytes", [1, 60, 8 << 20])
def test_a_selection_is_what_numpy_takes(gap_nbytes: int, at_once_nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slicing, "_GAP_NBYTES", gap_nbytes)
    monkeypatch.setattr(slicing, "_AT_ONCE_NBYTES", at_once_nbytes)

    @given(cases)
    def check(case: tuple[Shape, Any]) -> None:
        shape, index = case
        array = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
        selection = select(index, shape)
        out = np.full(selection.extents, -1)
        for part in parts_of(selection, shape, itemsize=8):
            assert part.box.within(shape)
            target = part_of(out, part.taken)
            assert (target == -1).all(), "read twice"
            target[...] = part_of(array, part.box)[tuple(slice(None, None, step) for step in part.steps)]
        np.testing.assert_array_equal(out.reshape(selection.shape), array[index])

    check()


def test_without_steps_there_is_one_box() -> None:
    parts = list(parts_of(select((slice(1, 5), 3), (10, 1 << 20)), (10, 1 << 20), itemsize=8))
    assert [part.box for part in parts] == [Box((1, 3), (4, 1))]


def test_between_rows_that_are_far_apart_nothing_is_read() -> None:
    shape = (100, 1024)
    parts = list(parts_of(select((slice(None, None, 25),), shape), shape, itemsize=4))
    assert [part.box for part in parts] == [Box((row, 0), (1, 1024)) for row in (0, 25, 50, 75)]


def test_what_is_read_and_left_out_is_bounded() -> None:
    shape = (100 << 20,)
    parts = list(parts_of(select(slice(None, None, 3), shape), shape, itemsize=4))
    assert max(part.box.numel * 4 for part in parts) <= 8 << 20
    assert len(parts) < 100


@pytest.mark.parametrize(
    ("index", "error", "text"),
    [
        (None, TypeError, "Got None"),
        ((0, None), TypeError, "Got None"),
        (True, TypeError, "Got bool"),
        (1.0, TypeError, "Got float"),
        ([0, 1], TypeError, "Got list"),
        (np.zeros(4, bool), TypeError, "Got ndarray"),
        ("a", TypeError, "Got str"),
        (slice(0, 1.5), TypeError, "slice indices"),
        (4, IndexError, "index 4 is out of bounds for dimension 0 of size 4"),
        ((0, -6), IndexError, "index -6 is out of bounds for dimension 1 of size 5"),
        ((0, 0, 0), IndexError, "too many indices: expected at most 2"),
        ((0, 0, 0, ...), IndexError, "too many indices"),
        ((..., ...), IndexError, "only one ellipsis"),
        (slice(None, None, -1), ValueError, "step > 0"),
        (slice(None, None, 0), ValueError, "zero"),
    ],
)
def test_other_indices_are_refused(index: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        select(index, (4, 5))


@pytest.mark.parametrize("number", [np.int32(2), np.array(2)])
def test_whatever_is_an_int_is_an_index(number: Any) -> None:
    assert select(number, (4, 5)) == select(2, (4, 5))
