"""Packing: the small parts that a rank writes are copied together and written as a few long ranges.

A model may have a hundred thousand biases, norms and step counters. With a write job, a copy and an entry in a list of
buffers for each, Python would take several times as long as the disk. So what does not change from save to save is
worked out once per layout (`Packing`): the small parts of a bin of the file (see `layout.aggregation`) form a bundle,
in which parts of one dtype are neighbours, so that torch copies a row of them in one call.
"""

from __future__ import annotations

import functools
import itertools
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from distckpt.device import Copy, DeviceCopies, Joining, any_on_gpu, gpu_of, joining_gpu, pinned_memory
from distckpt.layout.aggregation import SMALL_NBYTES, Assembly, Extents, SmallParts
from distckpt.layout.box import MAX_PIECE_NBYTES, Box, Shape, first_element, is_contiguous
from distckpt.storage import rawio
from distckpt.storage.checksum import ChecksumLog, digest
from distckpt.storage.transfer import Progress, WriteJob
from distckpt.tensor_bytes import Memory, bytes_of, copy_bits, join

assert SMALL_NBYTES <= MAX_PIECE_NBYTES, "a small part is one piece: it has one checksum"

#: Bundles, and the boxes that are in none, begin at multiples of this in memory. In bytes.
_ALIGNMENT = 64
#: A row has fewer elements than this: torch copies more of them with threads, which takes longer than copying them.
_ROW_NUMEL = 1 << 15


class _Extent(NamedTuple):
    """The bytes of a box.

    Attributes:
        start: Position of the first one in the dataset.
        nbytes: Their number.
        is_small: Whether they are one range of a small variable: small ones lie next to each other in the file.
        is_shard: Whether the variable has others.
    """

    start: int
    nbytes: int
    is_small: bool
    is_shard: bool


@functools.lru_cache(maxsize=1 << 14)  # models repeat few shapes
def _extent(box: Box, global_shape: Shape, itemsize: int) -> _Extent:
    nbytes = box.numel * itemsize
    is_small = nbytes > 0 and math.prod(global_shape) * itemsize < SMALL_NBYTES and is_contiguous(box, global_shape)
    return _Extent(first_element(box, global_shape) * itemsize, nbytes, is_small, box.shape != global_shape)


class Place(NamedTuple):
    """Where a box goes, in all saves of a layout: a `WriteJob` without the tensor.

    Attributes:
        key: Checkpoint key.
        dataset_offset: Position of the dataset in the file, in bytes.
        global_shape: Shape of the dataset.
        box: The box, in coordinates of the dataset.
        checksum: Index of the checksum of its first piece.
        dtype: Type of the elements.
    """

    key: str
    dataset_offset: int
    global_shape: Shape
    box: Box
    checksum: int
    dtype: torch.dtype

    @classmethod
    def of(cls, job: WriteJob) -> Place:
        """Of a job."""
        return cls(job.key, job.dataset_offset, job.global_shape, job.box, job.checksum, job.tensor.dtype)

    @property
    def extent(self) -> _Extent:
        """Its bytes."""
        return _extent(self.box, self.global_shape, self.dtype.itemsize)

    def job(self, tensor: torch.Tensor) -> WriteJob:
        """The job that writes a tensor there."""
        return WriteJob(self.key, self.dataset_offset, self.global_shape, self.box, tensor, self.checksum)


class Row(NamedTuple):
    """Parts of one dtype that lie one after the other in a bundle, copied in one call.

    Attributes:
        jobs: Index of the job of each part.
        dtype: Type of their elements.
        start: Position of the first byte in the bundle; a multiple of the size of an element.
        numel: Number of elements.
    """

    jobs: list[int]
    dtype: torch.dtype
    start: int
    numel: int

    def within(self, memory: torch.Tensor) -> torch.Tensor:
        """Its elements in the memory of the bundle, a tensor of uint8."""
        return memory[self.start : self.start + self.numel * self.dtype.itemsize].view(self.dtype)


class Bundle(NamedTuple):
    """The small parts of a bin that this rank writes, one after the other.

    Attributes:
        rows: The parts.
        extents: Their places in the file.
        pieces: Their places in the bundle.
        checksums: int64, indices of their checksums.
        start: Position of the first byte in a memory that holds all that this rank writes.
    """

    rows: list[Row]
    extents: Extents
    pieces: list[slice]
    checksums: array[int]
    start: int

    @classmethod
    def of(cls, places: Sequence[Place], jobs: Sequence[int], extents: Extents, start: int) -> Bundle:
        """Of some jobs, those of one dtype one after the other.

        Args:
            places: Where the box of each job goes.
            jobs: The jobs.
            extents: The places of their bytes in the file.
            start: See the class.
        """
        stops = extents.sizes.cumsum()
        pieces = list(map(slice, (stops - extents.sizes).tolist(), stops.tolist()))
        return cls(_rows(places, jobs), extents, pieces, array("q", [places[job].checksum for job in jobs]), start)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(self.extents.sizes.sum())

    def name(self, packing: Packing) -> str:
        """Describes the bin in an error; other ranks may have further parts of it, whose keys are not known here."""
        if not self.rows:
            return "small variables"
        jobs = [job for row in self.rows for job in row.jobs]
        first = packing.places[jobs[int(self.extents.starts.argmin())]]
        return f"{first.key} and other small variables"

    def log(self, packed: memoryview, log: ChecksumLog) -> None:
        """Log the checksums of the parts, which are in `packed`."""
        log.indices.extend(self.checksums)
        log.values.extend(map(digest, map(packed.__getitem__, self.pieces)))


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """What a rank writes in all saves of a layout, in file order, and how it is placed in one memory.

    Attributes:
        places: Where each box goes.
        parts: The small parts, bundle after bundle.
        bundles: Index of a bin to this rank's small parts of it, ascending.
        others: Indices of the boxes that are in no bundle.
        starts: Position of each box in the memory, in bytes.
        nbytes: Size of the memory, in bytes.
    """

    places: list[Place]
    parts: SmallParts
    bundles: dict[int, Bundle]
    others: list[int]
    starts: list[int]
    nbytes: int

    @classmethod
    def of(cls, places: list[Place]) -> Packing:
        """Plan it, for what a rank writes in file order."""
        order, parts = _small_parts(places)
        others = sorted(set(range(len(places))).difference(order))
        starts, stop, bundles = np.zeros(len(places), np.int64), 0, {}
        for number in np.unique(parts.bins).tolist():
            which = parts.within(number)
            extents = parts.extents.slice(which)
            jobs = order[which]
            bundles[number] = Bundle.of(places, jobs, extents, stop)
            ends = stop + extents.sizes.cumsum()
            starts[jobs] = ends - extents.sizes
            stop = _aligned(int(ends[-1]))
        for job in others:
            starts[job] = stop
            stop += _aligned(places[job].extent.nbytes)
        return cls(places, parts, bundles, others, starts.tolist(), stop)

    def bundle(self, number: int) -> Bundle:
        """This rank's small parts of a bin; there may be none."""
        none = np.zeros(0, np.int64)
        return self.bundles.get(number) or Bundle.of((), (), Extents(none, none), 0)


def _small_parts(places: Sequence[Place]) -> tuple[list[int], SmallParts]:
    """Indices of the small boxes, and their parts: by bin; in a bin by dtype, the largest first, so all are aligned."""
    dtypes = sorted({place.dtype for place in places}, key=lambda dtype: (-dtype.itemsize, str(dtype)))
    rank_of = {dtype: rank for rank, dtype in enumerate(dtypes)}
    columns = [
        (index, rank_of[place.dtype], place.dataset_offset, extent.start, extent.nbytes, extent.is_shard)
        for index, place in enumerate(places)
        if (extent := place.extent).is_small
    ]
    indices, ranks, offsets, starts, sizes, is_shard = np.array(columns, np.int64).reshape(-1, 6).T
    parts = SmallParts.of_variables(offsets, Extents(offsets + starts, sizes), is_shard.astype(np.bool_))
    order = np.lexsort((parts.extents.starts, ranks, parts.bins))
    return indices[order].tolist(), parts.take(order)


def _rows(places: Sequence[Place], jobs: Sequence[int]) -> list[Row]:
    """Divide a bundle into rows."""
    rows: list[Row] = []
    start = 0
    for dtype, members in itertools.groupby(jobs, key=lambda job: places[job].dtype):
        row: list[int] = []
        numel = 0
        for job in members:
            more = places[job].extent.nbytes // dtype.itemsize
            if row and numel + more >= _ROW_NUMEL:
                rows.append(Row(row, dtype, start, numel))
                start += numel * dtype.itemsize
                row, numel = [], 0
            row.append(job)
            numel += more
        rows.append(Row(row, dtype, start, numel))
        start += numel * dtype.itemsize
    return rows


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


# ---- one save ----------------------------------------------------------------------------------------------------


class Jobs(Protocol):
    """What a rank writes in one save. Write jobs are made when they are asked for: small parts are packed without."""

    @property
    def packing(self) -> Packing:
        """What is the same in all saves of the layout."""

    def __getitem__(self, index: int, /) -> WriteJob:
        """A job."""

    def packed(self, bundle: Bundle, room: torch.Tensor) -> memoryview:
        """The bytes of a bundle.

        Args:
            bundle: One of the packing.
            room: Contiguous host memory of uint8, as long as the bundle, for the bytes unless they are packed already.
        """


class LiveJobs:
    """Write jobs of live tensors.

    Attributes:
        packing: What is the same in all saves of the layout.
        tensors: The elements of each box in row-major order; any shape, any strides, any device.
    """

    def __init__(self, packing: Packing, tensors: list[torch.Tensor]) -> None:
        self.packing = packing
        self.tensors = tensors

    @classmethod
    def of(cls, jobs: Sequence[WriteJob]) -> LiveJobs:
        """Of jobs in file order."""
        return cls(Packing.of([Place.of(job) for job in jobs]), [job.tensor for job in jobs])

    def tensor(self, index: int) -> torch.Tensor:
        """The elements of a box, in its shape."""
        tensor, shape = self.tensors[index], self.packing.places[index].box.shape
        tensor = tensor.detach() if tensor.requires_grad else tensor
        return tensor if tensor.shape == shape else tensor.view(shape)

    def __getitem__(self, index: int, /) -> WriteJob:
        """See `Jobs`."""
        return self.packing.places[index].job(self.tensor(index))

    def packed(self, bundle: Bundle, room: torch.Tensor) -> memoryview:
        """See `Jobs`."""
        tensors, of_gpus = self.tensors, []
        for row in bundle.rows:
            parts = [tensors[job] for job in row.jobs]
            if any_on_gpu(parts):
                of_gpus.append(row)
            else:
                join(row.within(room), parts)
        if of_gpus:
            self._pack_from_gpus(of_gpus, room)
        return bytes_of(room)

    def _pack_from_gpus(self, rows: Sequence[Row], room: torch.Tensor) -> None:
        """Pack rows that have parts on GPUs, through pinned memory."""
        pinned, copies = Memory(pinned_memory(len(room))), DeviceCopies()
        try:
            copies.start(itertools.chain.from_iterable(self._copies(row, pinned) for row in rows))
        finally:
            copies.finish()
        for row in rows:
            bytes_of(row.within(room))[:] = bytes_of(row.within(pinned.data))

    def _copies(self, row: Row, memory: Memory) -> Iterator[Copy | Joining]:
        """The copies from GPUs that put a row into memory; what is not on a GPU is copied at once."""
        parts = [self.tensor(job) for job in row.jobs]
        gpu = joining_gpu(row.dtype, parts)
        if gpu is not None:
            yield Joining(gpu, row.within(memory.data), parts)
            return
        start = row.start
        for part in parts:
            target, gpu = memory.room(part, start), gpu_of(part)
            if gpu is None:
                copy_bits(target, part)
            else:
                yield Copy(gpu, target, part)
            start += target.nbytes


def write_bundles(
    fd: int, jobs: Jobs, bundles: Iterable[Bundle], log: ChecksumLog | None, progress: Progress | None = None
) -> None:
    """Write small parts of this rank. Local.

    Args:
        fd: Descriptor of the file.
        jobs: What this rank writes.
        bundles: Some of its bundles.
        log: Receives the checksums; None computes none.
        progress: Called with the number of bytes just written.
    """
    writeback = rawio.Writeback(fd)
    for bundle in bundles:
        packed = jobs.packed(bundle, torch.empty(bundle.nbytes, dtype=torch.uint8, device="cpu"))
        if log is not None:
            bundle.log(packed, log)
        assembly = Assembly.of([bundle.extents])
        ordered = assembly.put_together(np.frombuffer(packed, np.uint8), np.empty(bundle.nbytes, np.uint8))
        write_runs(fd, assembly.runs, ordered, bundle.name(jobs.packing), writeback)
        if progress is not None:
            progress(bundle.nbytes)
    writeback.flush()


def write_runs(
    fd: int, runs: Iterable[tuple[int, int]], data: np.ndarray, name: str, writeback: rawio.Writeback
) -> None:
    """Write runs of small parts. Local.

    Args:
        fd: Descriptor of the file.
        runs: (position in the file, size) of each.
        data: Their bytes, one after the other.
        name: Describes the contents in an error.
        writeback: Starts write-back of what is written.
    """
    start = 0
    for offset, nbytes in runs:
        try:
            rawio.write_all(fd, data[start : start + nbytes].data, offset)
        except OSError as error:
            text = f"{error.strerror}: {name}, {nbytes} bytes at byte {offset} of the checkpoint"
            raise OSError(error.errno, text) from error
        writeback.add(offset, nbytes)
        start += nbytes
