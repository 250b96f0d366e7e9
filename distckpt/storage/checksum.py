"""Checksums of pieces: xxh3-64 of a piece's bytes in row-major order, one uint64 each in the dataset `/.checksums`."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import xxhash

from distckpt.errors import CorruptCheckpointError
from distckpt.layout.box import Box
from distckpt.storage import rawio

#: Bytes per checksum in the file.
CHECKSUM_NBYTES = 8


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


digest = xxhash.xxh3_64_intdigest
Hasher = xxhash.xxh3_64


@dataclass(slots=True)
class ChecksumLog:
    """The checksums of the pieces that this rank wrote.

    Attributes:
        indices: Index of each in the checksum dataset.
        values: xxh3-64 of each.
    """

    indices: list[int] = field(default_factory=list)
    values: list[int] = field(default_factory=list)

    def add(self, index: int, value: int) -> None:
        """Note one checksum."""
        self.indices.append(index)
        self.values.append(value)

    def write(self, fd: int, dataset_offset: int) -> None:
        """Write all of them with one `pwrite` per run of consecutive indices.

        Args:
            fd: Descriptor of the file.
            dataset_offset: Position of the checksum dataset in the file, in bytes.
        """
        if not self.indices:
            return
        indices = np.array(self.indices, np.int64)
        order = np.argsort(indices, kind="stable")
        indices = indices[order]
        values = np.array(self.values, "<u8")[order].data.cast("B")
        starts = np.flatnonzero(np.diff(indices, prepend=indices[0] - 2) != 1).tolist()
        for start, stop in zip(starts, [*starts[1:], len(indices)], strict=True):
            run = values[start * CHECKSUM_NBYTES : stop * CHECKSUM_NBYTES]
            rawio.write_all(fd, run, dataset_offset + int(indices[start]) * CHECKSUM_NBYTES)
