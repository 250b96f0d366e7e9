"""Units of an exchange: read into shared memory and verified there, or written from it; and taken out or put in.

See `layout.exchange` for what a unit is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from distckpt.errors import CorruptCheckpointError
from distckpt.layout.box import Box, first_element, flat_boxes
from distckpt.layout.exchange import InFile, PieceSpan, Span, Unit
from distckpt.layout.parcels import Cell, Parcel
from distckpt.storage import rawio
from distckpt.storage.checksum import Hasher, require_checksum
from distckpt.storage.reading import ReadReport
from distckpt.storage.transfer import sub_tensor


class Held(msgspec.Struct, frozen=True):
    """A block of a variable that this rank has, or wants.

    Attributes:
        box: Where it is in the global tensor.
        tensor: Its elements, of shape `box.shape` and of the stored dtype; any strides, any device.
    """

    box: Box
    tensor: torch.Tensor


def shared_parts(
    cells: Iterable[Cell], memory: memoryview, held: Mapping[int, Sequence[Held]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What some memory and this rank have in common.

    Args:
        cells: What is where in the memory.
        memory: The bytes.
        held: What this rank has or wants, by index of the variable.

    Yields:
        Pairs of tensors of the same shape and dtype: a part of `memory`, and of what this rank holds.
    """
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    for variable, box, place in cells:
        for block in held.get(variable, ()):
            common = box.intersect(block.box)
            if common is not None:
                nbytes = box.numel * block.tensor.element_size()
                there = everything.narrow(0, place, nbytes).view(block.tensor.dtype).view(box.shape)
                yield sub_tensor(there, common, box), sub_tensor(block.tensor.detach(), common, block.box)


def pack(parcel: Parcel, unit: memoryview, variables: Mapping[int, InFile], message: memoryview) -> None:
    """Put together what is sent of a unit.

    Args:
        parcel: What is sent.
        unit: The bytes of the unit.
        variables: The variables by index.
        message: Takes the bytes; at least `parcel.nbytes`.
    """
    for (variable, box, place), origin in zip(parcel.cells, parcel.origins, strict=True):
        dtype = f"V{variables[variable].itemsize}"
        within = box.relative_to(origin.box)
        source = np.ndarray(origin.box.shape, dtype, unit, origin.place)
        np.copyto(np.ndarray(box.shape, dtype, message, place), source[_slices(within)])


def transfers(unit: Unit, variables: Mapping[int, InFile]) -> Iterator[tuple[int, int, int]]:
    """The system calls that move a unit: neighbours in the file that are neighbours in memory, too, go together.

    Yields:
        Position in the file, position in memory, and size, in bytes.
    """
    file_start = memory_start = nbytes = 0
    for variable, span, place in unit:
        where = variables[variable]
        offset = where.offset + span.start * where.itemsize
        if nbytes and (offset, place) != (file_start + nbytes, memory_start + nbytes):
            yield file_start, memory_start, nbytes
            nbytes = 0
        if not nbytes:
            file_start, memory_start = offset, place
        nbytes += (span.stop - span.start) * where.itemsize
    if nbytes:
        yield file_start, memory_start, nbytes


def write_unit(
    fd: int, unit: Unit, memory: memoryview, variables: Mapping[int, InFile], writeback: rawio.Writeback
) -> None:
    """Write a unit from memory, and start write-back of its bytes.

    Raises:
        OSError: It failed; names a variable of the unit.
    """
    for offset, place, nbytes in transfers(unit, variables):
        try:
            rawio.write_all(fd, memory[place : place + nbytes], offset)
        except OSError as error:
            key = variables[unit[0].variable].key
            raise OSError(error.errno, f"{error.strerror}: {key}, {nbytes} bytes at byte {offset}") from error
        writeback.add(offset, nbytes)


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + extent) for start, extent in zip(*box, strict=True))


class UnitReader:
    """Reads units, one after the other in the order of their spans, and verifies every piece that it saw whole.

    Attributes:
        report: How much was read and verified.

    Args:
        fd: Descriptor of the file.
        variables: The variables by index.
        pieces: Their pieces, sorted; without an entry for variables that are not to be verified.
        checksums: The file's checksums, or None.
    """

    def __init__(
        self,
        fd: int,
        variables: Mapping[int, InFile],
        pieces: Mapping[int, list[PieceSpan]],
        checksums: np.ndarray | None,
    ) -> None:
        self.report = ReadReport()
        self._fd = fd
        self._variables = variables
        self._verifiers = (
            {}
            if checksums is None
            else {index: _Verifier(variables[index], found, checksums, self.report) for index, found in pieces.items()}
        )

    def read(self, unit: Unit, memory: memoryview) -> None:
        """Read a unit into memory.

        Raises:
            CorruptCheckpointError: The file is too short, or a checksum is wrong.
        """
        for offset, place, nbytes in transfers(unit, self._variables):
            try:
                rawio.read_into(self._fd, memory[place : place + nbytes], offset)
            except CorruptCheckpointError as error:
                raise CorruptCheckpointError(f"{self._variables[unit[0].variable].key}: {error}") from error
            self.report.bytes_read += nbytes
        for variable, span, place in unit:
            verifier = self._verifiers.get(variable)
            if verifier is not None:
                verifier.feed(span, memory[place : place + (span.stop - span.start) * verifier.itemsize])


class _Verifier:
    """Feeds the pieces of one variable with its bytes, which come in row-major order.

    That order is also the order of the bytes within each piece: a piece is a box.
    """

    def __init__(self, variable: InFile, pieces: list[PieceSpan], checksums: np.ndarray, report: ReadReport) -> None:
        self.itemsize = variable.itemsize
        self._variable = variable
        self._pieces = pieces
        self._checksums = checksums
        self._report = report
        self._next = 0
        self._open: list[_OpenPiece] = []

    def feed(self, span: Span, data: memoryview) -> None:
        """Take the bytes of a span; compare the pieces that end in it."""
        while self._next < len(self._pieces) and self._pieces[self._next].span.start < span.stop:
            if self._pieces[self._next].span.stop > span.start:
                self._open.append(_OpenPiece(self._pieces[self._next]))
            self._next += 1
        for piece in self._open:
            piece.feed(span, data, self._variable)
        for piece in self._open:
            if piece.ends_by(span.stop) and piece.is_whole(self.itemsize):
                self._compare(piece)
        self._open = [piece for piece in self._open if not piece.ends_by(span.stop)]

    def _compare(self, piece: _OpenPiece) -> None:
        expected = int(self._checksums[piece.checksum])
        require_checksum(self._variable.key, piece.box, piece.fed, expected, piece.hasher.intdigest())
        self._report.bytes_verified += piece.fed


class _OpenPiece:
    """A piece of which some bytes were seen."""

    def __init__(self, piece: PieceSpan) -> None:
        self.box, self.checksum = piece.box, piece.checksum
        self.hasher: Any = Hasher()
        self.fed = 0
        self._span = piece.span
        self._contiguous = piece.span.stop - piece.span.start == piece.box.numel

    def ends_by(self, stop: int) -> bool:
        return self._span.stop <= stop

    def is_whole(self, itemsize: int) -> bool:
        return self.fed == self.box.numel * itemsize

    def feed(self, span: Span, data: memoryview, variable: InFile) -> None:
        if self._contiguous:
            start, stop = max(span.start, self._span.start), min(span.stop, self._span.stop)
            self._update(data[(start - span.start) * variable.itemsize : (stop - span.start) * variable.itemsize])
            return
        for box in flat_boxes(Box.whole(variable.shape), span.start, span.stop):
            common = box.intersect(self.box)
            if common is not None:
                start = (first_element(box, variable.shape) - span.start) * variable.itemsize
                array = np.ndarray(box.shape, f"V{variable.itemsize}", data, start)
                within = common.relative_to(box)
                self._update(np.ascontiguousarray(array[_slices(within)]).reshape(-1).view(np.uint8).data)

    def _update(self, data: memoryview) -> None:
        self.hasher.update(data)
        self.fed += len(data)
