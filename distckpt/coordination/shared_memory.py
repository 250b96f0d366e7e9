"""Memory shared by the ranks of one node: each rank has a part of its own, and sees those of the others."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distckpt.coordination.collectives import Collectives

if TYPE_CHECKING:
    from mpi4py import MPI


class SharedMemory:
    """Shared memory with one part for each rank of a node. Made by `allocate`, given back by `free`.

    Between two fences a rank may write its own part, and bytes of other parts that the ranks have agreed on. All ranks
    see after a fence the bytes that were written before it.

    Attributes:
        parts: The part of each rank.

    Args:
        window: The MPI window; None on a node with a single rank.
        parts: The part of each rank.
    """

    def __init__(self, window: MPI.Win | None, parts: list[memoryview]) -> None:
        self._window = window
        self.parts = parts

    def fence(self, any_set: Callable[[bool], bool], *, failed: bool) -> bool:
        """Wait for all ranks, and return whether any has failed. Collective over the ranks of `any_set`.

        Args:
            any_set: `Coordinator.any_set` of the ranks to wait for: those of the node, or more.
            failed: Whether this rank has failed.
        """
        self._sync()
        any_failed = any_set(failed)
        self._sync()
        return any_failed

    def free(self) -> None:
        """Give the memory back; it must not be used any more. Collective over the node."""
        self.parts = []
        if self._window is not None:
            self._window.Unlock_all()
            self._window.Free()

    def _sync(self) -> None:
        if self._window is not None:
            self._window.Sync()


def allocate(comm: Any, collectives: Collectives, nbytes: int) -> SharedMemory | None:
    """Allocate shared memory of `nbytes` bytes for every rank of a node. Collective over the node.

    Returns:
        The memory; None on all ranks if any cannot allocate it.
    """
    memory = _allocate(comm, collectives.size, nbytes)
    # Memory that only some ranks have got stays allocated until the end of the job, as freeing it takes all ranks.
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
        # Page-aligned, as the bytes of files in the page cache are: x86 copies several times slower to an address that
        # is a few bytes after its source modulo 4 KiB (Intel: Optimization Reference Manual, "4 KiB aliasing"), as the
        # memory of large bytearrays and arrays is.
        return SharedMemory(None, [memoryview(mmap.mmap(-1, nbytes))])
    except OSError:
        return None


def _bytes_of(window: Any, rank: int) -> memoryview:
    return memoryview(window.Shared_query(rank)[0]).cast("B")
