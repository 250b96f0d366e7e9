"""What is sent of a unit, and who reads it, for ranks of several nodes: against NumPy."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distckpt.coordination.nodes import Nodes
from distckpt.layout.box import Box, Shape
from distckpt.layout.exchange import InFile, Range, Span
from distckpt.layout.parcels import cells_of, parcel_of
from distckpt.layout.rounds import Party, Wanted, plan_rounds
from distckpt.storage.units import pack

Wants = dict[int, list[Box]]


@st.composite
def boxes_in(draw: st.DrawFn, shape: Shape) -> Box:
    """A box with elements."""
    offset = tuple(draw(st.integers(0, size - 1)) for size in shape)
    return Box(offset, tuple(draw(st.integers(1, size - start)) for size, start in zip(shape, offset, strict=True)))


@st.composite
def variables(draw: st.DrawFn) -> dict[int, InFile]:
    shapes = draw(st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=4))
    return {i: InFile(f"{i}", 0, shape, draw(st.sampled_from([1, 2, 4, 8, 16]))) for i, shape in enumerate(shapes)}


@st.composite
def wants_of(draw: st.DrawFn, files: dict[int, InFile]) -> Wants:
    wanted = {index: draw(st.lists(boxes_in(file.shape), max_size=3)) for index, file in files.items()}
    return {index: boxes for index, boxes in wanted.items() if boxes}


def mark(places: np.ndarray, box: Box) -> np.ndarray:
    """The places of a box in an array of a variable."""
    return places[(*(slice(a, a + n) for a, n in zip(*box, strict=True)), ...)]


@given(variables(), st.data())
def test_a_parcel_has_all_that_is_wanted_of_a_unit(files: dict[int, InFile], data: st.DataObject) -> None:
    values, unit, memory, used = {}, [], bytearray(20000), 0
    for index, file in files.items():
        numel = math.prod(file.shape)
        numbers = np.arange(numel * file.itemsize, dtype=np.int64).astype(np.uint8) + np.uint8(index)
        values[index] = numbers.view(f"V{file.itemsize}").reshape(file.shape)
        start = data.draw(st.integers(0, numel - 1))
        span = Span(start, data.draw(st.integers(start + 1, numel)))
        place = -(-used // file.itemsize) * file.itemsize
        unit.append(Range(index, span, place))
        used = place + (span.stop - span.start) * file.itemsize
        memory[place:used] = values[index].reshape(-1)[span.start : span.stop].tobytes()
    wanted = data.draw(wants_of(files))
    parcel = parcel_of(unit, files, wanted)
    assert parcel.nbytes <= used
    message = bytearray(b"\xaa" * (used + 1))
    pack(parcel, memoryview(memory), files, memoryview(message))
    assert message[parcel.nbytes :] == b"\xaa" * (used + 1 - parcel.nbytes)  # nothing behind its end
    sent = {index: np.zeros(file.shape, bool) for index, file in files.items()}
    free = 0
    for index, box, place in parcel.cells:
        itemsize = files[index].itemsize
        assert place % itemsize == 0
        assert place >= free
        free = place + box.numel * itemsize
        assert message[place:free] == mark(values[index], box).tobytes()
        mark(sent[index], box)[...] = True
    for index, span, _ in unit:
        here = np.zeros(math.prod(files[index].shape), bool)
        here[span.start : span.stop] = True
        for box in wanted.get(index, ()):
            assert (mark(sent[index], box) >= mark(here.reshape(files[index].shape), box)).all()
    if parcel.is_whole:
        assert parcel.cells == cells_of(unit, files)
        assert message[:used] == memory[:used]


def test_what_nobody_wants_is_no_parcel() -> None:
    files = {0: InFile("x", 0, (4, 4), 4)}
    unit = [Range(0, Span(0, 8), 0)]
    assert parcel_of(unit, files, {0: [Box((2, 0), (2, 4))]}).nbytes == 0
    assert parcel_of(unit, files, {}).nbytes == 0
    assert parcel_of([], files, {0: [Box((0, 0), (4, 4))]}).nbytes == 0


@given(variables(), st.integers(16, 200), st.data())
def test_all_that_any_party_wants_is_moved_once_by_one_that_wants_it(
    files: dict[int, InFile], unit_nbytes: int, data: st.DataObject
) -> None:
    wants: list[Wants] = [data.draw(wants_of(files)) for _ in range(data.draw(st.integers(1, 10)))]
    movers = [[2 * number, 2 * number + 1] for number in range(len(wants))]
    parties = [
        Party({index: Wanted(boxes, files[index].shape) for index, boxes in wanted.items()}, ranks)
        for wanted, ranks in zip(wants, movers, strict=True)
    ]
    moved = {}
    for index, file in files.items():
        numel = math.prod(file.shape)
        cuts = sorted(data.draw(st.sets(st.integers(1, numel), max_size=4)) | {0, numel})
        moved[index] = [Span(start, stop) for start, stop in itertools.pairwise(cuts)]
    seen = {index: np.zeros(math.prod(file.shape), int) for index, file in files.items()}
    for units in plan_rounds(files, moved, parties, 2 * len(wants), unit_nbytes):
        for rank, unit in enumerate(units):
            for index, span, _ in unit:
                seen[index][span.start : span.stop] += 1
                (band,) = [band for band in moved[index] if band.start <= span.start and span.stop <= band.stop]
                own = parties[rank // 2].wanted.get(index)
                assert len(parties) == 1 or (own is not None and own.of(band))
    for index, file in files.items():
        wanted_by = np.zeros(math.prod(file.shape), bool)
        for party in parties:
            if index in party.wanted:
                for start, stop in party.wanted[index].of(Span(0, math.prod(file.shape))):
                    wanted_by[start:stop] = True
        assert (seen[index] == wanted_by).all()


def test_replicas_are_read_by_all_nodes_evenly() -> None:
    """Two shards, each wanted by two of four nodes of two ranks."""
    shape = (64, 16)
    files = {0: InFile("x", 0, shape, 4)}
    halves = [Box((0, 0), (32, 16)), Box((32, 0), (32, 16))]
    parties = [
        Party({0: Wanted([half], shape)}, ranks)
        for half, ranks in zip(halves, ([0, 1, 4, 5], [2, 3, 6, 7]), strict=True)
    ]
    spans = {0: [Span(start, start + 64) for start in range(0, 1024, 64)]}
    rounds = plan_rounds(files, spans, parties, 8, 4096)
    moved = [sum(r.span.stop - r.span.start for units in rounds for r in units[rank]) for rank in range(8)]
    assert moved == [1024 // 8] * 8


def test_nodes_are_in_the_order_of_their_first_ranks() -> None:
    assert Nodes.of([0, 1, 0, 1, 4], 3) == Nodes([[0, 2], [1, 3], [4]], 1)
    nodes = Nodes.of([0, 0, 0, 3, 3], 4)
    assert (nodes.own, nodes.leaders, nodes.n_lanes, nodes.lanes(0)) == (1, [0, 3], 2, [0, 1])
    assert Nodes.single(3, 2) == Nodes([[0], [1], [2]], 2)
