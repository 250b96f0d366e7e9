"""Memory that the ranks of one node share: each has a part of its own, and sees those of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distckpt.coordination.collectives import Collectives

if TYPE_CHECKING:
    from mpi4py import MPI


class SharedMemory:
    """One part per rank of a node.

    Between two fences a rank may write its own part, or what the ranks have agreed on of another; what was written
    before a fence is seen by all ranks after it.

    Attributes:
        parts: The memory of each rank.
    """

    def __init__(self, window: MPI.Win, collectives: Collectives) -> None:
        self._window = window
        self._collectives = collectives
        self._window.Lock_all()
        self.parts = [_bytes_of(window, rank) for rank in range(collectives.size)]

    def fence(self, *, failed: bool) -> bool:
        """Wait for all ranks of the node, and hear whether any has failed. Collective over the node."""
        self._window.Sync()
        any_failed = self._collectives.any_set(failed)
        self._window.Sync()
        return any_failed

    def free(self) -> None:
        """Give the memory back; nobody uses it any more. Collective over the node."""
        self.parts = []
        self._window.Unlock_all()
        self._window.Free()


def allocate(comm: Any, collectives: Collectives, nbytes: int) -> SharedMemory | None:
    """Shared memory of `nbytes` for every rank of a node. Collective over the node.

    Returns:
        The memory, or None on all ranks where there is none to be had.
    """
    memory = _allocate(comm, collectives, nbytes)
    # What some ranks have got is left to the end of the job: to free it, all ranks must.
    return None if collectives.any_set(memory is None) else memory


def _allocate(comm: Any, collectives: Collectives, nbytes: int) -> SharedMemory | None:
    from mpi4py import MPI

    try:
        return SharedMemory(MPI.Win.Allocate_shared(nbytes, 1, comm=comm), collectives)
    except (MPI.Exception, MemoryError):
        return None


def _bytes_of(window: Any, rank: int) -> memoryview:
    return memoryview(window.Shared_query(rank)[0]).cast("B")
