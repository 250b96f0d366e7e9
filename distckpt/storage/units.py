"""Units of an exchange: read into shared memory and verified there, or written from it, and copied to and from tensors.

See `layout.exchange` for the definition of a unit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import msgspec
import numpy as np
import torch

from distckpt.device import gpu_of
from distckpt.errors import CorruptCheckpointError
from distckpt.layout.box import Box, first_element, row_major_strides
from distckpt.layout.exchange import InFile, PieceSpan, Unit, strided_pieces_within
from distckpt.layout.parcels import Cell, Parcel
from distckpt.storage import rawio
from distckpt.storage.checksum import Checksums
from distckpt.storage.piece_checks import PieceRead, PieceTaken, PieceVerifier
from distckpt.storage.reading import ReadReport
from distckpt.storage.transfer import sub_tensor
from distckpt.tensor_bytes import RAW, is_packed


class Held(msgspec.Struct, frozen=True):
    """A box of a variable that this rank holds, or wants.

    Attributes:
        box: The box, in global coordinates.
        tensor: Its elements, of shape `box.shape` and of the stored dtype; any strides, any device, no gradient.
    """

    box: Box
    tensor: torch.Tensor


class HeldArray(msgspec.Struct, frozen=True):
    """A `Held` in host memory, as an array: copying a part of an array takes a tenth of the time of a tensor's.

    Attributes:
        box: The box, in global coordinates.
        array: Its elements as integers of the same size, of shape `box.shape`; any strides.
        tensor: The tensor that owns the memory.
    """

    box: Box
    array: np.ndarray
    tensor: torch.Tensor

    @classmethod
    def of(cls, held: Held) -> HeldArray | None:
        """The array of a `Held`; None on a GPU, and for elements that cannot be viewed as integers."""
        tensor = held.tensor
        raw = RAW.get(tensor.element_size())
        if raw is None or gpu_of(tensor) is not None or tensor.is_conj() or tensor.is_neg():
            return None
        return cls(held.box, tensor.view(raw).numpy(), tensor)


def shared_parts(
    cells: Iterable[Cell], memory: memoryview, held: Mapping[int, Sequence[Held]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The parts of some memory that this rank holds or wants.

    Args:
        cells: The layout of the memory.
        memory: The bytes.
        held: The boxes that this rank holds or wants, by index of the variable.

    Yields:
        Pairs of tensors of the same shape and dtype: a part of `memory`, and the same elements in a tensor of `held`.
    """
    of_dtype: dict[torch.dtype, torch.Tensor] = {}
    for variable, box, place in cells:
        for block in held.get(variable, ()):
            common = box.intersect(block.box)
            if common is None:
                continue
            dtype, itemsize = block.tensor.dtype, block.tensor.element_size()
            if dtype not in of_dtype:
                of_dtype[dtype] = torch.frombuffer(memory, dtype=dtype, count=len(memory) // itemsize)
            start = place // itemsize + first_element(common.relative_to(box), box.shape)
            there = of_dtype[dtype].as_strided(common.shape, row_major_strides(box.shape), start)
            yield there, sub_tensor(block.tensor, common, block.box)


def shared_arrays(
    cells: Iterable[Cell], memory: memoryview, held: Mapping[int, Sequence[HeldArray]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As `shared_parts`, but with arrays."""
    for variable, box, place in cells:
        for block in held.get(variable, ()):
            overlap = box.overlap(block.box)
            if overlap is not None:
                there = np.ndarray(box.shape, block.array.dtype, memory, place)
                yield there[overlap.own], block.array[overlap.others]


def pack(parcel: Parcel, unit: memoryview, variables: Mapping[int, InFile], message: memoryview) -> None:
    """Copy the cells of a parcel from its unit into a message.

    Args:
        parcel: The parcel.
        unit: The bytes of the unit.
        variables: The variables by index.
        message: Receives the bytes; at least `parcel.nbytes`.
    """
    for (variable, box, place), origin in zip(parcel.cells, parcel.origins, strict=True):
        dtype = f"V{variables[variable].itemsize}"
        overlap = origin.box.overlap(box)
        assert overlap is not None, "it contains the box"
        source = np.ndarray(origin.box.shape, dtype, unit, origin.place)
        np.copyto(np.ndarray(box.shape, dtype, message, place), source[overlap.own])


def transfers(unit: Unit, variables: Mapping[int, InFile]) -> Iterator[tuple[int, int, int]]:
    """The system calls that move a unit. Ranges that are adjacent both in the file and in memory are joined.

    Yields:
        (position in the file, position in memory, size) of each call, in bytes.
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
        OSError: Writing failed; names a variable of the unit.
    """
    for offset, place, nbytes in transfers(unit, variables):
        try:
            rawio.write_all(fd, memory[place : place + nbytes], offset)
        except OSError as error:
            key = variables[unit[0].variable].key
            raise OSError(error.errno, f"{error.strerror}: {key}, {nbytes} bytes at byte {offset}") from error
        writeback.add(offset, nbytes)


class UnitReader:
    """Reads units, and verifies the pieces that it reads whole.

    Units are read in one or more streams, as `PieceVerifier` describes them. Threads may read different streams.

    Args:
        fd: Descriptor of the file.
        variables: The variables by index.
        pieces: The sorted pieces of each variable to be verified, by index of the variable.
        checksums: The file's checksums; None verifies nothing.
    """

    def __init__(
        self,
        fd: int,
        variables: Mapping[int, InFile],
        pieces: Mapping[int, list[PieceSpan]],
        checksums: Checksums | None,
    ) -> None:
        self._fd = fd
        self._variables = variables
        self._verifier = PieceVerifier(variables, pieces, checksums, PieceRead)
        self._bytes_read: dict[int, int] = {}  # by stream

    @property
    def report(self) -> ReadReport:
        """The bytes read and verified so far."""
        return ReadReport(sum(self._bytes_read.values()), self._verifier.bytes_verified)

    def read(self, unit: Unit, memory: memoryview, stream: int = 0) -> None:
        """Read a unit into memory.

        Raises:
            CorruptCheckpointError: The file is too short, or a checksum is wrong.
        """
        for offset, place, nbytes in transfers(unit, self._variables):
            try:
                rawio.read_into(self._fd, memory[place : place + nbytes], offset)
            except CorruptCheckpointError as error:
                raise CorruptCheckpointError(f"{self._variables[unit[0].variable].key}: {error}") from error
            self._bytes_read[stream] = self._bytes_read.get(stream, 0) + nbytes
        self._verifier.feed(unit, memory, stream)


def taken_verifier(
    variables: Mapping[int, InFile],
    pieces: Mapping[int, Collection[PieceSpan]],
    held: Mapping[int, Sequence[Held]],
    checksums: Checksums | None,
) -> PieceVerifier:
    """Make a verifier for the strided pieces that a rank takes whole, from units, into one of its packed tensors.

    Args:
        variables: The variables by index.
        pieces: The sorted pieces of each variable.
        held: The boxes that the rank takes.
        checksums: The file's checksums; None verifies nothing.
    """
    tensors: dict[PieceSpan, torch.Tensor] = {}
    for index, blocks in held.items():
        packed = {block.box: block.tensor for block in blocks if is_packed(block.tensor)}
        for piece, box in strided_pieces_within(pieces[index], packed).items():
            tensors[piece] = sub_tensor(packed[box], piece.box, box)
    own = {index: [piece for piece in pieces[index] if piece in tensors] for index in held}

    def opened(piece: PieceSpan, variable: InFile) -> PieceTaken:
        return PieceTaken(piece, variable, tensors[piece])

    return PieceVerifier(variables, own, checksums, opened)
