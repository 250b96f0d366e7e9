"""Nonblocking collectives for the background thread, which polls and sleeps until the other ranks have come.

Blocking collectives would keep a core busy that the program needs, for as long as the slowest rank takes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distckpt.coordination.collectives import CALL_LIMIT, starts_of
from distckpt.coordination.message import Buffer
from distckpt.errors import CheckpointError

if TYPE_CHECKING:
    from mpi4py import MPI

#: Seconds between two polls, at first and at most: ranks that work alike come within a fraction of a millisecond.
_FIRST_NAP = 50e-6
_NAP = 0.001


class PolledCollectives:
    """`Collectives` for short messages: agreement, texts of errors, small results of rank 0."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        from mpi4py import MPI

        self.rank = comm.rank
        self.size = comm.size
        self._comm = comm
        self._byte, self._max, self._in_place = MPI.BYTE, MPI.MAX, MPI.IN_PLACE
        self._closed = False

    def close(self) -> None:
        """Make pending and later calls raise, since MPI or the communicator is about to end. Local."""
        self._closed = True

    def any_set(self, flag: bool) -> bool:
        """See `Collectives.any_set`."""
        value = np.array([flag], dtype=np.uint8)
        self.maximum(value)
        return bool(value[0])

    def maximum(self, array: np.ndarray[Any, Any]) -> None:
        """See `Collectives.maximum`."""
        self._require_open()
        self._wait(self._comm.Iallreduce(self._in_place, array, op=self._max))

    def lengths(self, length: int) -> list[int]:
        """See `Collectives.lengths`."""
        self._require_open()
        own, lengths = np.array([length], dtype=np.int64), np.empty(self.size, dtype=np.int64)
        self._wait(self._comm.Iallgather(own, lengths))
        return lengths.tolist()

    def broadcast(self, buffer: Buffer) -> None:
        """See `Collectives.broadcast`."""
        view = memoryview(buffer)
        for start in range(0, len(view), CALL_LIMIT):
            self._require_open()
            self._wait(self._comm.Ibcast((view[start : start + CALL_LIMIT], self._byte)))

    def gather(self, value: Buffer, lengths: Sequence[int], buffer: bytearray | memoryview, root: int = 0) -> None:
        """See `Collectives.gather`."""
        self._require_open()
        target = (buffer, list(lengths), starts_of(lengths), self._byte) if self.rank == root else None
        self._wait(self._comm.Igatherv((value, self._byte), target, root))

    def gather_rows(self, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        """See `Collectives.gather_rows`."""
        self._require_open()
        rows = np.empty((self.size, row.size), row.dtype) if self.rank == 0 else None
        self._wait(self._comm.Igather(row, rows))
        return rows

    def scatter(self, values: bytes, lengths: Sequence[int], buffer: bytearray) -> None:
        """See `Collectives.scatter`."""
        self._require_open()
        source = (values, list(lengths), starts_of(lengths), self._byte) if self.rank == 0 else None
        self._wait(self._comm.Iscatterv(source, (buffer, self._byte)))

    def _wait(self, request: MPI.Request) -> None:
        nap = _FIRST_NAP
        while not request.Test():
            time.sleep(nap)
            nap = min(2 * nap, _NAP)
            self._require_open()

    def _require_open(self) -> None:
        if self._closed:
            raise CheckpointError(
                "MPI or the communicator ended before all ranks had finished the save in the background. Call result() "
                "on every rank before that."
            )
