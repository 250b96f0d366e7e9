"""Aggregation: the ranks send their parts of many small variables to a few ranks, which write them.

Each bin of the file (see `layout.aggregation`) has one rank as its aggregator. In a save the ranks go through the bins
in order: each packs its parts of the bin and sends them; the aggregator puts the bin together and writes it. Who has
which parts is agreed in the first save of a layout, so that later saves send nothing but the bytes.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from distckpt.coordination.coordinator import Coordinator
from distckpt.layout.aggregation import (
    EXTENT_NBYTES,
    SMALL_NBYTES,
    Assembly,
    Extents,
    SmallParts,
    aggregators,
    count_bins,
)
from distckpt.layout.box import first_element, is_contiguous
from distckpt.request import Attempt
from distckpt.storage import rawio
from distckpt.storage.checksum import ChecksumLog, digest
from distckpt.storage.transfer import WriteJob
from distckpt.storage.writing import PieceBytes, pieces_of
from distckpt.tensor_bytes import bytes_of, is_packed

_STEP = "aggregate"
_COUNT_NBYTES = 8


class Aggregation:
    """Writes the small parts in all saves of one layout: the first `write` agrees on a plan, which all carry out."""

    def __init__(self) -> None:
        self._plan: _Plan | None = None

    @property
    def is_needless(self) -> bool:
        """Whether there is a plan, and it aggregates nothing. The same on all ranks."""
        return self._plan is not None and not self._plan.bins

    def write(
        self, coordinator: Coordinator, fd: int, file_nbytes: int, jobs: list[WriteJob], log: ChecksumLog | None
    ) -> list[WriteJob]:
        """Write the small parts of all ranks through their aggregators. Collective over the communicator.

        Args:
            coordinator: Coordinator of the ranks that save; the same ranks in every save.
            fd: Descriptor of the file.
            file_nbytes: Length of the file.
            jobs: What this rank writes, in file order; the same boxes, at the same offsets, in every save.
            log: Receives the checksums of the aggregated parts; None computes none.

        Returns:
            The jobs that this rank has to write itself.

        Raises:
            CollectiveError: It failed on some rank.
        """
        if coordinator.size == 1:
            return jobs
        if self._plan is None:
            self._plan = _agree_on_plan(coordinator, jobs, file_nbytes)
        plan = self._plan
        if not plan.bins:
            return jobs
        with coordinator.step(_STEP):
            writing = _Writing(plan, jobs, fd, log)
        writing.run(coordinator)
        with coordinator.step(_STEP):
            if writing.failure is not None:
                raise writing.failure
        return [jobs[index] for index in plan.others]


# ---- who has what ------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """The bytes of one job in the message that this rank sends.

    Attributes:
        job: Index of the job.
        start: Position of its first byte in the message.
        stop: Position after its last byte.
    """

    job: int
    start: int
    stop: int


class _Bin(NamedTuple):
    """A bin of the plan, as one rank sees it.

    Attributes:
        root: Rank of the aggregator.
        parts: The parts that this rank sends, in message order.
        nbytes: Size of this rank's message, in bytes.
        assembly: How the aggregator puts the bin together; None on other ranks.
    """

    root: int
    parts: list[_Part]
    nbytes: int
    assembly: Assembly | None

    @classmethod
    def of(cls, own: _Own, assembly: Assembly | None) -> _Bin:
        """Lay out this rank's message: its parts one after the other."""
        stops = np.cumsum(own.extents.sizes)
        starts = stops - own.extents.sizes
        parts = [_Part(*each) for each in zip(own.jobs, starts.tolist(), stops.tolist(), strict=True)]
        return cls(own.root, parts, parts[-1].stop if parts else 0, assembly)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which jobs are aggregated, and how.

    Attributes:
        bins: In file order; the same bins on all ranks.
        others: Indices of this rank's jobs that are in no bin.
    """

    bins: list[_Bin]
    others: list[int]


class _Own(NamedTuple):
    """This rank's jobs in a bin.

    Attributes:
        root: Rank of the aggregator.
        jobs: Indices of the jobs.
        extents: Their places in the file.
        encoded: `extents`, encoded for the aggregator.
    """

    root: int
    jobs: list[int]
    extents: Extents
    encoded: bytes


def _agree_on_plan(coordinator: Coordinator, jobs: Sequence[WriteJob], file_nbytes: int) -> _Plan:
    """Choose the bins to aggregate, and tell each aggregator which parts the ranks have. Collective."""
    with coordinator.step(_STEP):
        small = [index for index, job in enumerate(jobs) if _is_small(job)]
        parts = _small_parts([jobs[index] for index in small])
        crowded = parts.crowded(count_bins(file_nbytes), coordinator.size)
    numbers = np.flatnonzero(coordinator.any(crowded)).tolist()
    with coordinator.step(_STEP):
        roots = aggregators(len(numbers), coordinator.size)
        own = [_own(root, small, parts, parts.within(number)) for root, number in zip(roots, numbers, strict=True)]
    by_rank = _tell_aggregators(coordinator, own)
    with coordinator.step(_STEP):
        assemblies = [Assembly.of(extents) if extents else None for extents in by_rank]
        bins = [_Bin.of(each, assembly) for each, assembly in zip(own, assemblies, strict=True)]
        aggregated = {index for each in own for index in each.jobs}
        return _Plan(bins, [index for index in range(len(jobs)) if index not in aggregated])


def _own(root: int, small: Sequence[int], parts: SmallParts, which: slice) -> _Own:
    extents = parts.extents.slice(which)
    return _Own(root, list(small[which]), extents, extents.encode())


def _tell_aggregators(coordinator: Coordinator, own: Sequence[_Own]) -> list[list[Extents]]:
    """Send the extents of each bin to its aggregator. Returns, by bin, those of each rank; [] elsewhere. Collective."""
    size = coordinator.size
    with coordinator.step(_STEP):
        counts = [np.zeros(size if each.root == coordinator.rank else 0, np.int64) for each in own]
    for each, count in zip(own, counts, strict=True):
        encoded = len(each.jobs).to_bytes(_COUNT_NBYTES, "little")
        coordinator.gather_into(each.root, encoded, [_COUNT_NBYTES] * size, count.data.cast("B"))
    with coordinator.step(_STEP):
        tables = [bytearray(EXTENT_NBYTES * int(count.sum())) for count in counts]
        lengths = [(EXTENT_NBYTES * count).tolist() for count in counts]
    for each, length, table in zip(own, lengths, tables, strict=True):
        coordinator.gather_into(each.root, each.encoded, length, table)
    with coordinator.step(_STEP):
        return [_decode(table, length) for table, length in zip(tables, lengths, strict=True)]


def _decode(table: bytearray, lengths: Sequence[int]) -> list[Extents]:
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    view = memoryview(table)
    return [Extents.decode(view[end - length : end]) for end, length in zip(ends, lengths, strict=True)]


def _is_small(job: WriteJob) -> bool:
    """Whether a job writes one range of bytes of a small variable: small ones lie next to each other in the file."""
    nbytes = math.prod(job.global_shape) * job.tensor.element_size()
    return 0 < nbytes < SMALL_NBYTES and job.box.numel > 0 and is_contiguous(job.box, job.global_shape)


def _small_parts(jobs: Sequence[WriteJob]) -> SmallParts:
    places = [first_element(job.box, job.global_shape) * job.tensor.element_size() for job in jobs]
    offsets = np.array([job.dataset_offset for job in jobs], np.int64)
    extents = Extents(offsets + np.array(places, np.int64), np.array([job.tensor.nbytes for job in jobs], np.int64))
    is_shard = np.array([job.box.shape != job.global_shape for job in jobs], np.bool_)
    return SmallParts.of_variables(offsets, extents, is_shard)


# ---- one save ----------------------------------------------------------------------------------------------------


class _Writing:
    """The aggregation of one save: packs and sends this rank's parts, and writes the bins that it aggregates.

    All memory is allocated before `run` begins, so that no rank runs out of it between two gathers.

    Attributes:
        failure: First error on this rank, if any. It still takes part to the end, since others wait for its bytes.
    """

    def __init__(self, plan: _Plan, jobs: Sequence[WriteJob], fd: int, log: ChecksumLog | None) -> None:
        assemblies = [each.assembly for each in plan.bins if each.assembly is not None]
        self.failure: BaseException | None = None
        self._plan = plan
        self._jobs = jobs
        self._fd = fd
        self._log = log
        self._writeback = rawio.Writeback(fd)
        self._message = torch.empty(max(each.nbytes for each in plan.bins), dtype=torch.uint8, device="cpu")
        self._arrived = np.empty(max((sum(each.lengths) for each in assemblies), default=0), np.uint8)
        self._memory = np.empty(max((each.nbytes for each in assemblies), default=0), np.uint8)

    def run(self, coordinator: Coordinator) -> None:
        """Send, and as an aggregator write, bin after bin. Collective. Local errors go to `failure`."""
        for each in self._plan.bins:
            self._try(self._pack, each)
            lengths = [] if each.assembly is None else each.assembly.lengths
            arrived = self._arrived[: sum(lengths)]
            coordinator.gather_into(each.root, bytes_of(self._message)[: each.nbytes], lengths, arrived.data)
            if each.assembly is not None:
                self._try(self._write, each.assembly, arrived, self._name(each))
        self._writeback.flush()

    def _pack(self, each: _Bin) -> None:
        """Copy this rank's parts of a bin into its message, and log their checksums."""
        address = self._message.data_ptr()
        others: list[_Part] = []
        for part in each.parts:
            tensor = self._jobs[part.job].tensor
            if is_packed(tensor):
                ctypes.memmove(address + part.start, tensor.data_ptr(), part.stop - part.start)
            else:
                others.append(part)
        message = bytes_of(self._message)
        if others:
            self._pack_copies(others, message)
        if self._log is not None:
            for job, start, stop in each.parts:
                self._log.add(self._jobs[job].checksum, digest(message[start:stop]))

    def _pack_copies(self, parts: Sequence[_Part], message: memoryview) -> None:
        """Copy parts that are on a GPU, or not packed in memory."""
        source, places = PieceBytes(None), iter(parts)
        for batch in source.batches(pieces_of(self._jobs[part.job] for part in parts)):
            for piece, part in zip(batch, places, strict=False):
                if source.needs_flush(piece):
                    source.flushed()
                message[part.start : part.stop] = source.get(piece)
            source.flushed()

    def _name(self, each: _Bin) -> str:
        """Describes the contents of a bin in an error. The aggregator knows only the keys of its own parts."""
        return f"{self._jobs[each.parts[0].job].key} and other small variables" if each.parts else "small variables"

    def _write(self, assembly: Assembly, arrived: np.ndarray, name: str) -> None:
        """Put a bin together from all messages, and write it."""
        memory = self._memory[: assembly.nbytes]
        assembly.put_together(arrived, memory)
        for position, nbytes in assembly.runs:
            offset = assembly.start + position
            try:
                rawio.write_all(self._fd, memory[position : position + nbytes].data, offset)
            except OSError as error:
                text = f"{error.strerror}: {name}, {nbytes} bytes at byte {offset} of the checkpoint"
                raise OSError(error.errno, text) from error
            self._writeback.add(offset, nbytes)

    def _try(self, work: Callable[..., None], *arguments: object) -> None:
        """Do local work, unless earlier work failed. An error is kept in `failure` until the ranks agree."""
        if self.failure is None:
            self.failure = Attempt.of(lambda: work(*arguments)).error
