"""Read boxes with `pread` into the memory of live tensors, hashing each step while it is in the cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from distckpt.errors import CorruptCheckpointError
from distckpt.layout.box import first_element, is_contiguous
from distckpt.storage import rawio
from distckpt.storage.checksum import Hasher, digest, require_checksum
from distckpt.storage.filling import STEP_NBYTES, Filler
from distckpt.storage.hdf5 import open_readonly
from distckpt.storage.room import ALIGNMENT, Arrivals, Room
from distckpt.storage.transfer import Block, Progress, ReadJob, blocks_of, part_of
from distckpt.tensor_bytes import bytes_of, is_packed, mark_changed, sharing_memory

#: Staging room for the boxes that are joined into one read, in bytes.
_JOINED_NBYTES = STEP_NBYTES + rawio.MAX_VECTORS * ALIGNMENT


@dataclass(slots=True)
class ReadReport:
    """The amount that was read and verified.

    Attributes:
        bytes_read: Bytes requested from the file system.
        bytes_verified: Bytes whose checksum matched.
    """

    bytes_read: int = 0
    bytes_verified: int = 0


class _Waiting(NamedTuple):
    """A small box that waits to be read together with its neighbours; `room` is None for a packed tensor."""

    job: ReadJob
    data: memoryview
    room: Room | None


def read(fd: int, jobs: Iterable[ReadJob], *, verify: bool, progress: Progress | None = None) -> ReadReport:
    """Read boxes into tensors. Local.

    Args:
        fd: Descriptor of the file.
        jobs: The boxes and their tensors; fastest in file order.
        verify: Compare the checksums of jobs that have one.
        progress: Called with the number of bytes just put into tensors.

    Returns:
        The bytes read and verified.

    Raises:
        CorruptCheckpointError: A checksum is wrong, or the file is too short; names the variable. Tensors of jobs up
            to this one have been written.
    """
    reader = Reader(fd, Arrivals(), verify, progress)
    reader.read(jobs)
    return reader.report


class Reader:
    """Reads boxes into tensors: small contiguous ones joined with their neighbours, all others with a `Filler`.

    Attributes:
        report: The bytes read and verified.
    """

    def __init__(self, fd: int, arrivals: Arrivals, verify: bool, progress: Progress | None) -> None:
        """Local.

        Args:
            fd: Descriptor of the file.
            arrivals: Stages bytes for tensors that are on GPUs or not packed.
            verify: Compare the checksums of jobs that have one.
            progress: Called with the number of bytes just put into tensors.
        """
        self.report = ReadReport()
        self._fd = fd
        self._verify = verify
        self._progress = progress
        self._arrivals = arrivals
        self._filler = Filler(fd)
        self._changed: list[torch.Tensor] = []
        self._waiting: list[_Waiting] = []
        self._start = 0
        self._stop = 0

    def read(self, jobs: Iterable[ReadJob]) -> None:
        """Read boxes into tensors; raises as the function `read`."""
        try:
            with self._arrivals:
                for job in jobs:
                    self._read_job(job)
                self._flush()
        finally:
            mark_changed(self._changed)
            self._changed.clear()

    def _read_job(self, job: ReadJob) -> None:
        """Read a box, at the latest with the next `_flush`."""
        nbytes = job.tensor.nbytes
        if nbytes == 0:
            return
        if not is_contiguous(job.box, job.global_shape):
            self._read_in_blocks(job)
        elif nbytes <= STEP_NBYTES:
            self._join(job, nbytes)
        elif is_packed(job.tensor):
            self._read_range(job)
        else:
            self._read_in_blocks(job)

    # -- small boxes, joined

    def _join(self, job: ReadJob, nbytes: int) -> None:
        offset = _file_offset(job)
        full = self._stop - self._start + nbytes > STEP_NBYTES or len(self._waiting) == rawio.MAX_VECTORS
        if full or offset != self._stop:
            self._flush()
        if not self._waiting:
            self._start = offset
        if is_packed(job.tensor):
            self._waiting.append(_Waiting(job, bytes_of(job.tensor), None))
        else:
            room = self._arrivals.take(job.tensor)
            self._waiting.append(_Waiting(job, room.data, room))
        self._stop = offset + nbytes

    def _flush(self) -> None:
        """Read the boxes that have been joined."""
        if not self._waiting:
            return
        try:
            rawio.read_vector(self._fd, [waiting.data for waiting in self._waiting], self._start)
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"{self._waiting[0].job.key}: {error}") from error
        self.report.bytes_read += self._stop - self._start
        again = self._is_mixed()
        for waiting in self._waiting:
            if again and waiting.room is None:
                self._read_alone(waiting)  # after what comes before it, of which a part was in a room
            self._accept(waiting)
        self._waiting.clear()
        self._arrivals.make_room(_JOINED_NBYTES)

    def _is_mixed(self) -> bool:
        """Whether tensors that have been read into directly may share memory with some that have not."""
        n_staged = sum(waiting.room is not None for waiting in self._waiting)
        is_mixture = 0 < n_staged < len(self._waiting)
        return is_mixture and bool(sharing_memory([waiting.job.tensor for waiting in self._waiting]))

    def _accept(self, waiting: _Waiting) -> None:
        job = waiting.job
        if self._verify and job.expected is not None:
            got = digest(waiting.data)
            if got != job.expected and len(self._waiting) > 1:
                got = self._read_alone(waiting)
            _compare(job, got, self.report)
        if waiting.room is None:
            self._changed.append(job.tensor)
        else:
            self._arrivals.put(job.tensor.detach(), waiting.room)
        if self._progress is not None:
            self._progress(len(waiting.data))

    def _read_alone(self, waiting: _Waiting) -> int:
        """Read one of the joined boxes again, as another one may share its memory. Returns its checksum."""
        rawio.read_into(self._fd, waiting.data, _file_offset(waiting.job))
        self.report.bytes_read += len(waiting.data)
        return digest(waiting.data)

    # -- all others

    def _read_range(self, job: ReadJob) -> None:
        """Read a box that is one range of bytes both in the file and in memory."""
        self._flush()
        hasher = self._hasher(job)
        data = bytes_of(job.tensor)
        self._changed.append(job.tensor)
        try:
            self._filler.fill_range(data, _file_offset(job), hasher)
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"{job.key}: {error}") from error
        self.report.bytes_read += len(data)
        if hasher is not None:
            _compare(job, hasher.intdigest(), self.report)
        if self._progress is not None:
            self._progress(len(data))

    def _read_in_blocks(self, job: ReadJob) -> None:
        self._flush()
        hasher = self._hasher(job)
        packed = bytes_of(job.tensor) if is_packed(job.tensor) else None
        if packed is not None:
            self._changed.append(job.tensor)
        for block in blocks_of(job.box, job.tensor.element_size()):
            if packed is None:
                self._fill_staged(job, block, hasher)
            else:
                self._fill(job, block, packed[block.start : block.start + block.nbytes], hasher)
            if self._progress is not None:
                self._progress(block.nbytes)
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
            self.report.bytes_read += self._filler.fill(job, block.box, data, hasher)
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"{job.key}: {error}") from error

    def _hasher(self, job: ReadJob) -> Any:
        """Hashes what is read of a job; None if it is not to be verified."""
        return Hasher() if self._verify and job.expected is not None else None


def _file_offset(job: ReadJob) -> int:
    """Position of the first byte of a box in the file."""
    return job.dataset_offset + first_element(job.box, job.global_shape) * job.tensor.element_size()


def _compare(job: ReadJob, got: int, report: ReadReport) -> None:
    assert job.expected is not None, "there is a checksum to compare with"
    nbytes = job.tensor.nbytes
    require_checksum(job.key, job.box, nbytes, job.expected, got)
    report.bytes_verified += nbytes


# ---- through HDF5 ------------------------------------------------------------------------------------------------


def read_through_hdf5(
    path: str, jobs: Iterable[ReadJob], *, verify: bool, progress: Progress | None = None
) -> ReadReport:
    """Read boxes of datasets that are not one range of bytes: chunked, compressed, or written by another program.

    Args:
        path: Path of the file.
        jobs: The boxes and their tensors; `dataset_offset` is ignored. Fastest with the jobs of one key together.
        verify: Compare the checksums of jobs that have one.
        progress: Called with the number of bytes just put into tensors.

    Returns:
        The bytes read and verified.

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
                raise CorruptCheckpointError(f"{key}: HDF5 cannot read it: {error}") from error
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
        memory = np.frombuffer(room.data, np.uint8)
        memory.fill(0)  # HDF5 leaves it as it is for chunks that it does not find: the last tensor's bytes may be there
        dataset.read(h5s.create_simple((block.box.numel,)), in_file, memory, datatype)
        if hasher is not None:
            hasher.update(room.data)
        arrivals.put(part, room)
        report.bytes_read += block.nbytes
    if hasher is not None:
        _compare(job, hasher.intdigest(), report)
