"""Checksums of pieces: xxh3-64 of a piece's bytes in row-major order, one uint64 each in the dataset `/.checksums`."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Protocol, SupportsInt

import msgspec
import numpy as np
import xxhash

from distckpt.errors import CorruptCheckpointError
from distckpt.layout.box import Box
from distckpt.storage import rawio

#: Bytes per checksum in the file.
CHECKSUM_NBYTES = 8

#: Number of checksums that are read at once.
_BLOCK = 4096


def require_checksum(key: str, box: Box, nbytes: int, expected: int, got: int) -> None:
    """Compare the checksum of a piece.

    Args:
        key: Checkpoint key of the variable.
        box: The piece.
        nbytes: Its size in bytes.
        expected: What the file says.
        got: What its bytes give.

    Raises:
        CorruptCheckpointError: They differ.
    """
    if got != expected:
        raise CorruptCheckpointError(
            f"{key}: the {nbytes} bytes of the piece of shape {box.shape} at {box.offset} are damaged. "
            f"Expected checksum {expected:016x}. Got {got:016x}. Restore another checkpoint."
        )


#: The checksum of bytes; and what computes it of bytes that come in parts.
digest = xxhash.xxh3_64_intdigest
Hasher = xxhash.xxh3_64


class StoredChecksums(msgspec.Struct, frozen=True):
    """Where the checksums of a file are.

    Attributes:
        total: Number of checksums.
        offset: Position of the first one in the file, in bytes.
        values: All of them as uint64, if they are not one range of the file since another program has rewritten it.
    """

    total: int
    offset: int
    values: bytes | None = None


class Checksums(Protocol):
    """Gives the checksum of a piece by its index."""

    def __getitem__(self, index: int, /) -> SupportsInt:
        """The checksum of a piece."""


class ChecksumReader:
    """The checksums of a file, read in blocks when needed: a rank needs few of those that thousands of ranks wrote.

    Args:
        fd: Descriptor of the file.
        stored: Where they are.
    """

    def __init__(self, fd: int, stored: StoredChecksums) -> None:
        self._fd = fd
        self._stored = stored
        self._blocks: dict[int, list[int]] = {}

    def __getitem__(self, index: int) -> int:
        """The checksum of a piece.

        Raises:
            CorruptCheckpointError: The file is too short.
        """
        number, place = divmod(index, _BLOCK)
        block = self._blocks.get(number)
        if block is None:
            block = self._blocks[number] = self._read(number * _BLOCK)
        return block[place]

    def _read(self, start: int) -> list[int]:
        stored = self._stored
        count = min(_BLOCK, stored.total - start)
        if stored.values is None:
            data = bytearray(CHECKSUM_NBYTES * count)
            rawio.read_into(self._fd, memoryview(data), stored.offset + CHECKSUM_NBYTES * start)
            values = np.frombuffer(data, np.uint64)
        else:
            values = np.frombuffer(stored.values, np.uint64, count, CHECKSUM_NBYTES * start)
        block: list[int] = values.tolist()  # of NumPy's integers each would have to be converted
        return block


@dataclass(slots=True)
class ChecksumLog:
    """The checksums of the pieces that this rank wrote.

    Attributes:
        indices: int64, index of each in the checksum dataset.
        values: uint64, xxh3-64 of each.
    """

    # Arrays of Python, which grow, and of which NumPy makes its own without a look at each number.
    indices: array[int] = field(default_factory=lambda: array("q"))
    values: array[int] = field(default_factory=lambda: array("Q"))

    def add(self, index: int, value: int) -> None:
        """Add one checksum."""
        self.indices.append(index)
        self.values.append(value)

    def extend(self, other: ChecksumLog) -> None:
        """Add those of another log."""
        self.indices += other.indices
        self.values += other.values

    def write(self, fd: int, dataset_offset: int) -> None:
        """Write all of them with one `pwrite` per run of consecutive indices.

        Args:
            fd: Descriptor of the file.
            dataset_offset: Position of the checksum dataset in the file, in bytes.
        """
        if not self.indices:
            return
        indices = np.frombuffer(self.indices, np.int64)
        order = np.argsort(indices, kind="stable")
        indices = indices[order]
        values = np.frombuffer(self.values, np.uint64)[order].astype("<u8", copy=False).data.cast("B")
        starts = np.flatnonzero(np.diff(indices, prepend=indices[0] - 2) != 1).tolist()
        for start, stop in zip(starts, [*starts[1:], len(indices)], strict=True):
            run = values[start * CHECKSUM_NBYTES : stop * CHECKSUM_NBYTES]
            rawio.write_all(fd, run, dataset_offset + int(indices[start]) * CHECKSUM_NBYTES)
