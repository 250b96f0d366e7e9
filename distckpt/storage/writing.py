"""Write pieces at their positions in the file, with `pwrite` and `pwritev`."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from distckpt.device import Copy, DeviceCopies, Ticket, gpu_of
from distckpt.layout.box import cut, first_element, is_contiguous, run_axis, runs
from distckpt.storage import rawio
from distckpt.storage.checksum import ChecksumLog, digest
from distckpt.storage.room import HOST_NBYTES, PINNED_NBYTES, Buffer, padded
from distckpt.storage.transfer import Block, Progress, WriteJob, blocks_of, part_of
from distckpt.tensor_bytes import bytes_of, copy_bits, is_packed

#: Pieces that are adjacent in the file are joined until a write has at least this many bytes.
_JOINED_NBYTES = 1 << 20

#: Most runs that are listed in memory at once.
_RUNS_AT_ONCE = 8192


class Piece(NamedTuple):
    """A piece to write.

    Attributes:
        job: The job that it belongs to.
        block: Its position in the dataset, and in the packed bytes of the job.
        checksum: Index of its checksum.
        data: Its bytes in the memory of the job's tensor; None if they have to be copied, from a GPU or because the
            tensor is not packed.
    """

    job: WriteJob
    block: Block
    checksum: int
    data: memoryview | None

    @property
    def file_offset(self) -> int:
        """Position of its first byte in the file."""
        job = self.job
        return job.dataset_offset + first_element(self.block.box, job.global_shape) * job.tensor.element_size()

    @property
    def is_contiguous(self) -> bool:
        """Whether it is one range of bytes in the file."""
        return is_contiguous(self.block.box, self.job.global_shape)


def pieces_of(jobs: Iterable[WriteJob]) -> Iterator[Piece]:
    """The pieces of jobs, in order of the jobs."""
    for job in jobs:
        data = bytes_of(job.tensor) if is_packed(job.tensor) else None
        for number, block in enumerate(blocks_of(job.box, job.tensor.element_size()), job.checksum):
            yield Piece(job, block, number, None if data is None else data[block.start : block.start + block.nbytes])


class _OnTheWay(NamedTuple):
    """Bytes that are being copied from a GPU; they may be used after waiting for the ticket."""

    data: memoryview
    ticket: Ticket


class PieceBytes:
    """Gives the packed bytes of pieces: the memory of the tensor if it is packed, else a copy.

    The caller iterates over `batches` and calls `get` for each piece. It calls `flushed` when it has written the bytes
    given so far, before the next `get` at the latest if `needs_flush` is true.

    Args:
        log: Receives the checksums of the pieces; None computes none.
    """

    def __init__(self, log: ChecksumLog | None) -> None:
        self._log = log
        self._staging = Buffer(HOST_NBYTES)
        self._copies = DeviceCopies()
        self._on_the_way: deque[_OnTheWay] = deque()

    def batches(self, pieces: Iterable[Piece]) -> Iterator[Iterable[Piece]]:
        """The pieces in order. Those on GPUs are copied in batches, each while the one before is hashed and written.

        The caller must call `get` for each piece of a batch, and write the bytes, before it takes the next batch.
        """
        stream = iter(pieces)
        first: list[Piece] = []
        yield _before_gpus(stream, first)
        if first:
            yield from self._batches_ahead(itertools.chain(first, stream))

    def _batches_ahead(self, pieces: Iterable[Piece]) -> Iterator[Iterable[Piece]]:
        buffers = itertools.cycle([Buffer(PINNED_NBYTES, pinned=True), Buffer(PINNED_NBYTES, pinned=True)])
        ready: list[Piece] = []
        for batch, buffer in zip(_fitting(pieces), buffers, strict=False):
            self._start(batch, buffer)
            if ready:
                yield ready
            ready = batch
        yield ready

    def _start(self, batch: Iterable[Piece], buffer: Buffer) -> None:
        """Start to copy the pieces of a batch that are on GPUs; the former contents of the buffer have been written."""
        buffer.clear()
        copies, rooms = [], []
        for piece in batch:
            gpu = gpu_of(piece.job.tensor)
            if gpu is not None:
                part = part_of(piece.job, piece.block)
                room = buffer.take(part)
                copies.append(Copy(gpu, room.tensor, part))
                rooms.append(room.data)
        ticket = self._copies.start(copies)
        self._on_the_way.extend(_OnTheWay(data, ticket) for data in rooms)

    def needs_flush(self, piece: Piece) -> bool:
        """Whether the caller must write the bytes given so far, and call `flushed`, before it calls `get`."""
        return piece.data is None and not self._staging.has_room(piece.block.nbytes)

    def flushed(self) -> None:
        """Tell that all bytes given so far have been written, so that their buffer can be reused."""
        self._staging.clear()

    def finish(self) -> None:
        """Wait for all copies that were started. Needed only if some pieces of a batch were not taken."""
        self._copies.finish()

    def get(self, piece: Piece) -> memoryview:
        """The packed bytes of a piece; valid until `flushed`."""
        if piece.data is not None:
            data = piece.data
        elif gpu_of(piece.job.tensor) is None:
            part = part_of(piece.job, piece.block)
            room = self._staging.take(part)
            copy_bits(room.tensor, part)
            data = room.data
        else:
            data, ticket = self._on_the_way.popleft()
            ticket.wait()
        if self._log is not None:
            self._log.add(piece.checksum, digest(data))
        return data


def _before_gpus(stream: Iterator[Piece], first: list[Piece]) -> Iterator[Piece]:
    """Yield the pieces before the first one on a GPU, which is appended to `first`."""
    for piece in stream:
        if piece.data is None and gpu_of(piece.job.tensor) is not None:
            first.append(piece)
            return
        yield piece


def _fitting(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Divide pieces into batches whose pieces on GPUs fit into one pinned buffer."""
    batch: list[Piece] = []
    used = 0
    for piece in pieces:
        nbytes = 0 if gpu_of(piece.job.tensor) is None else padded(piece.block.nbytes)
        if used + nbytes > PINNED_NBYTES or len(batch) == rawio.MAX_VECTORS:
            yield batch
            batch, used = [], 0
        batch.append(piece)
        used += nbytes
    yield batch


class PieceWriter:
    """Writes pieces with few system calls: pieces that are adjacent in the file go into one `pwritev`.

    Args:
        fd: Descriptor of the file.
        log: Receives the checksums of the pieces; None computes none.
        progress: Called with the number of bytes just written.
    """

    def __init__(self, fd: int, log: ChecksumLog | None, progress: Progress | None) -> None:
        self._fd = fd
        self._bytes = PieceBytes(log)
        self._progress = progress
        self._writeback = rawio.Writeback(fd)
        self._buffers: list[memoryview] = []
        # The pieces joined so far, and their range in the file. They keep the memory of their tensors alive.
        self._joined: list[Piece] = []
        self._start = 0
        self._stop = 0

    def write(self, pieces: Iterable[Piece]) -> None:
        """Write pieces. Their tensors must not change meanwhile."""
        for batch in self._bytes.batches(pieces):
            for piece in batch:
                self._write(piece)
            self._flush()

    def _write(self, piece: Piece) -> None:
        """Write a piece, at the latest with the next `_flush`."""
        if self._bytes.needs_flush(piece):
            self._flush()
        if piece.is_contiguous:
            self._join(piece)
        else:
            self._write_runs(piece)

    def _join(self, piece: Piece) -> None:
        offset = piece.file_offset
        full = self._stop - self._start >= _JOINED_NBYTES or len(self._buffers) == rawio.MAX_VECTORS
        if full or offset != self._stop:
            self._flush()
        if not self._joined:
            self._start = offset
        self._joined.append(piece)
        self._buffers.append(self._bytes.get(piece))
        self._stop = offset + piece.block.nbytes

    def _flush(self) -> None:
        """Write the pieces that have been joined."""
        if self._joined:
            nbytes = self._stop - self._start
            try:
                rawio.write_vector(self._fd, self._buffers, self._start)
            except OSError as error:
                raise _explained(error, self._joined[0], nbytes) from error
            self._joined.clear()
            self._buffers.clear()
            self._writeback.add(self._start, nbytes)
            if self._progress is not None:
                self._progress(nbytes)
        self._bytes.flushed()

    def _write_runs(self, piece: Piece) -> None:
        data = self._bytes.get(piece)
        job, box = piece.job, piece.block.box
        axis = run_axis(box, job.global_shape)
        itemsize = job.tensor.element_size()
        position = 0
        for part in cut(box, _RUNS_AT_ONCE * math.prod(box.shape[axis:])):
            starts, numel = runs(part, job.global_shape)
            nbytes = numel * itemsize
            try:
                for start in starts:
                    offset = job.dataset_offset + start * itemsize
                    rawio.write_all(self._fd, data[position : position + nbytes], offset)
                    position += nbytes
            except OSError as error:
                raise _explained(error, piece, nbytes) from error
        if self._progress is not None:
            self._progress(piece.block.nbytes)


def _explained(error: OSError, piece: Piece, nbytes: int) -> OSError:
    return OSError(
        error.errno,
        f"{error.strerror}: {piece.job.key}, {nbytes} bytes at byte {piece.file_offset} of the checkpoint",
    )


def write_posix(
    fd: int,
    jobs: Iterable[WriteJob],
    *,
    checksums: bool,
    progress: Progress | None = None,
) -> ChecksumLog:
    """Write boxes with `pwrite`. Local.

    Args:
        fd: Descriptor of the file.
        jobs: The boxes to write; fastest in file order.
        checksums: Compute the checksum of each piece.
        progress: Called with the number of bytes just written.

    Returns:
        The checksums; empty without `checksums`.
    """
    log = ChecksumLog()
    write_pieces(fd, pieces_of(jobs), log if checksums else None, progress)
    return log


def write_pieces(fd: int, pieces: Iterable[Piece], log: ChecksumLog | None, progress: Progress | None) -> None:
    """Write pieces with `pwrite`, and add their checksums to `log`. Local."""
    PieceWriter(fd, log, progress).write(pieces)
