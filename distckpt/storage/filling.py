"""Read boxes that are larger than a step, or not contiguous in the file, into packed memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from distckpt.layout.box import Box, Shape, cut, first_element, is_contiguous, run_axis, runs
from distckpt.storage import rawio
from distckpt.storage.scratch import Scratch, is_slow_target
from distckpt.storage.transfer import ReadJob

#: Bytes of a step of reading and hashing: between the two they stay in the cache. In shorter steps the Python between
#: them takes longer than is gained, and threads wait for each other's.
STEP_NBYTES = 1 << 20

#: Runs with gaps smaller than this are read together with the gaps: disks deliver whole pages anyway. In bytes.
_PAGE_NBYTES = 4096

#: Up to this many runs are read one by one even if the gaps are small, so that a small box costs just its own bytes.
_FEW_RUNS = 64

#: Most runs that are listed in memory at once.
_RUNS_AT_ONCE = 8192


class Filler:
    """Fills memory with the packed bytes of boxes: in steps, run by run, or as spans from which runs are picked.

    Args:
        fd: Descriptor of the file.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._scratch = Scratch()

    def fill(self, job: ReadJob, box: Box, data: memoryview, hasher: Any) -> int:
        """Fill memory with the bytes of a box. Local.

        Args:
            job: The job, for its dataset.
            box: The part of the job's box to read, in coordinates of the dataset; not empty.
            data: The memory, as long as the packed bytes of the box.
            hasher: Hashes the bytes in order; None for no hash.

        Returns:
            Bytes requested from the file system.

        Raises:
            CorruptCheckpointError: The file is too short.
        """
        itemsize = job.tensor.element_size()
        if is_contiguous(box, job.global_shape):
            offset = job.dataset_offset + first_element(box, job.global_shape) * itemsize
            self.fill_range(data, offset, hasher)
            return len(data)
        rows = _Rows.of(box, job.global_shape, itemsize)
        if rows.pitch_nbytes - rows.run_nbytes < _PAGE_NBYTES and rows.count > _FEW_RUNS:
            return self._fill_from_spans(job, box, rows, data, hasher)
        return self._fill_runs(job, box, rows, data, hasher)

    def fill_range(self, data: memoryview, offset: int, hasher: Any) -> None:
        """Fill memory with a range of bytes of the file. Local.

        Args:
            data: The memory; not empty.
            offset: Position of the first byte in the file.
            hasher: Hashes the bytes in order; None for no hash.

        Raises:
            CorruptCheckpointError: The file is too short.
        """
        detour = is_slow_target(data, offset)
        if hasher is None and not detour:
            rawio.read_into(self._fd, data, offset)
            return
        for start in range(0, len(data), STEP_NBYTES):
            step = data[start : start + STEP_NBYTES]
            if detour:
                scratch = self._scratch.room_for(offset + start, len(step))
                rawio.read_into(self._fd, scratch, offset + start)
                step[:] = scratch
            else:
                rawio.read_into(self._fd, step, offset + start)
            if hasher is not None:
                hasher.update(step)

    def _fill_runs(self, job: ReadJob, box: Box, rows: _Rows, data: memoryview, hasher: Any) -> int:
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
        return len(data)

    def _fill_from_spans(self, job: ReadJob, box: Box, rows: _Rows, data: memoryview, hasher: Any) -> int:
        """Read runs together with the small gaps between them, then copy the runs."""
        position = bytes_read = 0
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
            bytes_read += span
        return bytes_read


@dataclass(frozen=True, slots=True)
class _Rows:
    """A box that is not contiguous in the file, as rows of runs with gaps between them.

    Attributes:
        itemsize: Bytes per element.
        run_numel: Elements of a run.
        run_nbytes: Bytes of a run.
        pitch_nbytes: Bytes from the start of one run to the start of the next.
        length: Number of consecutive runs at this pitch.
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
