"""What placements leave to a rank, against torch's own functions, which cut a real tensor."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from distckpt.layout.box import Box
from distckpt.layout.placement import (
    Cut,
    Interval,
    boxes_of,
    inner_first,
    joined,
    left_over,
    local_shape,
    max_flat_boxes,
)


def elements(intervals: list[Interval]) -> list[int]:
    return [i for start, stop in intervals for i in range(start, stop)]


def placement_of(cut: Cut) -> Shard:
    return Shard(0) if cut.split == 1 else _StridedShard(0, split_factor=cut.split)


def cut_by_torch(size: int, cuts: list[Cut]) -> list[int]:
    left = torch.arange(size)
    for cut in cuts:
        parts, _ = placement_of(cut)._split_tensor(left, cut.n_parts, with_padding=False)
        left = parts[cut.part]
    return left.tolist()


@st.composite
def cuts(draw: st.DrawFn) -> list[Cut]:
    made = []
    for _ in range(draw(st.integers(0, 3))):
        n_parts = draw(st.integers(1, 4))
        made.append(Cut(n_parts, draw(st.integers(0, n_parts - 1)), draw(st.integers(1, 4))))
    return made


@given(st.integers(0, 40), cuts())
def test_a_rank_keeps_the_elements_that_torch_gives_it(size: int, made: list[Cut]) -> None:
    intervals = left_over(size, made)
    assert elements(intervals) == cut_by_torch(size, made)
    assert all(a.stop != b.start for a, b in itertools.pairwise(intervals))


@given(st.integers(1, 40), cuts())
def test_size_and_start_are_those_of_torch(size: int, made: list[Cut]) -> None:
    placements = [placement_of(cut) for cut in made]
    mesh, coordinate = [cut.n_parts for cut in made], [cut.part for cut in made]
    shape, offset = _compute_local_shape_and_global_offset((size,), mesh, coordinate, placements)
    intervals = left_over(size, made)
    assert local_shape([intervals]) == shape
    if intervals:
        assert (intervals[0].start,) == offset


@pytest.mark.parametrize("size", range(1, 30))
@pytest.mark.parametrize("mesh", [(2, 2), (4, 2), (2, 3), (2, 2, 2), (3, 1, 2)], ids=str)
def test_fsdp_over_tensor_parallelism_is_cut_from_the_inner_dimension_outwards(
    size: int, mesh: tuple[int, ...]
) -> None:
    seen: list[int] = []
    for coordinate in itertools.product(*map(range, mesh)):
        splits = [math.prod(mesh[i + 1 :]) for i in range(len(mesh))]
        made = [Cut(n, part, split) for n, part, split in zip(mesh, coordinate, splits, strict=True)]
        order = inner_first(made)
        assert order == [Cut(n, part) for n, part in reversed(list(zip(mesh, coordinate, strict=True)))]
        held = torch.arange(size)  # as FSDP makes it: chunk what tensor parallelism left
        for cut in order:
            held = next(iter(torch.chunk(held, cut.n_parts)[cut.part : cut.part + 1]), held[:0])
        assert elements(left_over(size, order)) == held.tolist()
        assert len(left_over(size, order)) <= 1
        seen += held.tolist()
    assert sorted(seen) == list(range(size))


@pytest.mark.parametrize(
    ("made", "order"),
    [
        ([], []),
        ([Cut(2, 1), Cut(3, 0)], [Cut(2, 1), Cut(3, 0)]),
        ([Cut(2, 1, 3), Cut(3, 0)], [Cut(3, 0), Cut(2, 1)]),
        ([Cut(5, 4), Cut(2, 1, 3), Cut(3, 0)], [Cut(5, 4), Cut(3, 0), Cut(2, 1)]),
        ([Cut(2, 1, 4), Cut(3, 0)], None),
        ([Cut(2, 1, 2)], None),
    ],
)
def test_which_splits_say_that_the_inner_cut_came_first(made: list[Cut], order: list[Cut] | None) -> None:
    assert inner_first(made) == order


@given(st.lists(st.tuples(st.integers(1, 12), cuts()), min_size=1, max_size=3))
def test_boxes_of_several_intervals_are_where_the_local_tensor_has_them(dims: list[tuple[int, list[Cut]]]) -> None:
    shape = tuple(size for size, _ in dims)
    intervals = [left_over(size, made) for size, made in dims]
    whole = torch.arange(math.prod(shape)).reshape(shape)
    local = whole
    for axis, along in enumerate(intervals):
        local = local.index_select(axis, torch.tensor(elements(along), dtype=torch.long))
    boxes = boxes_of(intervals)
    assert local_shape(intervals) == tuple(local.shape)
    assert sum(box.numel for box in boxes) == local.numel()
    if local.numel():
        for box, place in zip(boxes, joined(boxes), strict=True):
            assert torch.equal(part(whole, box), part(local, place))


def part(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(start, start + extent) for start, extent in zip(*box, strict=True))]


def test_number_of_boxes_of_a_flat_range() -> None:
    assert [max_flat_boxes(ndim) for ndim in range(4)] == [1, 1, 3, 5]
