"""Staging buffers in host memory, for bytes between the file and tensors that are on GPUs or not packed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple, Self

import torch

from distckpt.device import Copy, DeviceCopies, Ticket, gpu_of, pinned_memory
from distckpt.layout.box import MAX_PIECE_NBYTES
from distckpt.tensor_bytes import Memory, bytes_of, copy_bits

#: Bytes of the buffer for tensors on the CPU.
HOST_NBYTES = 2 * MAX_PIECE_NBYTES

#: Bytes of each pinned buffer for tensors on GPUs.
PINNED_NBYTES = MAX_PIECE_NBYTES

#: Positions in a buffer are multiples of this, the size of the largest element. In bytes.
ALIGNMENT = 16


def padded(nbytes: int) -> int:
    """Bytes of a buffer that `take` uses for `nbytes` bytes."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Room(NamedTuple):
    """A part of a buffer, taken for the elements of one tensor.

    Attributes:
        tensor: The part as a contiguous tensor.
        data: The same memory as bytes.
    """

    tensor: torch.Tensor
    data: memoryview


class Buffer:
    """A buffer from which rooms are taken, one after the other, until `clear`. Allocated at the first `take`.

    Args:
        nbytes: Its size in bytes.
        pinned: Whether the memory is pinned, for copies from or to GPUs.
    """

    def __init__(self, nbytes: int, *, pinned: bool = False) -> None:
        self._nbytes = nbytes
        self._pinned = pinned
        self._memory: Memory | None = None
        self._used = 0

    def has_room(self, nbytes: int) -> bool:
        """Whether `take` can be called for `nbytes` more bytes."""
        return self._used + nbytes <= self._nbytes

    def take(self, like: torch.Tensor) -> Room:
        """Room for the elements of `like`."""
        if self._memory is None:
            self._memory = Memory(
                pinned_memory(self._nbytes)
                if self._pinned
                else torch.empty(self._nbytes, dtype=torch.uint8, device="cpu")
            )
        room = self._memory.room(like, self._used)
        self._used += padded(_nbytes(like))
        return Room(room, bytes_of(room))

    def clear(self) -> None:
        """Make the whole buffer free again; the rooms taken so far must not be used any more."""
        self._used = 0


class Arrivals:
    """Stages bytes that go from the file into tensors. A context manager.

    GPUs copy from one pinned buffer while the next one is filled. The caller calls `make_room`, then `take` as often as
    there is room, then `put` for each room once its bytes have been read; and so on. When the context ends, also with
    an exception, everything that was put is in the tensors.
    """

    def __init__(self, moment: Iterable[torch.device] | None = None, n_buffers: int = 2) -> None:
        """Local.

        Args:
            moment: As for `DeviceCopies`.
            n_buffers: Number of pinned buffers; with a single one the caller waits for each copy.
        """
        self._host = Buffer(HOST_NBYTES)
        self._pinned = deque((Buffer(PINNED_NBYTES, pinned=True), Ticket([])) for _ in range(n_buffers))
        self._waiting: list[Copy] = []
        self._copies = DeviceCopies(moment)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Complete the copies of everything that was put, also after an exception. Called at the end of the context."""
        try:
            self._start()
        finally:
            self._copies.finish()

    def make_room(self, nbytes: int) -> None:
        """Make room for `nbytes` bytes, at most `PINNED_NBYTES`. All rooms taken so far must have been put."""
        self._host.clear()
        if not self._filling.has_room(nbytes):
            self._change_buffers()

    @property
    def _filling(self) -> Buffer:
        return self._pinned[0][0]

    def take(self, target: torch.Tensor) -> Room:
        """Room for the elements of a tensor."""
        return (self._host if gpu_of(target) is None else self._filling).take(target)

    def put(self, target: torch.Tensor, room: Room) -> None:
        """Copy the bytes in a room into a tensor: at once on the CPU, on a GPU at the latest by the context's end."""
        gpu = gpu_of(target)
        if gpu is None:
            copy_bits(target, room.tensor)
        else:
            self._waiting.append(Copy(gpu, target, room.tensor))

    def pass_on(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy a tensor in host memory, of at most `PINNED_NBYTES`, which may change as soon as this returns."""
        if gpu_of(target) is None:
            copy_bits(target, source)
        else:
            self.make_room(_nbytes(target))
            room = self.take(target)
            copy_bits(room.tensor, source)
            self.put(target, room)

    def _change_buffers(self) -> None:
        """Start the copies from the current buffer, and go on with the one whose copies began first."""
        self._pinned[0] = self._filling, self._start()
        self._pinned.rotate(-1)
        buffer, ticket = self._pinned[0]
        ticket.wait()
        buffer.clear()

    def _start(self) -> Ticket:
        copies, self._waiting = self._waiting, []
        return self._copies.start(copies)


class Departing(NamedTuple):
    """A tensor, and the memory that it is copied to.

    Attributes:
        source: The tensor, of at most `PINNED_NBYTES`; any strides, any device.
        target: Host memory, as a tensor of the same shape and dtype.
    """

    source: torch.Tensor
    target: torch.Tensor


class Departures:
    """Stages tensors that go into host memory to which GPUs cannot copy directly, through one pinned buffer.

    The caller calls `start`, does other work, calls `arrive`, and so on; it calls `finish` at the end, also after an
    exception.
    """

    def __init__(self) -> None:
        self._buffer = Buffer(PINNED_NBYTES, pinned=True)
        self._copies = DeviceCopies()
        self._at_once: list[Departing] = []
        self._left: deque[Departing] = deque()
        self._under_way: list[Departing] = []  # from the buffer into other memory
        self._ticket = Ticket([])

    def start(self, tensors: Iterable[Departing]) -> None:
        """Start to copy tensors from GPUs, as many as the buffer has room for; those on the CPU wait for `arrive`."""
        for departing in tensors:
            (self._at_once if gpu_of(departing.source) is None else self._left).append(departing)
        self._fill()

    def arrive(self) -> None:
        """Complete the copies of all tensors into their targets."""
        for source, target in self._at_once:
            copy_bits(target, source)
        self._at_once.clear()
        while self._under_way:
            self._ticket.wait()
            for source, target in self._under_way:
                copy_bits(target, source)
            self._fill()

    def finish(self) -> None:
        """Wait for all copies that were started."""
        self._copies.finish()

    def _fill(self) -> None:
        """Start to copy the next tensors into the buffer, whose former contents are not needed any more."""
        self._buffer.clear()
        self._under_way.clear()
        copies = []
        while self._left and self._buffer.has_room(padded(_nbytes(self._left[0].source))):
            source, target = self._left.popleft()
            room = self._buffer.take(source)
            copies.append(Copy(_gpu(source), room.tensor, source))
            self._under_way.append(Departing(room.tensor, target))
        self._ticket = self._copies.start(copies)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gpu(tensor: torch.Tensor) -> torch.device:
    gpu = gpu_of(tensor)
    assert gpu is not None, "those of the CPU are copied at once"
    return gpu
