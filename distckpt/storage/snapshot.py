"""A copy of what a rank writes, as it was at one moment, while the program goes on to change it.

Values that may change at any time are copied when the snapshot is made. Those that only an optimizer step changes may
be copied later, by whichever thread comes first: the one in the background, or one that has to wait for the copy.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import torch

from distckpt.device import Copy, DeviceCopies, gpu_of
from distckpt.storage.staging import HostBuffer, HostBuffers
from distckpt.storage.transfer import WriteJob
from distckpt.tensor_bytes import copy_bits, is_packed
from distckpt.words import listing

#: Copies begin at multiples of this. In bytes.
_ALIGNMENT = 64
#: What one thread copies at a time of what several may copy. In bytes.
_SHARED_NBYTES = 16 << 20
#: From here on torch's own copy, with as many threads as the program gives it, is worth its start. In bytes.
_LARGE_NBYTES = 1 << 20


@dataclass(slots=True)
class Watch:
    """Finds tensors that were changed in place: torch counts the changes of each.

    Attributes:
        seen: (checkpoint key, live tensor, its count when the save was called). For a DTensor both itself and its local
            tensor: torch counts the changes of either.
    """

    seen: list[tuple[str, torch.Tensor, int]] = field(default_factory=list)

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Begin to watch a tensor.

        Raises:
            RuntimeError: torch does not count the changes of an inference tensor.
        """
        self.seen.append((key, tensor, tensor._version))

    def changed(self) -> list[str]:
        """Keys of the tensors that were changed since, each once."""
        return list(dict.fromkeys(key for key, tensor, version in self.seen if tensor._version != version))


class Snapshot:
    """The copy of what a rank writes.

    Attributes:
        nbytes: Bytes of host memory that it takes.
    """

    def __init__(
        self, jobs: Sequence[WriteJob], later: Sequence[bool], watch: Watch, buffers: HostBuffers, limit: int | None
    ) -> None:
        """Copy what must be copied at once. Local; may wait for memory.

        Args:
            jobs: What this rank writes.
            later: For each job, whether it can be copied later.
            watch: Finds changes of those tensors.
            buffers: Gives the memory.
            limit: Most bytes of host memory; None for no limit.

        Raises:
            MemoryError: There is not that much memory.
        """
        self._live = list(jobs)
        self._sizes = [job.tensor.nbytes for job in jobs]
        self._starts, self.nbytes = _places(self._sizes)
        self._buffers = buffers
        self._buffer: HostBuffer | None = buffers.take(self.nbytes, limit) if self.nbytes else None
        try:
            self._gpus = [gpu_of(job.tensor) for job in jobs]
            self._copies = self._device_copies()
            self._copy_now([index for index, deferred in enumerate(later) if not deferred])
            self._later = _SharedWork(self._parts([index for index, deferred in enumerate(later) if deferred]), watch)
        except BaseException:
            self.release()
            raise

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
        return [msgspec.structs.replace(job, tensor=self._room(index)) for index, job in enumerate(self._live)]

    def release(self) -> None:
        """Give the memory back; nobody uses the jobs any more. May be called again."""
        buffer, self._buffer = self._buffer, None
        self._live = []
        if buffer is not None:
            self._buffers.give_back(buffer)

    # ---- one copy ----

    def _room(self, index: int) -> torch.Tensor:
        """The copy of a job's tensor."""
        tensor = self._live[index].tensor
        return tensor if self._buffer is None else self._buffer.memory.room(tensor, self._starts[index])

    def _copy_now(self, indices: Sequence[int]) -> None:
        """Copy tensors: those of the CPU while GPUs copy theirs."""
        try:
            self._start_from_gpus(indices)
            for index in indices:
                if self._gpus[index] is None:
                    self._copy_from_host(index)
        finally:
            self._copies.finish()  # after a failure, too: the memory they copy into is given back

    def _copy_from_host(self, index: int) -> None:
        tensor, nbytes = self._live[index].tensor, self._sizes[index]
        if nbytes < _LARGE_NBYTES and is_packed(tensor):
            self._move(index, 0, nbytes)
        else:
            copy_bits(self._room(index), tensor)

    def _parts(self, indices: Sequence[int]) -> list[Callable[[], object]]:
        """The copies, in parts that threads can share: first those of GPUs, as one; then the others, large ones cut."""
        parts: list[Callable[[], object]] = []
        if any(self._gpus[index] is not None for index in indices):
            parts.append(functools.partial(self._copy_from_gpus, indices))
        for index in indices:
            if self._gpus[index] is None:
                nbytes = self._sizes[index]
                divided = nbytes > _SHARED_NBYTES and is_packed(self._live[index].tensor)
                step = _SHARED_NBYTES if divided else max(nbytes, 1)
                parts += [functools.partial(self._copy_part, index, start, step) for start in range(0, nbytes, step)]
        return parts

    def _copy_part(self, index: int, start: int, nbytes: int) -> None:
        tensor = self._live[index].tensor
        if is_packed(tensor):
            self._move(index, start, min(nbytes, self._sizes[index] - start))
        else:
            copy_bits(self._room(index), tensor)

    def _move(self, index: int, start: int, nbytes: int) -> None:
        """Copy bytes of a packed tensor: torch would take longer to begin than to copy, or would start threads."""
        if nbytes:
            assert self._buffer is not None, "there are bytes"
            target = self._buffer.address + self._starts[index] + start
            ctypes.memmove(target, self._live[index].tensor.data_ptr() + start, nbytes)

    # ---- GPUs ----

    def _device_copies(self) -> DeviceCopies:
        """Copies that wait for the work which the program has queued on its GPUs so far, and for none after it."""
        gpus = dict.fromkeys(gpu for gpu in self._gpus if gpu is not None)
        if gpus and self._buffer is not None:
            self._buffer.pin()
        return DeviceCopies(gpus)

    def _start_from_gpus(self, indices: Sequence[int]) -> None:
        """Begin to copy those of some tensors that are on GPUs."""
        self._copies.start(
            Copy(gpu, self._room(index), self._live[index].tensor)
            for index in indices
            if (gpu := self._gpus[index]) is not None
        )

    def _copy_from_gpus(self, indices: Sequence[int]) -> None:
        try:
            self._start_from_gpus(indices)
        finally:
            self._copies.finish()


def _places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each of the copies begins, and where the last one ends."""
    starts, stop = [], 0
    for nbytes in sizes:
        starts.append(stop)
        stop += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    return starts, stop


# ---- copies that are made later ----------------------------------------------------------------------------------


class _SharedWork:
    """Work in parts, each done by the first thread that comes; then a look at whether the sources have changed."""

    def __init__(self, parts: list[Callable[[], object]], watch: Watch) -> None:
        self._parts = parts
        self._left = len(parts)
        self._watch = watch if parts else None
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
            watch, self._watch = self._watch, None  # it keeps the live tensors alive
            if watch is not None and self._error is None:
                self._error = _error_of(watch.changed())
            self._done.set()


def _error_of(changed: list[str]) -> RuntimeError | None:
    if not changed:
        return None
    return RuntimeError(
        f"changed before the save had copied it: {listing(changed, 10)}. With overlap=True only an optimizer "
        "step may change parameters and optimizer state until handle.wait_staged() returns. Call that before other "
        "changes, or save with overlap=False."
    )
