"""A copy of what a rank writes, as it was at one moment, while the program goes on to change it.

Values that may change at any time are copied when the snapshot is made. Those that only an optimizer step changes may
be copied later, by whichever thread comes first: the one in the background, or one that has to wait for the copy.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import torch

from distckpt.storage.staging import HostBuffer, HostBuffers
from distckpt.storage.transfer import WriteJob, copy_bits, is_packed

#: Copies begin at multiples of this. In bytes.
_ALIGNMENT = 64
#: What one thread copies at a time of what several may copy. In bytes.
_SHARED_NBYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Watch:
    """How to see that a tensor was changed: torch counts its changes in place.

    Attributes:
        key: Checkpoint key, for the message.
        tensors: The live tensor, and what it holds if it is a DTensor: torch counts at either.
        versions: Their counts when the save was called.
    """

    key: str
    tensors: tuple[torch.Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, key: str, *tensors: torch.Tensor) -> Watch:
        """Begin to watch."""
        return cls(key, tensors, tuple(tensor._version for tensor in tensors))

    @property
    def changed(self) -> bool:
        """Whether it was changed since."""
        return any(tensor._version != seen for tensor, seen in zip(self.tensors, self.versions, strict=True))


class Snapshot:
    """The copy of what a rank writes.

    Attributes:
        nbytes: Bytes that it copies.
    """

    def __init__(
        self, jobs: Sequence[WriteJob], watches: Sequence[Watch | None], buffers: HostBuffers, limit: int | None
    ) -> None:
        """Copy what must be copied at once. Local; may wait for memory.

        Args:
            jobs: What this rank writes.
            watches: Of each job that can be copied later: its watch; None for the others.
            buffers: Gives the memory.
            limit: Most bytes of host memory; None for no limit.

        Raises:
            MemoryError: There is not that much memory.
        """
        starts, self.nbytes = _places([_nbytes_of(job) for job in jobs])
        self._buffers = buffers
        self._buffer: HostBuffer | None = buffers.take(self.nbytes, limit) if self.nbytes else None
        try:
            self._jobs = [self._copied(job, start) for job, start in zip(jobs, starts, strict=True)]
            self._copy(list(jobs), watches)
        except BaseException:
            self.release()
            raise

    def _copy(self, jobs: list[WriteJob], watches: Sequence[Watch | None]) -> None:
        cuda = _CudaCopies()
        if self._buffer is not None and any(job.tensor.is_cuda for job in jobs):
            self._buffer.pin()
        later: list[Callable[[], object]] = []
        for source, target, watch in zip(jobs, self._jobs, watches, strict=True):
            if watch is not None:
                later += _copies(target.tensor, source.tensor, cuda)
            elif source.tensor.is_cuda:
                cuda.copy(target.tensor, source.tensor)
            else:
                copy_bits(target.tensor, source.tensor)
        cuda.wait()
        self._later = _SharedWork(later, [watch for watch in watches if watch is not None])

    def _copied(self, job: WriteJob, start: int) -> WriteJob:
        """The job with room in the buffer instead of the live tensor."""
        if self._buffer is None:
            return job
        room = self._buffer.bytes.narrow(0, start, _nbytes_of(job))
        return msgspec.structs.replace(job, tensor=room.view(job.tensor.dtype).view(job.tensor.shape))

    @property
    def is_complete(self) -> bool:
        """Whether everything is copied, or has failed to be."""
        return self._later.is_done

    def complete(self) -> None:
        """Copy what is left, together with other threads that do the same; return when all of it is copied."""
        self._later.run()

    def jobs(self) -> list[WriteJob]:
        """What to write, with the copies as tensors. The snapshot is complete.

        Raises:
            RuntimeError: A tensor was changed before it was copied; names it.
        """
        self._later.require()
        return self._jobs

    def release(self) -> None:
        """Give the memory back; nobody uses the jobs any more. May be called again."""
        buffer, self._buffer = self._buffer, None
        self._jobs = []
        if buffer is not None:
            self._buffers.give_back(buffer)


def _nbytes_of(job: WriteJob) -> int:
    return job.tensor.numel() * job.tensor.element_size()


def _places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each of the copies begins, and where the last one ends."""
    starts, stop = [], 0
    for nbytes in sizes:
        starts.append(stop)
        stop += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    return starts, stop


# ---- copies that are made later ----------------------------------------------------------------------------------


def _copies(target: torch.Tensor, source: torch.Tensor, cuda: _CudaCopies) -> list[Callable[[], object]]:
    """The copy of a tensor, in parts that threads can share."""
    if source.is_cuda:
        cuda.expect(source.device)
        return [functools.partial(cuda.copy_now, target, source)]
    if not is_packed(source):
        return [functools.partial(copy_bits, target, source)]
    nbytes = source.numel() * source.element_size()
    starts = range(0, nbytes, _SHARED_NBYTES)
    return [functools.partial(_move, target, source, start, min(_SHARED_NBYTES, nbytes - start)) for start in starts]


def _move(target: torch.Tensor, source: torch.Tensor, start: int, nbytes: int) -> None:
    """Copy some of the bytes of a packed tensor. torch would start threads of its own, and compete with the program."""
    ctypes.memmove(target.data_ptr() + start, source.data_ptr() + start, nbytes)


class _SharedWork:
    """Work in parts, each done by the first thread that comes; then a look at whether the sources have changed."""

    def __init__(self, parts: list[Callable[[], object]], watches: list[Watch]) -> None:
        self._parts = parts
        self._left = len(parts)
        self._watches = watches
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._parts.reverse()  # taken from the end
        if not parts:
            self._done.set()

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def run(self) -> None:
        """Do parts until none is left, and wait for those of other threads. Raises nothing."""
        while (part := self._take()) is not None:
            try:
                part()
            except BaseException as error:
                self._error = error
            self._end_one()
        self._done.wait()

    def require(self) -> None:
        """Raise what a part raised, or what has changed."""
        if self._error is not None:
            raise self._error

    def _take(self) -> Callable[[], object] | None:
        with self._lock:
            return self._parts.pop() if self._parts else None

    def _end_one(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._error = self._error or _error_of([watch.key for watch in self._watches if watch.changed])
            self._watches = []  # they keep the live tensors alive
            self._done.set()


def _error_of(changed: list[str]) -> RuntimeError | None:
    if not changed:
        return None
    more = f" and {len(changed) - 10} more" if len(changed) > 10 else ""
    return RuntimeError(
        f"changed before the save had copied it: {', '.join(changed[:10])}{more}. With overlap=True only an optimizer "
        "step may change parameters and optimizer state until handle.wait_staged() returns. Call that before other "
        "changes, or save with overlap=False."
    )


# ---- CUDA --------------------------------------------------------------------------------------------------------


class _CudaCopies:
    """Copies from GPUs, on streams of their own beside the program's, so that neither waits for the other's work."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def expect(self, device: torch.device) -> torch.cuda.Stream:
        """The stream of a device; what is copied on it is what the program's present work leaves."""
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
        return stream

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Begin a copy to the host, which ends before `wait` returns."""
        with torch.cuda.stream(self.expect(source.device)):
            copy_bits(target, source, non_blocking=True)

    def copy_now(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy to the host."""
        self.copy(target, source)
        self.expect(source.device).synchronize()

    def wait(self) -> None:
        """Wait for the copies."""
        for stream in self._streams.values():
            stream.synchronize()
