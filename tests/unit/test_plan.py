"""Read plans against NumPy: what is wanted is read once, from the pieces that were written."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.layout import box as box_module
from distckpt.layout.box import Box, Shape, pieces
from distckpt.layout.checksum_index import index_checksums
from distckpt.layout.dtypes import dtype_info
from distckpt.layout.plan import ReadItem, ReadPlanner
from distckpt.layout.records import Shard, Variable
from distckpt.layout.validation import validate, validate_shards


def variable(shape: Shape, boxes: list[Box], dtype: str = "float32") -> Variable:
    return Variable("model/w", dtype, shape, 0, [Shard(rank, *box) for rank, box in enumerate(sorted(boxes))])


def read_items(stored: Variable, want: Box) -> list[ReadItem]:
    return ReadPlanner([stored], index_checksums([stored])).items(0, want)


def element_slice(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + extent) for start, extent in zip(*box, strict=True))


def grid(shape: Shape, mesh: tuple[int, ...]) -> list[Box]:
    """The shards of a mesh, as even as possible; some are empty when there are more ranks than rows."""
    bounds = [[size * i // parts for i in range(parts + 1)] for size, parts in zip(shape, mesh, strict=True)]
    places = np.ndindex(*mesh)
    return [
        Box(
            tuple(b[i] for b, i in zip(bounds, place, strict=True)),
            tuple(b[i + 1] - b[i] for b, i in zip(bounds, place, strict=True)),
        )
        for place in places
    ]


@st.composite
def tilings(draw: st.DrawFn, shape: Shape) -> list[Box]:
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 8)) if shape and 0 not in shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.shape[axis]))
        first = Box(box.offset, (*box.shape[:axis], at, *box.shape[axis + 1 :]))
        offset = (*box.offset[:axis], box.offset[axis] + at, *box.offset[axis + 1 :])
        second = Box(offset, (*box.shape[:axis], box.shape[axis] - at, *box.shape[axis + 1 :]))
        boxes += [half for half in (first, second) if half.numel]
    return [box for box in boxes if box.numel]


@st.composite
def restores(draw: st.DrawFn) -> tuple[Variable, Box]:
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    offset = tuple(draw(st.integers(0, size)) for size in shape)
    want = Box(offset, tuple(draw(st.integers(0, size - start)) for size, start in zip(shape, offset, strict=True)))
    return variable(shape, draw(tilings(shape))), want


@pytest.fixture(params=[4, 24, 1 << 20], ids=["1 element", "6 elements", "whole shards"])
def piece_nbytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that shards of a few elements have several."""
    monkeypatch.setattr(box_module, "MAX_PIECE_NBYTES", request.param)


@pytest.mark.parametrize("few", [0, 16], ids=["many shards", "few shards"])
@pytest.mark.usefixtures("piece_nbytes")
def test_all_that_is_wanted_is_read_once(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distckpt.layout.plan._FEW_SHARDS", few)

    @given(restores())
    def check(case: tuple[Variable, Box]) -> None:
        stored, want = case
        counts = np.zeros(stored.shape, int)
        firsts = index_checksums([stored]).firsts(0)
        written = {
            first + number: piece
            for shard, first in zip(stored.shards, firsts, strict=True)
            for number, piece in enumerate(pieces(Box(shard.offset, shard.shape), 4))
        }
        whole = set()
        for item in read_items(stored, want):
            counts[element_slice(item.box)] += 1
            assert item.box.numel
            if item.checksum >= 0:
                assert written[item.checksum] == item.box
                whole.add(item.box)
            else:
                assert item.box not in written.values()
        expected = np.zeros(stored.shape, int)
        expected[element_slice(want)] = 1
        assert np.array_equal(counts, expected)
        assert whole == {piece for piece in written.values() if want.numel and want.contains(piece)}

    check()


@pytest.mark.parametrize("saved", [(1, 1), (4, 1), (1, 4), (2, 2), (3, 1), (7, 5)])
@pytest.mark.parametrize("live", [(1, 1), (2, 1), (1, 3), (2, 2), (12, 1)])
def test_any_sharding_to_any_other(saved: tuple[int, int], live: tuple[int, int]) -> None:
    """Write an array shard by shard into one buffer, read it back with other shards."""
    shape = (10, 6)
    source = np.arange(60).reshape(shape)
    file = np.full(shape, -1)
    boxes = [box for box in grid(shape, saved) if box.numel]
    for box in boxes:
        file[element_slice(box)] = source[element_slice(box)]
    stored = variable(shape, boxes)
    assert validate_shards(stored) == []
    for want in grid(shape, live):
        read = np.full(want.shape, -1)
        for item in read_items(stored, want):
            read[element_slice(item.box.relative_to(want))] = file[element_slice(item.box)]
        assert np.array_equal(read, source[element_slice(want)])


def test_the_same_sharding_reads_whole_pieces() -> None:
    shape = (6, 3_000_000)
    boxes = grid(shape, (3, 1))
    stored = variable(shape, boxes)
    planner = ReadPlanner([stored, stored], index_checksums([stored, stored]))
    items = [item for box in boxes for item in planner.items(1, box)]
    assert [item.checksum for item in items] == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]
    assert sum(item.box.numel for item in items) == math.prod(shape)


@pytest.mark.parametrize("n_ranks", [3, 20])
def test_a_planner_that_remembers_boxes_plans_as_a_new_one(n_ranks: int) -> None:
    shape = (40, 6)
    variables = [variable(shape, grid(shape, mesh), dtype) for mesh in [(n_ranks, 1), (1, 2)] for dtype in ["int8"] * 2]
    variables.append(variable(shape, grid(shape, (n_ranks, 1)), "float32"))
    index = index_checksums(variables)
    planner = ReadPlanner(variables, index)
    asked = [(number, want) for want in grid(shape, (2, 1)) for number in (0, 1, 2, 4, 0, 3, 1)]
    planned = [planner.items(number, want) for number, want in asked]
    assert planned == [ReadPlanner(variables, index).items(number, want) for number, want in asked]
    assert planned[0] != planned[1]  # other checksums


def test_checksums_stand_by_rank_then_by_class_then_by_variable() -> None:
    small = variable((2,), [Box.whole((2,))])
    none = variable((0,), [])
    large = variable((3, 1 << 21), grid((3, 1 << 21), (3, 1)))
    double = variable((3, 1 << 21), grid((3, 1 << 21), (3, 1)), "float64")
    index = index_checksums([small, none, large, double, large, small])
    assert [index.firsts(number) for number in range(6)] == [[0], [], [2, 6, 10], [4, 8, 12], [3, 7, 11], [1]]
    assert index.total == 14
    assert index_checksums([]).total == 0


def test_variables_need_not_share_the_list_of_shards_to_be_cut_alike() -> None:
    shards = [Shard(1, (0,), (2,)), Shard(0, (2,), (2,))]
    apart = [Variable(key, "int8", (4,), 0, list(shards)) for key in "abc"]
    shared = [Variable(key, "int8", (4,), 0, shards) for key in "abc"]
    for variables in (apart, shared):
        index = index_checksums(variables)
        assert [index.firsts(number) for number in range(3)] == [[3, 0], [4, 1], [5, 2]]
        assert [index.first(number, 1) for number in range(3)] == [0, 1, 2]


def n_pieces(stored: Variable, shard: Shard) -> int:
    return len(pieces(Box(shard.offset, shard.shape), dtype_info(stored.dtype).itemsize))


@given(data=st.data())
def test_every_piece_has_a_checksum_of_its_own_beside_those_of_its_rank(data: st.DataObject) -> None:
    ranks = st.integers(0, 2)
    shapes = st.sampled_from([(1,), (1 << 21,), (3 << 21,), (2, (1 << 21) + 1)])
    tilings = [
        [Shard(data.draw(ranks), (0,) * len(shape), shape) for shape in chosen]
        for chosen in data.draw(st.lists(st.lists(shapes, max_size=4), min_size=1, max_size=3))
    ]
    variables = [
        Variable("w", data.draw(st.sampled_from(["float32", "int32", "int8"])), (9,), 0, shards)
        for shards in data.draw(st.lists(st.sampled_from(tilings), max_size=7))
    ]
    index = index_checksums(variables)
    owners = {}
    for variable, stored in enumerate(variables):
        for shard, first in zip(stored.shards, index.firsts(variable), strict=True):
            for number in range(n_pieces(stored, shard)):
                assert owners.setdefault(first + number, shard.rank) == shard.rank
    assert sorted(owners) == list(range(index.total))
    assert index.total == sum(n_pieces(v, s) for v in variables for s in v.shards)
    assert [owners[i] for i in sorted(owners)] == sorted(owners.values())


def test_a_variable_of_many_shards_is_searched_quickly() -> None:
    shape = (16384, 64)
    stored = variable(shape, grid(shape, (16384, 1)))
    started = time.process_time()
    items = read_items(stored, Box((1000, 0), (8, 64)))
    assert [item.checksum for item in items] == [1000 + i for i in range(8)]
    assert time.process_time() - started < 0.5


# ---- manifests that lie ------------------------------------------------------------------------------------------


@given(restores())
def test_tilings_are_valid(case: tuple[Variable, Box]) -> None:
    assert validate_shards(case[0]) == []


@pytest.mark.parametrize(
    ("shape", "boxes", "text"),
    [
        ((4,), [], "4 elements of the shape (4,) are in no shard, the first ones at (0,), (4,)"),
        ((4,), [Box((0,), (3,))], "1 elements of the shape (4,) are in no shard, the first ones at (3,), (1,)"),
        ((4,), [Box((0,), (3,)), Box((2,), (2,))], "shard 0 at offset (0,) of shape (3,) overlaps"),
        ((4,), [Box((0,), (4,)), Box((0,), (4,))], "shard 0 at offset (0,) of shape (4,) overlaps"),
        ((4,), [Box((0,), (5,))], "is empty or outside of the shape (4,)"),
        ((4,), [Box((-1,), (5,))], "is empty or outside"),
        ((4,), [Box((0,), (4,)), Box((4,), (0,))], "is empty or outside"),
        ((4,), [Box((0, 0), (4, 1))], "is empty or outside"),
        ((4,), [Box((0,), ())], "is empty or outside"),
        ((4,), [Box((0,), (10**30,))], "is empty or outside"),
        ((4,), [Box((5,), (1,)), Box((6,), (1,))], "and 1 more like it"),
        ((-4,), [], "impossible shape (-4,)"),
        ((1 << 40, 1 << 40), [], "impossible shape"),
        ((10**3000,) * 2, [], "impossible shape"),
        ((1,) * 1000, [], "impossible shape"),
        ((0, 1 << 70), [], "impossible shape"),
        ((0, 1 << 40), [], None),
    ],
)
def test_shards_that_cannot_be_true(shape: Shape, boxes: list[Box], text: str | None) -> None:
    problems = validate_shards(variable(shape, boxes))
    if text is None:
        assert problems == []
    else:
        (problem,) = problems
        assert "model/w" in problem
        assert text in problem
        assert len(problem) < 600


def test_an_unknown_dtype_is_named() -> None:
    assert validate_shards(variable((1,), [Box.whole((1,))], "float7")) == ["model/w: unknown dtype 'float7'."]


def test_a_hostile_number_of_shards_takes_no_quadratic_time_or_memory() -> None:
    """Boxes on a diagonal, in many dimensions: the grid of their bounds would not fit into any memory."""
    boxes = [Box((i,) * 3, (1,) * 3) for i in range(10_000)]
    started = time.process_time()
    (problem,) = validate_shards(variable((10_000,) * 3, boxes))
    assert "999999990000 elements" in problem
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "boxes",
    [
        [Box((0, 0), (2, 4)), Box((2, 0), (3, 4))],
        [Box((2, 0), (3, 4)), Box((0, 0), (2, 4))],  # in another order
        [Box((0, 0), (5, 1)), Box((0, 1), (5, 3))],
    ],
)
def test_shards_that_tile_have_no_problems(boxes: list[Box]) -> None:
    shards = [Shard(rank, *box) for rank, box in enumerate(boxes)]
    assert validate_shards(Variable("w", "float32", (5, 4), 0, shards)) == []


@pytest.mark.parametrize(
    "boxes",
    [
        [Box((0, 0), (2, 4)), Box((3, 0), (2, 4))],  # a gap between bands
        [Box((0, 0), (3, 4)), Box((2, 0), (3, 4))],  # bands that overlap
        [Box((0, 0), (2, 4)), Box((2, 0), (4, 4))],  # the last band is too long
        [Box((0, 0), (2, 4)), Box((2, 0), (0, 4)), Box((2, 0), (3, 4))],  # an empty band
        [Box((0, 0), (2, 4)), Box((2, 1), (3, 4))],
        [Box((0, 0), (2, 4)), Box((2, 0), (3, 3))],
        [Box((0,), (5,))],
    ],
)
def test_bands_that_do_not_tile_are_found(boxes: list[Box]) -> None:
    shards = [Shard(rank, *box) for rank, box in enumerate(boxes)]
    assert validate_shards(Variable("w", "float32", (5, 4), 0, shards)) != []


def test_variables_that_are_cut_alike_are_checked_once_and_all_that_are_wrong_are_named() -> None:
    right, wrong = [Shard(0, (0,), (4,))], [Shard(0, (0,), (3,))]
    variables = [
        Variable(f"v{number}", dtype, (4,), 0, shards)
        for number, (dtype, shards) in enumerate(
            [("int8", right), ("int8", wrong), ("int8", right), ("int8", wrong), ("float7", right)]
        )
    ]
    variables.append(Variable("v5", "int8", (5,), 0, right))
    assert [problem.split()[0] for problem in validate(variables)] == ["v1:", "v3:", "v4:", "v5:"]


def test_checksums_of_hostile_ranks_take_no_memory() -> None:
    shards = [Shard(rank, (i,), (1,)) for i, rank in enumerate([1 << 62, -5, 1 << 62, 0])]
    index = index_checksums([Variable("x", "float32", (4,), -1, shards)])
    assert index.firsts(0) == [2, 0, 3, 1]
