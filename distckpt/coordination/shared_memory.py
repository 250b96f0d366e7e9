"""Memory shared by the ranks of one node: each rank has a part of its own, and sees those of the others.

It is a file in memory (memfd_create(2)) that rank 0 of the node makes and the others open through /proc. A window of
MPI would do, if it could fail: where /dev/shm is full, or a rank has no descriptor left, ranks of Open MPI 4.1 wait for
ever, or end with a segmentation fault.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distckpt.coordination.collectives import Collectives

#: What rank 0 tells of its file: process id, descriptor, device and inode; zeros if it has none.
_PLACE = struct.Struct("<4Q")

_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

_MFD_CLOEXEC = 1


class SharedMemory:
    """Shared memory with one part for each rank of a node. Made by `allocate`, given back by `free`.

    Between two agreements of all ranks a rank may write its own part, and bytes of other parts that the ranks have
    agreed on. All ranks see after an agreement the bytes that were written before it: no rank leaves it before all have
    come, and messages within a node are themselves passed on through memory or the kernel.

    Attributes:
        parts: The part of each rank.
    """

    def __init__(self, whole: memoryview, size: int) -> None:
        """Divide memory among `size` ranks."""
        nbytes = len(whole) // size
        self.parts = [whole[rank * nbytes : (rank + 1) * nbytes] for rank in range(size)]

    def free(self) -> None:
        """Give this rank's view of the memory back; it must not be used any more. Local."""
        self.parts = []


def allocate(collectives: Collectives, nbytes: int) -> SharedMemory | None:
    """Allocate shared memory of `nbytes` bytes, whole pages, for every rank of a node. Collective over the node.

    Returns:
        The memory; None on all ranks if any cannot allocate it.
    """
    memory = _allocate(collectives, nbytes)
    return None if collectives.any_set(memory is None) else memory


def _allocate(collectives: Collectives, nbytes: int) -> SharedMemory | None:
    """This rank's view of new shared memory; None if it cannot have one. Collective over the node."""
    size = collectives.size
    if size == 1:
        return _view(-1, nbytes, size)
    with _file_of(collectives, size * nbytes) as fd:
        return None if fd is None else _view(fd, size * nbytes, size)


def _view(fd: int, nbytes: int, size: int) -> SharedMemory | None:
    try:
        # Page-aligned, as the bytes of files in the page cache are: x86 copies several times slower to an address that
        # is a few bytes after its source modulo 4 KiB (Intel: Optimization Reference Manual, "4 KiB aliasing"), as the
        # memory of large bytearrays and arrays is.
        return SharedMemory(_map(fd, nbytes), size)
    except Exception:  # whatever it is: the other ranks wait for this one
        return None


def _map(fd: int, nbytes: int) -> memoryview:
    """Map memory, of a file or, with -1, of this process; it is unmapped with the last view of it.

    `mmap.mmap` would keep a descriptor as long, which is until the next garbage collection after an error.
    """
    flags = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    if address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    array = (ctypes.c_ubyte * nbytes).from_address(address)
    weakref.finalize(array, _libc.munmap, address, nbytes).atexit = False
    return memoryview(array).cast("B")


@contextmanager
def _file_of(collectives: Collectives, nbytes: int) -> Iterator[int | None]:
    """This rank's descriptor of a new file in memory; None if it has none. Collective over the node, at both ends."""
    place = bytearray(_PLACE.size)
    fd = _make(nbytes, place) if collectives.rank == 0 else None
    collectives.broadcast(place)
    if collectives.rank != 0:
        fd = _open(place)
    try:
        yield fd
    finally:
        collectives.any_set(False)  # rank 0 closes its descriptor when the others have opened theirs
        if fd is not None:
            os.close(fd)


def _make(nbytes: int, place: bytearray) -> int | None:
    """Make a file in memory, and put down where it is. Rank 0 only."""
    fd = None
    try:
        fd = _memory_file()
        os.ftruncate(fd, nbytes)
        status = os.fstat(fd)
    except Exception:  # whatever it is: the other ranks wait to hear of the file
        if fd is not None:
            os.close(fd)
        return None
    _PLACE.pack_into(place, 0, os.getpid(), fd, status.st_dev, status.st_ino)
    return fd


def _memory_file() -> int:
    """Make an empty file in memory, and return its descriptor."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("distckpt")
    # Pythons that were built against an old C library lack it, such as those of conda.
    fd: int = _libc.memfd_create(b"distckpt", _MFD_CLOEXEC)
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd


def _open(place: bytearray) -> int | None:
    """Open the file of rank 0, whose process may be unknown here or another one, as in another container."""
    try:
        pid, number, device, inode = _PLACE.unpack(place)
        path = Path(f"/proc/{pid}/fd/{number}")
        status = path.stat()
        same = (status.st_dev, status.st_ino) == (device, inode)
        return os.open(path, os.O_RDWR | os.O_CLOEXEC) if same else None
    except Exception:  # whatever it is: the other ranks wait for this one
        return None
