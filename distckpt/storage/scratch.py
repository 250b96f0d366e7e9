"""Scratch memory, for targets that bytes of the file are better not read into directly."""

from __future__ import annotations

import ctypes
import platform

import torch

from distckpt.tensor_bytes import bytes_of

_PAGE_NBYTES = 4096

#: x86 copies several times slower to an address that lies 1 to 31 bytes behind the source, modulo a page. NumPy's large
#: arrays begin 16 bytes behind a page, and what is read into them lies at a page of the system's cache.
_SLOW_NBYTES = 32 if platform.machine() in {"x86_64", "AMD64"} else 0

#: Scratch memory lies so far behind the source, modulo a page: copies to it and from it to slow targets are fast.
_DISTANCE_NBYTES = 64


def is_slow_target(data: memoryview, offset: int) -> bool:
    """Whether memory is filled faster by way of a scratch buffer.

    Args:
        data: The memory, writeable and not empty.
        offset: Position in the file of what goes there, in bytes.
    """
    address = ctypes.addressof(ctypes.c_char.from_buffer(data))
    return 0 < (address - offset) % _PAGE_NBYTES < _SLOW_NBYTES


class Scratch:
    """A buffer that grows to the size that is asked for, and is used again."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def room_for(self, offset: int, nbytes: int) -> memoryview:
        """Room for bytes from this position of a file; valid until the next call."""
        if self._memory is None or self._memory.nbytes < nbytes + _PAGE_NBYTES:
            self._memory = torch.empty(nbytes + _PAGE_NBYTES, dtype=torch.uint8, device="cpu")
        start = (offset + _DISTANCE_NBYTES - self._memory.data_ptr()) % _PAGE_NBYTES
        return bytes_of(self._memory)[start : start + nbytes]
