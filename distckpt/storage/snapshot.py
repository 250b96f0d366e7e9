"""Snapshots: a copy of the tensors that a rank writes, as of one moment, while the program goes on to change them.

Values that may change at any time are copied when the snapshot is made. Those that only an optimizer step changes may
be copied later, by the background thread and by a thread that has to wait for the copy, whichever comes first.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from distckpt.device import Copy, DeviceCopies, Joining, gpu_of, joining_gpu
from distckpt.storage.packing import Bundle, LiveJobs, Packing, Row
from distckpt.storage.staging import HostBuffer, HostBuffers
from distckpt.storage.transfer import WriteJob
from distckpt.tensor_bytes import bytes_of, copy_bits, is_packed, join
from distckpt.words import listing

#: Bytes that one thread copies at a time when several threads share the copying.
_SHARED_NBYTES = 16 << 20
#: Tensors of at least this many bytes are copied by torch, whose threads are then worth starting.
_LARGE_NBYTES = 1 << 20


@dataclass(slots=True)
class Watch:
    """Finds tensors that were changed in place, by the version counter that torch keeps for each.

    Attributes:
        seen: (checkpoint key, live tensor, its version when the save was called). A DTensor has two entries, for itself
            and for its local tensor, since torch counts their changes separately.
    """

    seen: list[tuple[str, torch.Tensor, int]] = field(default_factory=list)

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Begin to watch a tensor.

        Raises:
            RuntimeError: The tensor is an inference tensor, whose changes torch does not count.
        """
        self.seen.append((key, tensor, tensor._version))

    def changed(self) -> list[str]:
        """Keys of the tensors that were changed since `add`, each once."""
        return list(dict.fromkeys(key for key, tensor, version in self.seen if tensor._version != version))


class Snapshot:
    """The copy of the tensors that a rank writes.

    The constructor copies the values that may change at any time. `complete` copies the others, from any number of
    threads; then `jobs` gives the write jobs, and `release` returns the memory once they have been written.

    Attributes:
        nbytes: Bytes of host memory that the copies take.
    """

    def __init__(
        self, jobs: LiveJobs, later: Sequence[bool], watch: Watch, buffers: HostBuffers, limit: int | None
    ) -> None:
        """Copy the tensors that must be copied at once. Local; may wait for memory.

        Args:
            jobs: The write jobs of this rank.
            later: For each job, whether it can be copied later.
            watch: Finds changes of the tensors to be copied later.
            buffers: Source of the memory.
            limit: Most bytes of host memory; None for no limit.

        Raises:
            MemoryError: The limit is below the bytes needed.
        """
        self._live: LiveJobs | None = jobs
        self.nbytes = jobs.packing.nbytes
        self._buffers = buffers
        self._buffer: HostBuffer | None = buffers.take(self.nbytes, limit) if self.nbytes else None
        try:
            self._gpus = list(map(gpu_of, jobs.tensors))
            self._copies = self._device_copies()
            now, deferred = self._divide(jobs.packing, later)
            self._copy_now(now)
            self._later = _SharedWork(self._parts(deferred), watch)
        except BaseException:
            self.release()
            raise

    @property
    def is_complete(self) -> bool:
        """Whether all copies have been made, or have failed."""
        return self._later.is_done

    def complete(self) -> None:
        """Make the remaining copies, together with other threads that call this; returns when all are made."""
        self._later.run()

    def jobs(self) -> CopiedJobs:
        """The write jobs, with the copies as tensors. The snapshot must be complete.

        Raises:
            RuntimeError: A tensor was changed before it was copied; names it.
        """
        self._later.require()
        return CopiedJobs(self._jobs, self._buffer)

    def release(self) -> None:
        """Give the memory back; the jobs must not be used any more. May be called again."""
        buffer, self._buffer = self._buffer, None
        self._live = None
        if buffer is not None:
            self._buffers.give_back(buffer)

    @property
    def _jobs(self) -> LiveJobs:
        assert self._live is not None, "not released"
        return self._live

    def _divide(self, packing: Packing, later: Sequence[bool]) -> tuple[_Share, _Share]:
        """What is copied now, and what later. The parts of a row that are copied together are copied in one call."""
        now, deferred = _Share(), _Share()
        alone = list(packing.others)
        for bundle in packing.bundles.values():
            for row in bundle.rows:
                times = set(map(later.__getitem__, row.jobs))
                share = None if len(times) > 1 else deferred if times.pop() else now
                if share is None or not self._add_row(share, bundle.start, row):
                    alone += row.jobs
        for job in alone:
            (deferred if later[job] else now).jobs.append(job)
        return now, deferred

    def _add_row(self, share: _Share, start: int, row: Row) -> bool:
        """Add a row of the bundle at `start` to those that are copied together, if its parts can be."""
        if not any(map(self._gpus.__getitem__, row.jobs)):
            share.rows.append((start, row))
            return True
        tensors = [self._jobs.tensors[job] for job in row.jobs]
        gpu = joining_gpu(row.dtype, tensors)
        if gpu is None:
            return False
        assert self._buffer is not None, "there are bytes"
        share.joinings.append(Joining(gpu, row.within(self._buffer.memory.data[start:]), tensors))
        return True

    # ---- one copy ----

    def _room(self, index: int) -> torch.Tensor:
        """The copy of a job's tensor."""
        return _room(self._jobs, self._buffer, index)

    def _copy_now(self, share: _Share) -> None:
        """Copy tensors; those on the CPU while GPUs copy theirs."""
        try:
            self._start_from_gpus(share)
            for start, row in share.rows:
                self._copy_row(start, row)
            for index in share.jobs:
                if self._gpus[index] is None:
                    self._copy_from_host(index)
        finally:
            self._copies.finish()  # also after a failure, which gives back the memory that GPUs copy into

    def _copy_row(self, start: int, row: Row) -> None:
        assert self._buffer is not None, "there are bytes"
        tensors = self._jobs.tensors
        join(row.within(self._buffer.memory.data[start:]), [tensors[job] for job in row.jobs])

    def _copy_from_host(self, index: int) -> None:
        tensor = self._jobs.tensor(index)
        if tensor.nbytes < _LARGE_NBYTES and is_packed(tensor):
            self._move(index, tensor, 0, tensor.nbytes)
        else:
            copy_bits(self._room(index), tensor)

    def _parts(self, share: _Share) -> list[Callable[[], object]]:
        """Divide copies among threads: all from GPUs are one part; of the others, large ones are cut into several."""
        parts: list[Callable[[], object]] = []
        if share.joinings or any(self._gpus[index] is not None for index in share.jobs):
            parts.append(functools.partial(self._copy_from_gpus, share))
        parts += [functools.partial(self._copy_row, start, row) for start, row in share.rows]
        for index in share.jobs:
            if self._gpus[index] is None:
                tensor = self._jobs.tensors[index]
                nbytes = tensor.nbytes
                divided = nbytes > _SHARED_NBYTES and is_packed(tensor)
                step = _SHARED_NBYTES if divided else max(nbytes, 1)
                parts += [functools.partial(self._copy_part, index, start, step) for start in range(0, nbytes, step)]
        return parts

    def _copy_part(self, index: int, start: int, nbytes: int) -> None:
        tensor = self._jobs.tensor(index)
        if is_packed(tensor):
            self._move(index, tensor, start, min(nbytes, tensor.nbytes - start))
        else:
            copy_bits(self._room(index), tensor)

    def _move(self, index: int, tensor: torch.Tensor, start: int, nbytes: int) -> None:
        """Copy bytes of a packed tensor without torch, whose call takes longer than a small copy and starts threads."""
        if nbytes:
            assert self._buffer is not None, "there are bytes"
            target = self._buffer.address + self._jobs.packing.starts[index] + start
            ctypes.memmove(target, tensor.data_ptr() + start, nbytes)

    # ---- GPUs ----

    def _device_copies(self) -> DeviceCopies:
        """Make copies that wait for the work that the program has queued on the GPUs so far, and for nothing later."""
        gpus = dict.fromkeys(gpu for gpu in self._gpus if gpu is not None)
        if gpus and self._buffer is not None:
            self._buffer.pin()
        return DeviceCopies(gpus)

    def _start_from_gpus(self, share: _Share) -> None:
        """Start to copy the tensors that are on GPUs."""
        copies = [
            Copy(gpu, self._room(index), self._jobs.tensor(index))
            for index in share.jobs
            if (gpu := self._gpus[index]) is not None
        ]
        self._copies.start([*copies, *share.joinings])

    def _copy_from_gpus(self, share: _Share) -> None:
        try:
            self._start_from_gpus(share)
        finally:
            self._copies.finish()


def _room(jobs: LiveJobs, buffer: HostBuffer | None, index: int) -> torch.Tensor:
    """The place of a job's tensor in the buffer; there is none if all tensors are empty."""
    tensor = jobs.tensor(index)
    return tensor if buffer is None else buffer.memory.room(tensor, jobs.packing.starts[index])


class CopiedJobs:
    """Write jobs of copies in a buffer, see `storage.packing.Jobs`."""

    def __init__(self, live: LiveJobs, buffer: HostBuffer | None) -> None:
        self.packing = live.packing
        self._live = live
        self._buffer = buffer

    def __getitem__(self, index: int, /) -> WriteJob:
        """See `Jobs`."""
        return self.packing.places[index].job(_room(self._live, self._buffer, index))

    def packed(self, bundle: Bundle, room: torch.Tensor) -> memoryview:
        """See `Jobs`: the copies lie as in the bundle."""
        if self._buffer is None:  # this rank writes nothing, but takes part
            return memoryview(b"")
        return bytes_of(self._buffer.memory.data[bundle.start : bundle.start + bundle.nbytes])


@dataclass(slots=True)
class _Share:
    """Copies that are made together.

    Attributes:
        rows: Position in the buffer of a bundle, and one of its rows, all on the CPU.
        joinings: Rows that are all on one GPU.
        jobs: Indices of the jobs whose tensors are copied one by one.
    """

    rows: list[tuple[int, Row]] = field(default_factory=list)
    joinings: list[Joining] = field(default_factory=list)
    jobs: list[int] = field(default_factory=list)


# ---- copies that are made later ----------------------------------------------------------------------------------


class _SharedWork:
    """Parts of work that several threads share; the thread that ends the last one checks the watched tensors."""

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
        """Do parts until none is left, then wait for those of other threads. Raises nothing."""
        while (part := self._take()) is not None:
            try:
                part()
            except BaseException as error:
                self._error = error
            self._end_one()
        self._done.wait()

    def require(self) -> None:
        """Raise the error of a part that failed, or an error that names changed tensors."""
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
