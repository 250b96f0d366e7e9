"""Memory that the ranks of one node share: each has a part of its own, and sees those of the others."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distckpt.coordination.collectives import Collectives

if TYPE_CHECKING:
    from mpi4py import MPI


class SharedMemory:
    """One part per rank of a node.

    Between two fences a rank may write its own part, or what the ranks have agreed on of another part; what was
    written before a fence is seen by all ranks after it.

    Attributes:
        parts: The memory of each rank.

    Args:
        window: The memory; None for a rank that is the only one of its node.
        parts: Its parts.
    """

    def __init__(self, window: MPI.Win | None, parts: list[memoryview]) -> None:
        self._window = window
        self.parts = parts

    def fence(self, any_set: Callable[[bool], bool], *, failed: bool) -> bool:
        """Wait for all ranks, and hear whether any has failed. Collective.

        Args:
            any_set: `Coordinator.any_set` of the ranks that are waited for: those of the node, or more.
            failed: Whether this one has.
        """
        self._sync()
        any_failed = any_set(failed)
        self._sync()
        return any_failed

    def free(self) -> None:
        """Give the memory back; nobody uses it any more. Collective over the node."""
        self.parts = []
        if self._window is not None:
            self._window.Unlock_all()
            self._window.Free()

    def _sync(self) -> None:
        if self._window is not None:
            self._window.Sync()


def allocate(comm: Any, collectives: Collectives, nbytes: int) -> SharedMemory | None:
    """Shared memory of `nbytes` for every rank of a node. Collective over the node.

    Returns:
        The memory, or None on all ranks where there is none to be had.
    """
    memory = _allocate(comm, collectives.size, nbytes)
    # What some ranks have got is left to the end of the job: to free it, all ranks must.
    return None if collectives.any_set(memory is None) else memory


def _allocate(comm: Any, size: int, nbytes: int) -> SharedMemory | None:
    if size == 1:
        return _private(nbytes)
    from mpi4py import MPI

    try:
        window = MPI.Win.Allocate_shared(nbytes, 1, comm=comm)
        window.Lock_all()
        return SharedMemory(window, [_bytes_of(window, rank) for rank in range(size)])
    except (MPI.Exception, MemoryError):
        return None


def _private(nbytes: int) -> SharedMemory | None:
    try:
        # At a page, as the bytes of files are in the system's cache: x86 copies several times slower to an address that
        # is a few bytes behind its source modulo 4 KiB (Intel: Optimization Reference Manual, "4 KiB aliasing"), which
        # is where large bytearrays and arrays begin.
        return SharedMemory(None, [memoryview(mmap.mmap(-1, nbytes))])
    except OSError:
        return None


def _bytes_of(window: Any, rank: int) -> memoryview:
    return memoryview(window.Shared_query(rank)[0]).cast("B")
