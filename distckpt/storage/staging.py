"""Host memory for snapshots: a few large buffers, allocated once and reused for each save of a rank."""

from __future__ import annotations

import mmap
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from distckpt.tensor_bytes import Memory

#: A free buffer fits a request if it has at most twice the bytes requested, plus this many.
_SPARE_NBYTES = 64 << 20


class HostBuffer:
    """Page-aligned memory, in huge pages if the system has them, faulted in by its first use.

    Args:
        nbytes: Its size in bytes, above 0.

    Attributes:
        nbytes: Its size in bytes.
        memory: The memory.
        address: Address of its first byte.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _advise(memory, "MADV_HUGEPAGE")
        # A forked data loader would share the pages, and the next save would have to fault each one in again.
        _advise(memory, "MADV_DONTFORK")
        with torch.inference_mode(mode=False):  # else saves outside of it could not copy into the memory
            self.memory = Memory(torch.frombuffer(memory, dtype=torch.uint8))
        self.address = self.memory.data.data_ptr()
        self._pinned = False

    def pin(self) -> None:
        """Register the memory with CUDA, so that GPUs copy to it directly. May be called again."""
        if self._pinned:
            return
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(runtime.cudaHostRegister(self.address, self.nbytes, 0))
        if code != 0:
            raise RuntimeError(f"cudaHostRegister of {self.nbytes} bytes failed with error {code}")
        self._pinned = True
        closer = weakref.finalize(self.memory, runtime.cudaHostUnregister, self.address)
        closer.atexit = False


def _advise(memory: mmap.mmap, advice: str) -> None:
    """Give the system a hint on memory; systems that do not know it ignore it."""
    option = getattr(mmap, advice, None)
    if option is not None:
        with suppress(OSError):
            memory.madvise(option)


@dataclass(slots=True)
class HostBuffers:
    """The buffers of one Checkpoint, which snapshots take and give back. Thread-safe.

    Attributes:
        nbytes: Bytes of all buffers, free or in use.
    """

    nbytes: int = 0
    _free: list[HostBuffer] = field(default_factory=list)
    _in_use: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def take(self, nbytes: int, limit: int | None) -> HostBuffer:
        """Take a buffer of at least `nbytes` bytes; wait for one if the limit does not allow a new one.

        Args:
            nbytes: Bytes needed, above 0.
            limit: Most bytes of all buffers together; None for no limit.

        Raises:
            MemoryError: The limit is below `nbytes`, with no other buffer in use.
        """
        with self._changed:
            while True:
                fitting = [buffer for buffer in self._free if _fits(buffer, nbytes)]
                if fitting:
                    buffer = min(fitting, key=lambda buffer: buffer.nbytes)
                    self._free.remove(buffer)
                    break
                self._drop_free()
                if limit is None or self.nbytes + nbytes <= limit:
                    buffer = HostBuffer(nbytes)
                    self.nbytes += nbytes
                    break
                if self._in_use == 0:
                    raise MemoryError(
                        f"the copy of this rank's state needs {nbytes} bytes, SaveOptions.host_memory allows {limit}. "
                        "Raise it, or call save(), which needs no copy."
                    )
                self._changed.wait()
            self._in_use += 1
            return buffer

    def give_back(self, buffer: HostBuffer) -> None:
        """Take a buffer back; its memory must not be used any more."""
        with self._changed:
            self._in_use -= 1
            self._free.append(buffer)
            self._changed.notify_all()

    def _drop_free(self) -> None:
        self.nbytes -= sum(buffer.nbytes for buffer in self._free)
        self._free.clear()


def _fits(buffer: HostBuffer, nbytes: int) -> bool:
    return nbytes <= buffer.nbytes <= 2 * nbytes + _SPARE_NBYTES
