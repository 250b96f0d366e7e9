"""Exchange plans against NumPy: all that is wanted is moved, once, in units that fit; and units as bytes."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from distckpt.errors import CorruptCheckpointError
from distckpt.layout import box as box_module
from distckpt.layout.box import Box, Shape
from distckpt.layout.checksum_index import index_checksums
from distckpt.layout.exchange import (
    InFile,
    Range,
    Span,
    Unit,
    bands,
    cut_at_multiples,
    filled_bands,
    hull,
    hulls_that_meet,
    is_worth_exchanging,
    piece_spans,
    strided_pieces_within,
)
from distckpt.layout.parcels import Cell, cells_of
from distckpt.layout.records import Shard, Variable
from distckpt.layout.rounds import Party, Wanted, plan_rounds
from distckpt.storage.units import Held, HeldArray, UnitReader, shared_arrays, shared_parts, taken_verifier, transfers

ITEMSIZE = 4


@st.composite
def boxes_in(draw: st.DrawFn, shape: Shape) -> Box:
    offset = tuple(draw(st.integers(0, size)) for size in shape)
    return Box(offset, tuple(draw(st.integers(0, size - start)) for size, start in zip(shape, offset, strict=True)))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    return tuple(draw(st.lists(st.integers(1, 7), max_size=3)))


def flat_elements(box: Box, shape: Shape) -> np.ndarray:
    """Positions of a box's elements in the flattened tensor."""
    places = np.arange(math.prod(shape)).reshape(shape)
    return places[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))].reshape(-1)


@st.composite
def boxes_of_ranks(draw: st.DrawFn) -> tuple[Shape, list[Box]]:
    shape = draw(shapes())
    return shape, draw(st.lists(boxes_in(shape), min_size=1, max_size=4))


@given(boxes_of_ranks())
def test_the_hull_reaches_from_the_first_to_the_last_element(case: tuple[Shape, list[Box]]) -> None:
    shape, boxes = case
    for box in boxes:
        elements = flat_elements(box, shape)
        assert hull(box, shape) == ((elements[0], elements[-1] + 1) if elements.size else (0, 0))


@given(boxes_of_ranks())
def test_boxes_with_common_elements_meet(case: tuple[Shape, list[Box]]) -> None:
    shape, boxes = case
    hulls = [hull(box, shape) for box in boxes]
    filled = [(a, b) for a, b in hulls if b > a]
    expected = any(a < d and c < b for i, (a, b) in enumerate(filled) for c, d in filled[i + 1 :])
    # A second variable, of which each rank has its own part, never meets.
    apart = [(2 * rank, 2 * rank + 2) for rank in range(len(boxes))]
    stacked = np.array([hulls, apart], np.int64).transpose(1, 0, 2)
    assert hulls_that_meet(stacked) == ([0] if expected else [])


@pytest.mark.parametrize(
    ("boxes", "shape", "worth"),
    [
        ([Box((0, 0), (4, 8)), Box((4, 0), (4, 8))], (8, 8), False),  # rows
        ([Box((0, 0), (8, 4)), Box((0, 4), (8, 4))], (8, 8), True),  # narrow columns
        ([Box((0, 0), (8, 1 << 15)), Box((0, 1 << 15), (8, 1 << 15))], (8, 1 << 16), False),  # wide columns
        ([Box((0, 0), (8, 1 << 16)), Box((0, 0), (8, 1 << 16))], (8, 1 << 16), True),  # replicas
        ([Box((), ()), Box((), ())], (), True),
        ([Box((0, 3), (1, 2)), Box((0, 5), (1, 2))], (1, 8), False),  # one run each
    ],
)
def test_what_is_worth_exchanging(boxes: list[Box], shape: Shape, worth: bool) -> None:
    assert is_worth_exchanging(boxes, shape, ITEMSIZE) is worth


def files_of(variables: list[Variable]) -> dict[int, InFile]:
    return {i: InFile(v.key, 0, v.shape, getattr(torch, v.dtype).itemsize) for i, v in enumerate(variables)}


def columns(shape: Shape, parts: int) -> list[Box]:
    width = shape[1] // parts
    return [Box((0, part * width), (shape[0], width)) for part in range(parts)]


def rows(shape: Shape, parts: int) -> list[Box]:
    height = shape[0] // parts
    return [Box((part * height, 0), (height, *shape[1:])) for part in range(parts)]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 16 elements."""
    monkeypatch.setattr(box_module, "MAX_PIECE_NBYTES", 16 * ITEMSIZE)


def stored(key: str, shape: Shape, boxes: list[Box]) -> Variable:
    return Variable(key, "int32", shape, 0, [Shard(rank, *box) for rank, box in enumerate(boxes)])


@pytest.mark.usefixtures("small_pieces")
def test_bands_keep_pieces_whole() -> None:
    shape = (8, 8)
    variables = [stored("rows", shape, rows(shape, 4)), stored("columns", shape, columns(shape, 2))]
    index = index_checksums(variables)
    by_rows, by_columns = (piece_spans(v, index.firsts(i)) for i, v in enumerate(variables))
    assert bands([piece.span for piece in by_rows]) == [Span(16 * i, 16 * i + 16) for i in range(4)]
    # Four rows of four elements each make a piece; the pieces of both halves lie between each other.
    assert bands([piece.span for piece in by_columns]) == [Span(0, 32), Span(32, 64)]


def test_bands_with_holes_are_not_filled() -> None:
    shape = (8, 8)
    block, other = columns(shape, 2)
    upper, lower = Box((0, 4), (4, 4)), Box((4, 4), (4, 4))
    assert filled_bands([block, other], shape) == [Span(0, 64)]
    assert filled_bands([block, upper], shape) == []
    assert filled_bands([Box((0, 0), (4, 4)), upper, lower], shape) == [Span(0, 32)]


@given(st.integers(1, 4), st.integers(8, 300), st.data())
def test_rounds_move_all_that_is_wanted_once(size: int, unit_nbytes: int, data: st.DataObject) -> None:
    cases = [data.draw(boxes_of_ranks()) for _ in range(data.draw(st.integers(1, 4)))]
    variables = [Variable(str(i), "int64" if i % 2 else "int8", shape, 0, []) for i, (shape, _) in enumerate(cases)]
    moved = {i: [Span(0, math.prod(shape))] for i, (shape, _) in enumerate(cases)}
    wanted = {i: Wanted(boxes, shape) for i, (shape, boxes) in enumerate(cases)}
    seen = {i: np.zeros(math.prod(shape), int) for i, (shape, _) in enumerate(cases)}
    for units in plan_rounds(files_of(variables), moved, [Party(wanted, range(size))], size, unit_nbytes):
        assert len(units) == size
        for unit in units:
            free = 0
            for index, span, place in unit:
                itemsize = 8 if index % 2 else 1
                assert place % itemsize == 0
                assert place >= free
                free = place + (span.stop - span.start) * itemsize
                assert free <= unit_nbytes
                seen[index][span.start : span.stop] += 1
    for index, (shape, boxes) in enumerate(cases):
        assert seen[index].max() <= 1
        for box in boxes:
            assert (seen[index][flat_elements(box, shape)] == 1).all()


def test_rounds_are_balanced() -> None:
    variables = [Variable(str(i), "int32", (256, 16), 0, []) for i in range(8)]
    spans = {i: [Span(start, start + 512) for start in range(0, 4096, 512)] for i in range(8)}
    wanted = {i: Wanted([Box.whole((256, 16))], (256, 16)) for i in range(8)}
    rounds = plan_rounds(files_of(variables), spans, [Party(wanted, range(4))], 4, 4096)
    moved = [sum(r.span.stop - r.span.start for units in rounds for r in units[rank]) for rank in range(4)]
    assert moved == [8 * 4096 / 4] * 4


@given(
    st.integers(0, 300), st.sampled_from([1, 2, 8, 16]), st.lists(st.integers(0, 500), max_size=8), st.integers(4, 8)
)
def test_parts_to_write_cross_no_multiple(offset: int, itemsize: int, ends: list[int], bits: int) -> None:
    nbytes, file = 1 << bits, InFile("x", 8 * offset, (500,), itemsize)
    ordered = sorted(ends)
    spans = [Span(*pair) for pair in zip(ordered[::2], ordered[1::2], strict=False)]
    parts = cut_at_multiples(spans, file, nbytes)
    assert [i for part in parts for i in range(*part)] == [i for span in spans for i in range(*span)]
    for start, stop in parts:
        first, end = (file.offset + element * itemsize for element in (start, stop))
        assert first // nbytes == (end - 1) // nbytes or stop - start == 1
    assert len(parts) <= len(spans) + 2 * (500 * itemsize // nbytes + 1)


def test_the_parts_of_one_variable_are_divided_among_ranks_and_aligned() -> None:
    file = InFile("x", 1000, (100, 41), 4)
    parts = cut_at_multiples([Span(0, 4100)], file, 1024)
    party = Party({0: Wanted([Box.whole(file.shape)], file.shape)}, range(3))
    rounds = plan_rounds({0: file}, {0: parts}, [party], 3, 1024)
    calls = [[list(transfers(unit, {0: file})) for unit in units] for units in rounds]
    moved = [sum(nbytes for of_round in calls for _, _, nbytes in of_round[rank]) for rank in range(3)]
    assert sum(moved) == file.nbytes
    assert max(moved) - min(moved) <= 2 * 1024
    starts = sorted(at for of_round in calls for of_rank in of_round for at, _, _ in of_rank)
    assert starts == [1000, *range(1024, 1000 + file.nbytes, 1024)]


def test_neighbours_in_the_file_are_moved_by_one_call() -> None:
    variables = {0: InFile("a", 100, (4,), 4), 1: InFile("b", 116, (2,), 4), 2: InFile("c", 200, (2,), 4)}
    unit = [Range(0, Span(0, 4), 0), Range(1, Span(0, 2), 16), Range(2, Span(0, 2), 24)]
    assert list(transfers(unit, variables)) == [(100, 0, 24), (200, 24, 8)]
    apart = [Range(0, Span(0, 4), 0), Range(1, Span(0, 2), 32)]
    assert list(transfers(apart, variables)) == [(100, 0, 16), (116, 32, 8)]


class Exchange:
    """A file with variables saved by two ranks, read back in units by one that wants all."""

    def __init__(self, path: Path, variables: list[Variable]) -> None:
        self.path = path
        self.variables = variables
        self.values = [
            torch.arange(math.prod(v.shape), dtype=torch.int32).reshape(v.shape) + 1000 * i
            for i, v in enumerate(variables)
        ]
        self.offsets = [0]
        for value in self.values:
            self.offsets.append(self.offsets[-1] + value.nbytes)
        path.write_bytes(b"".join(value.numpy().tobytes() for value in self.values))
        self.files = {i: InFile(v.key, self.offsets[i], v.shape, ITEMSIZE) for i, v in enumerate(variables)}
        index = index_checksums(variables)
        self.pieces = {i: piece_spans(v, index.firsts(i)) for i, v in enumerate(variables)}
        self.checksums = np.zeros(index.total, np.uint64)
        for i, value in enumerate(self.values):
            for piece in self.pieces[i]:
                part = part_of(value, piece.box).contiguous()
                self.checksums[piece.checksum] = xxhash.xxh3_64_intdigest(part.numpy())

    def rounds(self, unit_nbytes: int, size: int = 2) -> list[list[Unit]]:
        moved = {i: bands([piece.span for piece in pieces]) for i, pieces in self.pieces.items()}
        wanted = {i: Wanted([Box.whole(v.shape)], v.shape) for i, v in enumerate(self.variables)}
        return plan_rounds(self.files, moved, [Party(wanted, range(size))], size, unit_nbytes)

    def read(self, unit_nbytes: int, size: int = 2) -> tuple[list[torch.Tensor], list[UnitReader]]:
        rounds = self.rounds(unit_nbytes, size)
        live = [torch.full_like(value, -1) for value in self.values]
        held = {i: [Held(Box.whole(v.shape), live[i])] for i, v in enumerate(self.variables)}
        fd = os.open(self.path, os.O_RDONLY)
        try:
            readers = [UnitReader(fd, self.files, self.pieces, self.checksums) for _ in range(size)]
            for units in rounds:
                for reader, unit in zip(readers, units, strict=True):
                    memory = bytearray(unit_nbytes)
                    reader.read(unit, memoryview(memory))
                    for there, here in shared_parts(cells_of(unit, self.files), memoryview(memory), held):
                        here.copy_(there)
        finally:
            os.close(fd)
        return live, readers

    def take_shards(self, unit_nbytes: int) -> int:
        """Read into packed tensors, one for each shard; gives the number of bytes that were verified there."""
        held = {
            i: [
                Held(Box(*place), torch.full(place[1], -1, dtype=torch.int32))
                for _, *place in map(msgspec.structs.astuple, v.shards)
            ]
            for i, v in enumerate(self.variables)
        }
        verifier = taken_verifier(self.files, self.pieces, held, self.checksums)
        memory = memoryview(bytearray(unit_nbytes))
        fd = os.open(self.path, os.O_RDONLY)
        try:
            reader = UnitReader(fd, self.files, {}, self.checksums)
            for mover, unit in itertools.chain(*map(enumerate, self.rounds(unit_nbytes))):
                reader.read(unit, memory)
                for there, here in shared_parts(cells_of(unit, self.files), memory, held):
                    here.copy_(there)
                verifier.feed(unit, memory, mover)
        finally:
            os.close(fd)
        for index, blocks in held.items():
            assert all(torch.equal(block.tensor, part_of(self.values[index], block.box)) for block in blocks)
        return verifier.bytes_verified


def part_of(value: torch.Tensor, box: Box) -> torch.Tensor:
    return value[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))]


@pytest.fixture
def exchange(tmp_path: Path, request: pytest.FixtureRequest) -> Exchange:
    request.getfixturevalue("small_pieces")
    shape = (8, 12)
    return Exchange(
        tmp_path / "file",
        [
            stored("rows", shape, rows(shape, 4)),
            stored("columns", shape, columns(shape, 3)),
            stored("cube", (4, 3, 5), [Box((0, 0, 0), (4, 3, 2)), Box((0, 0, 2), (4, 3, 3))]),
            stored("scalar", (), [Box((), ())]),
        ],
    )


@pytest.mark.parametrize("unit_nbytes", [8, 60, 64, 100, 4096])
def test_units_are_read_verified_and_handed_out(exchange: Exchange, unit_nbytes: int) -> None:
    live, readers = exchange.read(unit_nbytes)
    for value, expected in zip(live, exchange.values, strict=True):
        assert torch.equal(value, expected)
    nbytes = sum(value.nbytes for value in exchange.values)
    assert sum(reader.report.bytes_read for reader in readers) == nbytes
    assert sum(reader.report.bytes_verified for reader in readers) == nbytes


@pytest.mark.parametrize("unit_nbytes", [8, 100, 4096])
@pytest.mark.parametrize("damaged", [0, 1, 2, 3])
def test_a_damaged_byte_is_found_in_every_variable(exchange: Exchange, unit_nbytes: int, damaged: int) -> None:
    data = bytearray(exchange.path.read_bytes())
    data[exchange.offsets[damaged + 1] - 1] ^= 1  # the last one
    exchange.path.write_bytes(data)
    with pytest.raises(
        CorruptCheckpointError, match=rf"^{exchange.variables[damaged].key}: the \d+ bytes of the piece"
    ):
        exchange.read(unit_nbytes)


@pytest.mark.parametrize("unit_nbytes", [8, 60, 100, 4096])
def test_pieces_between_others_are_verified_where_they_are_taken(exchange: Exchange, unit_nbytes: int) -> None:
    # Those of rows are one range of the file each: who reads them verifies them.
    assert exchange.take_shards(unit_nbytes) == exchange.values[1].nbytes + exchange.values[2].nbytes


@pytest.mark.parametrize("unit_nbytes", [8, 100, 4096])
@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_byte_is_found_where_it_is_taken(exchange: Exchange, unit_nbytes: int, damaged: int) -> None:
    data = bytearray(exchange.path.read_bytes())
    data[exchange.offsets[damaged] + 5] ^= 1
    exchange.path.write_bytes(data)
    key = exchange.variables[damaged].key
    with pytest.raises(CorruptCheckpointError, match=rf"^{key}: the \d+ bytes of the piece .* at \(0, 0"):
        exchange.take_shards(unit_nbytes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.float64, torch.complex64], ids=str)
def test_arrays_share_what_tensors_share(dtype: torch.dtype) -> None:
    full = torch.arange(2 * 6 * 5).remainder(251).to(torch.uint8).view(2, 6, 5).repeat(1, 1, dtype.itemsize)
    memory = bytearray(full.numpy().tobytes())
    cells = [Cell(0, Box((3, 0, 0), (2, 6, 5)), 0), Cell(1, Box((), ()), 16)]
    strided = torch.zeros(5, 2, 4, dtype=dtype).permute(1, 2, 0)  # of a box that has some of the cell
    held = {0: [Held(Box((4, 1, 0), (2, 4, 5)), strided)], 1: [Held(Box((), ()), torch.zeros((), dtype=dtype))]}
    arrays = {index: [HeldArray.of(block) for block in blocks] for index, blocks in held.items()}
    for there, here in shared_arrays(cells, memoryview(memory), arrays):
        np.copyto(here, there)
    assert held[1][0].tensor.view(-1).view(torch.uint8).any()
    pairs = list(shared_parts(cells, memoryview(memory), held))
    assert [tuple(here.shape) for _, here in pairs] == [(1, 4, 5), ()]
    for there, here in pairs:
        raw = {1: torch.uint8, 2: torch.int16, 8: torch.int64}[dtype.itemsize]
        assert torch.equal(there.view(raw), here.view(raw))
    assert not strided[1].view(raw).any()  # what the cell does not have


def test_what_is_no_array_of_integers() -> None:
    for tensor in (torch.zeros(3, dtype=torch.complex128), torch.zeros(3, dtype=torch.complex64).conj()):
        assert HeldArray.of(Held(Box((0,), (3,)), tensor)) is None


def test_pieces_within_boxes_as_wide_as_they(exchange: Exchange) -> None:
    by_columns = exchange.pieces[1]
    tall, wide = Box((0, 4), (8, 4)), Box((0, 0), (8, 12))
    within = {piece: tall for piece in by_columns if piece.box.offset[1] == 4}
    assert len(within) == 2
    assert strided_pieces_within(by_columns, [tall, wide]) == within
    lower = Box((4, 4), (4, 4))
    assert list(strided_pieces_within(by_columns, [lower])) == [max(within)]
    assert strided_pieces_within(exchange.pieces[0], rows((8, 12), 4)) == {}


def test_a_truncated_file(exchange: Exchange) -> None:
    os.truncate(exchange.path, exchange.offsets[2] - 4)
    with pytest.raises(CorruptCheckpointError, match="truncated"):
        exchange.read(64)
