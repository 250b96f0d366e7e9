"""Bytes and arrays between ranks: MPI collectives on buffers allocated before, so that no rank fails halfway."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from distckpt.coordination.message import Buffer

if TYPE_CHECKING:
    from mpi4py import MPI

_TAG = 1
#: Bytes per MPI call; counts and displacements are 32-bit.
CALL_LIMIT = 1 << 30


class Collectives(Protocol):
    """The collective operations that a coordinator needs. Every method is collective over the communicator."""

    rank: int
    size: int

    def any_set(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""

    def maximum(self, array: np.ndarray[Any, Any]) -> None:
        """Replace the array, uint8, by its elementwise maximum over all ranks."""

    def lengths(self, length: int) -> list[int]:
        """The length that each rank passes, in rank order."""

    def broadcast(self, buffer: Buffer) -> None:
        """Fill the buffer with the bytes of rank 0's, which has the same length."""

    def gather(self, value: Buffer, lengths: Sequence[int], buffer: bytearray | memoryview, root: int = 0) -> None:
        """Concatenate the values of all ranks in the buffer of rank `root`; the others pass an empty one.

        The root passes the length of each value. The others may pass any lengths, as long as their sum is above
        `CALL_LIMIT` exactly if the root's is.
        """

    def gather_rows(self, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        """Gather rows of the same length and type on rank 0: one row for each rank; None on the others."""

    def scatter(self, values: bytes, lengths: Sequence[int], buffer: bytearray) -> None:
        """Fill each rank's buffer with its value, from the concatenated values on rank 0; the others pass none.

        Rank 0 passes the length of each value; the others may pass any lengths with the same sum.
        """


class SingleRank:
    """Collectives of a single process; needs no MPI."""

    rank = 0
    size = 1

    def any_set(self, flag: bool) -> bool:
        """See `Collectives.any_set`."""
        return flag

    def maximum(self, array: np.ndarray[Any, Any]) -> None:
        """See `Collectives.maximum`."""

    def lengths(self, length: int) -> list[int]:
        """See `Collectives.lengths`."""
        return [length]

    def broadcast(self, buffer: Buffer) -> None:
        """See `Collectives.broadcast`."""

    def gather(self, value: Buffer, lengths: Sequence[int], buffer: bytearray | memoryview, root: int = 0) -> None:
        """See `Collectives.gather`."""
        buffer[:] = value

    def gather_rows(self, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        """See `Collectives.gather_rows`."""
        return row[np.newaxis]

    def scatter(self, values: bytes, lengths: Sequence[int], buffer: bytearray) -> None:
        """See `Collectives.scatter`."""
        buffer[:] = values


class MpiCollectives:
    """Collectives over an mpi4py communicator that nobody else uses."""

    def __init__(self, comm: MPI.Intracomm, call_limit: int = CALL_LIMIT) -> None:
        from mpi4py import MPI

        self.rank = comm.rank
        self.size = comm.size
        self._comm = comm
        self._byte, self._max, self._in_place = MPI.BYTE, MPI.MAX, MPI.IN_PLACE
        self._limit = call_limit

    def any_set(self, flag: bool) -> bool:
        """See `Collectives.any_set`."""
        value = np.array([flag], dtype=np.uint8)
        self._comm.Allreduce(self._in_place, value, op=self._max)
        return bool(value[0])

    def maximum(self, array: np.ndarray[Any, Any]) -> None:
        """See `Collectives.maximum`."""
        for start in range(0, array.size, self._limit):
            self._comm.Allreduce(self._in_place, array[start : start + self._limit], op=self._max)

    def lengths(self, length: int) -> list[int]:
        """See `Collectives.lengths`."""
        lengths = np.empty(self.size, dtype=np.int64)
        self._comm.Allgather(np.array([length], dtype=np.int64), lengths)
        return lengths.tolist()

    def broadcast(self, buffer: Buffer) -> None:
        """See `Collectives.broadcast`."""
        for part in self._parts(buffer):
            self._comm.Bcast((part, self._byte))

    def gather(self, value: Buffer, lengths: Sequence[int], buffer: bytearray | memoryview, root: int = 0) -> None:
        """See `Collectives.gather`."""
        if sum(lengths) <= self._limit:
            target = (buffer, list(lengths), starts_of(lengths), self._byte) if self.rank == root else None
            self._comm.Gatherv((value, self._byte), target, root)
        elif self.rank == root:
            start = sum(lengths[:root])
            buffer[start : start + len(value)] = value
            for rank, part in self._parts_of_others(buffer, lengths):
                self._comm.Recv((part, self._byte), rank, _TAG)
        else:
            for part in self._parts(value):
                self._comm.Send((part, self._byte), root, _TAG)

    def gather_rows(self, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        """See `Collectives.gather_rows`."""
        rows = np.empty((self.size, row.size), row.dtype) if self.rank == 0 else None
        self._comm.Gather(row, rows)
        return rows

    def scatter(self, values: bytes, lengths: Sequence[int], buffer: bytearray) -> None:
        """See `Collectives.scatter`."""
        if sum(lengths) <= self._limit:
            source = (values, list(lengths), starts_of(lengths), self._byte) if self.rank == 0 else None
            self._comm.Scatterv(source, (buffer, self._byte))
        elif self.rank == 0:
            buffer[:] = memoryview(values)[: lengths[0]]
            for rank, part in self._parts_of_others(values, lengths):
                self._comm.Send((part, self._byte), rank, _TAG)
        else:
            for part in self._parts(buffer):
                self._comm.Recv((part, self._byte), 0, _TAG)

    def _parts(self, buffer: Buffer) -> Iterator[memoryview]:
        """The buffer in parts that one MPI call can move, of at most `CALL_LIMIT` bytes."""
        view = memoryview(buffer)
        for start in range(0, len(view), self._limit):
            yield view[start : start + self._limit]

    def _parts_of_others(self, buffer: Buffer, lengths: Sequence[int]) -> Iterator[tuple[int, memoryview]]:
        """(rank, part) for the other ranks' parts of this rank's buffer, in the order in which these move them."""
        for rank, (start, length) in enumerate(zip(starts_of(lengths), lengths, strict=True)):
            for part in self._parts(memoryview(buffer)[start : start + length]) if rank != self.rank else ():
                yield rank, part


def starts_of(lengths: Sequence[int]) -> list[int]:
    """The position of each of some concatenated values."""
    return [0, *itertools.accumulate(lengths)][:-1]
