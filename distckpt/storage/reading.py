"""Read boxes with `pread` into the memory of live tensors, each step hashed while it is in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from distckpt.errors import CorruptCheckpointError
from distckpt.layout.box import Box, Shape, cut, first_element, is_contiguous, run_axis, runs
from distckpt.storage import rawio
from distckpt.storage.checksum import Hasher, digest, require_checksum
from distckpt.storage.hdf5 import open_readonly
from distckpt.storage.room import ALIGNMENT, Arrivals, Room
from distckpt.storage.scratch import Scratch, is_slow_target
from distckpt.storage.transfer import Block, Progress, ReadJob, blocks_of, part_of
from distckpt.tensor_bytes import bytes_of, is_packed, mark_changed

#: A step of reading and hashing: it stays in the second-level cache in between. In bytes.
STEP_NBYTES = 256 << 10

#: Runs closer than this are read together with what is between them: the disk delivers whole pages anyway. In bytes.
_PAGE_NBYTES = 4096

#: That many runs are read one by one even when they are close, so that a small box costs just its own bytes.
_FEW_RUNS = 64

#: Room for what is joined into one read, in bytes.
_JOINED_NBYTES = STEP_NBYTES + rawio.MAX_VECTORS * ALIGNMENT

#: Most runs that are listed at once.
_RUNS_AT_ONCE = 8192


@dataclass(slots=True)
class ReadReport:
    """What was read.

    Attributes:
        bytes_read: Bytes asked of the file system.
        bytes_verified: Bytes whose checksum was right.
    """

    bytes_read: int = 0
    bytes_verified: int = 0


class _Waiting(NamedTuple):
    """A small box that waits to be read together with its neighbours."""

    job: ReadJob
    data: memoryview
    room: Room | None


def read(fd: int, jobs: Iterable[ReadJob], *, verify: bool, progress: Progress | None = None) -> ReadReport:
    """Read boxes into tensors.

    Args:
        fd: Descriptor of the file.
        jobs: What to read. Fastest in file order.
        verify: Compare checksums, where a job has one.
        progress: Called with the number of bytes just put into tensors.

    Returns:
        How much was read and verified.

    Raises:
        CorruptCheckpointError: A checksum is wrong, or the file is too short; names the variable. Tensors of jobs up
            to this one have been written.
    """
    with Arrivals() as arrivals:
        reader = _Reader(fd, arrivals, verify, progress)
        for job in jobs:
            reader.read(job)
        reader.flush()
    return reader.report


class _Reader:
    def __init__(self, fd: int, arrivals: Arrivals, verify: bool, progress: Progress | None) -> None:
        self.report = ReadReport()
        self._fd = fd
        self._verify = verify
        self._progress = progress
        self._arrivals = arrivals
        self._filler = _Filler(fd, self.report)
        self._waiting: list[_Waiting] = []
        self._start = 0
        self._stop = 0

    def read(self, job: ReadJob) -> None:
        """Read a box, at the latest with the next `flush`."""
        nbytes = job.tensor.numel() * job.tensor.element_size()
        if nbytes == 0:
            return
        if nbytes <= STEP_NBYTES and is_contiguous(job.box, job.global_shape):
            self._join(job, nbytes)
        else:
            self._read_large(job)

    # -- small boxes, joined

    def _join(self, job: ReadJob, nbytes: int) -> None:
        offset = _file_offset(job)
        full = self._stop - self._start + nbytes > STEP_NBYTES or len(self._waiting) == rawio.MAX_VECTORS
        if full or offset != self._stop:
            self.flush()
        if not self._waiting:
            self._start = offset
        if is_packed(job.tensor):
            self._waiting.append(_Waiting(job, bytes_of(job.tensor), None))
        else:
            room = self._arrivals.take(job.tensor)
            self._waiting.append(_Waiting(job, room.data, room))
        self._stop = offset + nbytes

    def flush(self) -> None:
        """Read what has been joined."""
        if self._waiting:
            try:
                rawio.read_vector(self._fd, [waiting.data for waiting in self._waiting], self._start)
            except CorruptCheckpointError as error:
                raise CorruptCheckpointError(f"{self._waiting[0].job.key}: {error}") from error
            self.report.bytes_read += self._stop - self._start
            for waiting in self._waiting:
                self._accept(waiting)
            self._waiting.clear()
        self._arrivals.make_room(_JOINED_NBYTES)

    def _accept(self, waiting: _Waiting) -> None:
        job = waiting.job
        if self._verify and job.expected is not None:
            got = digest(waiting.data)
            if got != job.expected and len(self._waiting) > 1:
                got = self._read_alone(waiting)
            _compare(job, got, self.report)
        if waiting.room is None:
            mark_changed(job.tensor)
        else:
            self._arrivals.put(job.tensor.detach(), waiting.room)
        if self._progress is not None:
            self._progress(len(waiting.data))

    def _read_alone(self, waiting: _Waiting) -> int:
        """Read one of the joined boxes again: another of them may lie in the same memory. Gives its checksum."""
        rawio.read_into(self._fd, waiting.data, _file_offset(waiting.job))
        self.report.bytes_read += len(waiting.data)
        return digest(waiting.data)

    # -- large boxes, in blocks

    def _read_large(self, job: ReadJob) -> None:
        self.flush()
        hasher = Hasher() if self._verify and job.expected is not None else None
        packed = bytes_of(job.tensor) if is_packed(job.tensor) else None
        for block in blocks_of(job.box, job.tensor.element_size()):
            if packed is None:
                self._fill_staged(job, block, hasher)
            else:
                self._fill(job, block, packed[block.start : block.start + block.nbytes], hasher)
            if self._progress is not None:
                self._progress(block.nbytes)
        if packed is not None:
            mark_changed(job.tensor)
        if hasher is not None:
            _compare(job, hasher.intdigest(), self.report)

    def _fill_staged(self, job: ReadJob, block: Block, hasher: Any) -> None:
        self._arrivals.make_room(block.nbytes)
        part = part_of(job, block)
        room = self._arrivals.take(part)
        self._fill(job, block, room.data, hasher)
        self._arrivals.put(part, room)
        self._arrivals.make_room(_JOINED_NBYTES)

    def _fill(self, job: ReadJob, block: Block, data: memoryview, hasher: Any) -> None:
        try:
            self._filler.fill(job, block.box, data, hasher)
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"{job.key}: {error}") from error


def _file_offset(job: ReadJob) -> int:
    """Position of the first byte of a box in the file."""
    return job.dataset_offset + first_element(job.box, job.global_shape) * job.tensor.element_size()


def _compare(job: ReadJob, got: int, report: ReadReport) -> None:
    assert job.expected is not None, "there is a checksum to compare with"
    nbytes = job.tensor.numel() * job.tensor.element_size()
    require_checksum(job.key, job.box, nbytes, job.expected, got)
    report.bytes_verified += nbytes


# ---- from the file into packed memory ----------------------------------------------------------------------------


class _Filler:
    """Fills memory with the packed bytes of boxes that are more than a step long, or not contiguous in the file."""

    def __init__(self, fd: int, report: ReadReport) -> None:
        self._fd = fd
        self._report = report
        self._scratch = Scratch()

    def fill(self, job: ReadJob, box: Box, data: memoryview, hasher: Any) -> None:
        """Fill `data` with the bytes of `box`, feeding them to `hasher` unless it is None."""
        itemsize = job.tensor.element_size()
        if is_contiguous(box, job.global_shape):
            self._fill_range(data, job.dataset_offset + first_element(box, job.global_shape) * itemsize, hasher)
            return
        rows = _Rows.of(box, job.global_shape, itemsize)
        if rows.pitch_nbytes - rows.run_nbytes < _PAGE_NBYTES and rows.count > _FEW_RUNS:
            self._fill_from_spans(job, box, rows, data, hasher)
        else:
            self._fill_runs(job, box, rows, data, hasher)

    def _fill_range(self, data: memoryview, offset: int, hasher: Any) -> None:
        detour = is_slow_target(data, offset)
        if hasher is None and not detour:
            rawio.read_into(self._fd, data, offset)
        else:
            for start in range(0, len(data), STEP_NBYTES):
                step = data[start : start + STEP_NBYTES]
                self._fill_step(step, offset + start, detour)
                if hasher is not None:
                    hasher.update(step)
        self._report.bytes_read += len(data)

    def _fill_step(self, data: memoryview, offset: int, detour: bool) -> None:
        if detour:
            scratch = self._scratch.room_for(offset, len(data))
            rawio.read_into(self._fd, scratch, offset)
            data[:] = scratch
        else:
            rawio.read_into(self._fd, data, offset)

    def _fill_runs(self, job: ReadJob, box: Box, rows: _Rows, data: memoryview, hasher: Any) -> None:
        """One `pread` per run."""
        position = 0
        for part in cut(box, rows.run_numel * max(1, min(_RUNS_AT_ONCE, STEP_NBYTES // rows.run_nbytes))):
            begin = position
            for start in runs(part, job.global_shape).starts:
                run = data[position : position + rows.run_nbytes]
                rawio.read_into(self._fd, run, job.dataset_offset + start * rows.itemsize)
                position += rows.run_nbytes
            if hasher is not None:
                hasher.update(data[begin:position])
        self._report.bytes_read += len(data)

    def _fill_from_spans(self, job: ReadJob, box: Box, rows: _Rows, data: memoryview, hasher: Any) -> None:
        """Read runs with the narrow gaps between them, then pick the runs."""
        position = 0
        dtype = np.dtype(f"V{rows.itemsize}")
        at_once = min(rows.length, max(1, STEP_NBYTES // rows.pitch_nbytes))
        for part in cut(box, at_once * rows.run_numel):
            count = part.numel // rows.run_numel
            span = (count - 1) * rows.pitch_nbytes + rows.run_nbytes
            offset = job.dataset_offset + first_element(part, job.global_shape) * rows.itemsize
            scratch = self._scratch.room_for(offset, span)
            rawio.read_into(self._fd, scratch, offset)
            packed = data[position : position + count * rows.run_nbytes]
            shape, strides = (count, rows.run_numel), (rows.pitch_nbytes, rows.itemsize)
            np.copyto(np.ndarray(shape, dtype, packed), np.ndarray(shape, dtype, scratch, 0, strides))
            if hasher is not None:
                hasher.update(packed)
            position += len(packed)
            self._report.bytes_read += span


@dataclass(frozen=True, slots=True)
class _Rows:
    """A box that is not contiguous in the file, as rows with gaps between them.

    Attributes:
        itemsize: Bytes per element.
        run_numel: Elements of a run.
        run_nbytes: Bytes of a run.
        pitch_nbytes: Bytes from one run to the next.
        length: Number of runs at this pitch.
        count: Number of runs of the box.
    """

    itemsize: int
    run_numel: int
    run_nbytes: int
    pitch_nbytes: int
    length: int
    count: int

    @classmethod
    def of(cls, box: Box, global_shape: Shape, itemsize: int) -> _Rows:
        axis = run_axis(box, global_shape)
        run_numel = math.prod(box.shape[axis:])
        return cls(
            itemsize=itemsize,
            run_numel=run_numel,
            run_nbytes=run_numel * itemsize,
            pitch_nbytes=math.prod(global_shape[axis:]) * itemsize,
            length=box.shape[axis - 1],
            count=box.numel // run_numel,
        )


# ---- through HDF5 ------------------------------------------------------------------------------------------------


def read_through_hdf5(
    path: str, jobs: Iterable[ReadJob], *, verify: bool, progress: Progress | None = None
) -> ReadReport:
    """Read boxes of datasets that are not one range of bytes: chunked, compressed, written by another program.

    Args:
        path: Path of the file.
        jobs: What to read; `dataset_offset` is ignored. Fastest with the jobs of one key together.
        verify: Compare checksums, where a job has one.
        progress: Called with the number of bytes just put into tensors.

    Returns:
        How much was read and verified.

    Raises:
        CorruptCheckpointError: HDF5 cannot read a dataset, or a checksum is wrong.
    """
    from h5py import h5d

    report = ReadReport()
    with open_readonly(path) as file, Arrivals() as arrivals:
        for key, of_key in groupby(jobs, lambda job: job.key):
            try:
                dataset = h5d.open(file, key.encode())
                for job in of_key:
                    _read_job_through_hdf5(dataset, job, arrivals, verify, report)
                    if progress is not None:
                        progress(job.tensor.numel() * job.tensor.element_size())
            except (OSError, KeyError) as error:
                raise CorruptCheckpointError(f"{path}: HDF5 cannot read {key}: {error}") from error
    return report


def _read_job_through_hdf5(dataset: Any, job: ReadJob, arrivals: Arrivals, verify: bool, report: ReadReport) -> None:
    from h5py import h5s

    hasher = Hasher() if verify and job.expected is not None else None
    in_file, datatype = dataset.get_space(), dataset.get_type()
    for block in blocks_of(job.box, job.tensor.element_size()):
        arrivals.make_room(block.nbytes)
        part = part_of(job, block)
        room = arrivals.take(part)
        if block.box.shape:
            in_file.select_hyperslab(block.box.offset, block.box.shape)
        dataset.read(h5s.create_simple((block.box.numel,)), in_file, np.frombuffer(room.data, np.uint8), datatype)
        if hasher is not None:
            hasher.update(room.data)
        arrivals.put(part, room)
        report.bytes_read += block.nbytes
    if hasher is not None:
        _compare(job, hasher.intdigest(), report)
