"""Scratch memory, for targets into which it is slow to read bytes of the file directly."""

from __future__ import annotations

import ctypes
import platform

import torch

from distckpt.tensor_bytes import bytes_of

_PAGE_NBYTES = 4096

#: x86 copies several times slower to an address that lies 1 to 31 bytes after the source, modulo a page. NumPy's large
#: arrays begin 16 bytes after a page boundary, while bytes of the file are page-aligned in the page cache.
_SLOW_NBYTES = 32 if platform.machine() in {"x86_64", "AMD64"} else 0

#: Distance of scratch memory from the source, modulo a page, at which copies to it, and from it to slow targets, are
#: fast. In bytes.
_DISTANCE_NBYTES = 64


def is_slow_target(data: memoryview, offset: int) -> bool:
    """Whether memory is filled faster through a scratch buffer.

    Args:
        data: The memory, writeable and not empty.
        offset: Position in the file of the bytes that go there, in bytes.
    """
    address = ctypes.addressof(ctypes.c_char.from_buffer(data))
    return 0 < (address - offset) % _PAGE_NBYTES < _SLOW_NBYTES


class Scratch:
    """A buffer that is reused, and grows to the size requested."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def room_for(self, offset: int, nbytes: int) -> memoryview:
        """Memory for `nbytes` bytes at position `offset` of a file; valid until the next call."""
        if self._memory is None or self._memory.nbytes < nbytes + _PAGE_NBYTES:
            self._memory = torch.empty(nbytes + _PAGE_NBYTES, dtype=torch.uint8, device="cpu")
        start = (offset + _DISTANCE_NBYTES - self._memory.data_ptr()) % _PAGE_NBYTES
        return bytes_of(self._memory)[start : start + nbytes]
