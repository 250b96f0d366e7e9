"""Room in host memory for bytes on the way between the file and tensors that are not packed."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch

from distckpt.layout.box import MAX_PIECE_NBYTES
from distckpt.storage.device import Copy, DeviceCopies, Ticket, gpu_of, pinned_memory
from distckpt.storage.transfer import copy_bits
from distckpt.tensor_bytes import bytes_of

#: Bytes of the one buffer for tensors of the CPU.
HOST_NBYTES = 2 * MAX_PIECE_NBYTES

#: Bytes of each of the two buffers for tensors of GPUs.
PINNED_NBYTES = MAX_PIECE_NBYTES

#: Positions in a buffer are multiples of the largest element. In bytes.
ALIGNMENT = 16


def padded(nbytes: int) -> int:
    """What `take` uses up for this many bytes."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Room(NamedTuple):
    """Room in a buffer.

    Attributes:
        tensor: The room as a contiguous tensor.
        data: The same memory as bytes.
    """

    tensor: torch.Tensor
    data: memoryview


class Buffer:
    """Memory, made when first needed; room in it is taken until `clear`.

    Args:
        nbytes: Its size in bytes.
        pinned: For copies from or to GPUs.
    """

    def __init__(self, nbytes: int, *, pinned: bool = False) -> None:
        self._nbytes = nbytes
        self._pinned = pinned
        self._memory: torch.Tensor | None = None
        self._used = 0

    def has_room(self, nbytes: int) -> bool:
        """Whether `take` can be called for this many bytes."""
        return self._used + nbytes <= self._nbytes

    def take(self, like: torch.Tensor) -> Room:
        """Room for the elements of `like`."""
        if self._memory is None:
            self._memory = pinned_memory(self._nbytes) if self._pinned else torch.empty(self._nbytes, dtype=torch.uint8)
        nbytes = like.numel() * like.element_size()
        room = self._memory.narrow(0, self._used, nbytes)
        self._used += padded(nbytes)
        return Room(room.view(like.dtype).view(like.shape), bytes_of(room))

    def clear(self) -> None:
        """Take all room back; what was taken is not used any more."""
        self._used = 0


class Arrivals:
    """Room for bytes from the file, and their way on into tensors.

    GPUs take what is in one pinned buffer while the other one is filled. The order of calls: `make_room`, `take` as
    often as there is room, `put` for each room when its bytes are there, and again. When the context ends, whatever
    happened, all that was put is in the tensors.
    """

    def __init__(self) -> None:
        self._host = Buffer(HOST_NBYTES)
        self._filling = Buffer(PINNED_NBYTES, pinned=True)
        self._leaving = Buffer(PINNED_NBYTES, pinned=True)
        self._ticket = Ticket([])
        self._waiting: list[Copy] = []
        self._copies = DeviceCopies()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._start()
        finally:
            self._copies.finish()

    def make_room(self, nbytes: int) -> None:
        """Room for so many bytes, at most `PINNED_NBYTES`; all that was taken so far was put."""
        self._host.clear()
        if not self._filling.has_room(nbytes):
            self._change_buffers()

    def take(self, target: torch.Tensor) -> Room:
        """Room for the elements of a tensor."""
        return (self._host if gpu_of(target) is None else self._filling).take(target)

    def put(self, target: torch.Tensor, room: Room) -> None:
        """Copy what is now in the room into the tensor; into those of GPUs by the end of the context."""
        gpu = gpu_of(target)
        if gpu is None:
            copy_bits(target, room.tensor)
        else:
            self._waiting.append(Copy(gpu, target, room.tensor))

    def _change_buffers(self) -> None:
        before, self._ticket = self._ticket, self._start()
        before.wait()
        self._filling, self._leaving = self._leaving, self._filling
        self._filling.clear()

    def _start(self) -> Ticket:
        copies, self._waiting = self._waiting, []
        return self._copies.start(copies)
