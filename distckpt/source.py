"""The checkpoint file of a restore: opened by all ranks, checked by rank 0."""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import numpy as np
import torch

from distckpt.coordination.coordinator import Coordinator
from distckpt.errors import CheckpointNotFoundError, CorruptCheckpointError
from distckpt.graph.assignment import TensorRead
from distckpt.layout.box import Box
from distckpt.layout.checksum_index import index_checksums
from distckpt.layout.dtypes import dtype_info
from distckpt.layout.exchange import InFile, PieceSpan, piece_spans
from distckpt.layout.plan import ReadPlanner
from distckpt.layout.records import Variable
from distckpt.storage import manifest as manifests
from distckpt.storage.checksum import ChecksumReader, StoredChecksums
from distckpt.storage.hdf5 import OpenedCheckpoint, open_checkpoint
from distckpt.storage.parallel_reading import read_in_threads
from distckpt.storage.paths import resolve
from distckpt.storage.piece_checks import PieceVerifier
from distckpt.storage.rawio import open_shared
from distckpt.storage.reading import ReadReport, read_through_hdf5
from distckpt.storage.transfer import Progress, ReadJob, sub_tensor
from distckpt.storage.units import Held, UnitReader, taken_verifier
from distckpt.tensor_bytes import copy_bits, sharing_memory
from distckpt.timing import Timer


class Found(msgspec.Struct, frozen=True):
    """Message of rank 0 with all it knows of a file that it has opened and checked; see `OpenedCheckpoint`."""

    path: str
    file_nbytes: int
    manifest: bytes
    offsets: bytes
    checksums: StoredChecksums | None

    @classmethod
    def of(cls, opened: OpenedCheckpoint) -> Found:
        """The message for an opened checkpoint. Rank 0 only."""
        return cls(opened.path, opened.file_nbytes, opened.manifest_bytes, opened.offsets.tobytes(), opened.checksums)

    def on_this_rank(self) -> OpenedCheckpoint:
        """The opened checkpoint, rebuilt without reading or checking the file again. Local."""
        manifest = manifests.decode(self.manifest)
        return OpenedCheckpoint(
            path=self.path,
            manifest=manifest,
            manifest_bytes=self.manifest,
            offsets=np.frombuffer(self.offsets, np.int64),
            index=index_checksums(manifest.variables),
            checksums=self.checksums,
            file_nbytes=self.file_nbytes,
        )


class Source:
    """A complete checkpoint, open for reading on this rank.

    `open_source` makes one on every rank of a restore, `open_local` one in a single process. An exchange reads the
    variables that ranks share through `unit_reader`; `read` reads what is left to this rank. Whoever opened it calls
    `close`; a restore does so when no value is pending any more. All methods are local.

    Attributes:
        path: Path of the file.
        manifest: The manifest of the file.
        bytes_read: Bytes of tensor data read so far on this rank.
        bytes_verified: Bytes of those whose checksums were compared.
    """

    def __init__(self, opened: OpenedCheckpoint, fd: int) -> None:
        manifest = opened.manifest
        self.path = opened.path
        self.manifest = manifest
        self.bytes_read = 0
        self.bytes_verified = 0
        self._offsets: list[int] = opened.offsets.tolist()
        self._checksums = None if opened.checksums is None else ChecksumReader(fd, opened.checksums)
        self._checksum_index = opened.index
        self._planner = ReadPlanner(manifest.variables, opened.index)
        self._index = {variable.key: index for index, variable in enumerate(manifest.variables)}
        self._fd = fd
        self._closer = weakref.finalize(self, os.close, fd)
        self._closer.atexit = False

    def read(
        self, reads: Sequence[TensorRead], *, verify: bool, progress: Progress | None = None, threads: int = 1
    ) -> None:
        """Read tensors into their targets. Local.

        Args:
            reads: The variables to read, and their targets.
            verify: Compare the checksums of all pieces that are read whole.
            progress: Called with the number of bytes just put into tensors.
            threads: Most threads that read. If targets share memory only one does, so that the last read wins.

        Raises:
            CorruptCheckpointError: The bytes of a tensor do not match their checksum.
            ValueError: The file is closed.
        """
        if not self._closer.alive:
            raise ValueError(f"{self.path}: the checkpoint is closed.")
        with torch.no_grad():
            whole = [read for read in reads if read.cast is None]
            if threads > 1 and sharing_memory([read.target.tensor for read in whole]):
                threads = 1
            self._run(self._jobs(whole, verify), verify, progress, threads)
            for read in reads:
                if read.cast is not None:
                    self._read_converting(read, verify)

    def _read_converting(self, read: TensorRead, verify: bool) -> None:
        """Read and convert piece by piece through a temporary tensor, so that memory stays bounded."""
        for job in self._jobs([read], verify):
            piece = torch.empty(job.box.shape, dtype=read.cast, device="cpu")
            self._run([msgspec.structs.replace(job, tensor=piece)], verify, None, threads=1)
            copy_bits(job.tensor, piece.to(job.tensor.dtype))

    def _run(self, jobs: list[ReadJob], verify: bool, progress: Progress | None, threads: int) -> None:
        placed = [job for job in jobs if job.dataset_offset >= 0]
        others = [job for job in jobs if job.dataset_offset < 0 and job.box.numel]
        reports = [read_in_threads(self._fd, placed, verify=verify, progress=progress, threads=threads)]
        if others:  # the file was rewritten by another program, such as h5repack
            self._require_at_path()
            reports.append(read_through_hdf5(self.path, others, verify=verify, progress=progress))
        for report in reports:
            self.count(report)

    def _jobs(self, reads: Sequence[TensorRead], verify: bool) -> list[ReadJob]:
        """What to read; one pass over all tensors, for a model has many."""
        checksums = self._checksums if verify else None
        jobs = []
        for read in reads:
            index = read.variable
            offset, shape = self._offsets[index], self.manifest.variables[index].shape
            for own, tensor in read.target.blocks():
                for item in self._planner.items(index, own):
                    expected = checksums[item.checksum] if checksums is not None and item.checksum >= 0 else None
                    part = sub_tensor(tensor, item.box, own)
                    jobs.append(ReadJob(read.key, offset, shape, item.box, part, expected))
        return jobs

    # ---- for an exchange with other ranks ----

    def is_one_range(self, index: int) -> bool:
        """Whether a variable is one range of bytes in the file: false if another program has chunked its dataset."""
        return self._offsets[index] >= 0

    def in_file(self, index: int) -> InFile:
        """The place of a variable in the file."""
        variable = self.manifest.variables[index]
        return InFile(variable.key, self._offsets[index], variable.shape, dtype_info(variable.dtype).itemsize)

    def pieces(self, index: int) -> list[PieceSpan]:
        """The pieces of a variable, with their spans, as an exchange needs them."""
        return piece_spans(self.manifest.variables[index], self._checksum_index.firsts(index))

    def unit_reader(
        self, variables: Mapping[int, InFile], pieces: Mapping[int, list[PieceSpan]], *, verify: bool
    ) -> UnitReader:
        """A reader of units of these variables that verifies these pieces, if `verify`."""
        return UnitReader(self._fd, variables, pieces, self._checksums if verify else None)

    def taken_verifier(
        self,
        variables: Mapping[int, InFile],
        pieces: Mapping[int, Collection[PieceSpan]],
        held: Mapping[int, Sequence[Held]],
        *,
        verify: bool,
    ) -> PieceVerifier:
        """A verifier of those of these pieces that the tensors in `held` take whole, if `verify`."""
        return taken_verifier(variables, pieces, held, self._checksums if verify else None)

    def count(self, report: ReadReport) -> None:
        """Add the counts of a report to `bytes_read` and `bytes_verified`."""
        self.bytes_read += report.bytes_read
        self.bytes_verified += report.bytes_verified

    # ---- what is known without reading ----

    def same_value(self, key: str, other: str) -> bool:
        """Whether two saved values are known to be equal, without reading them."""
        if key in self.manifest.python_state and other in self.manifest.python_state:
            return bytes(self.manifest.python_state[key]) == bytes(self.manifest.python_state[other])
        first, second = self._index.get(key), self._index.get(other)
        if first is None or second is None or self._checksums is None:
            return False
        a, b = self.manifest.variables[first], self.manifest.variables[second]
        if (a.dtype, a.shape, _boxes(a)) != (b.dtype, b.shape, _boxes(b)):
            return False
        whole = Box.whole(a.shape)
        pieces = [[item.checksum for item in self._planner.items(i, whole)] for i in (first, second)]
        return all(self._checksums[one] == self._checksums[two] for one, two in zip(*pieces, strict=True))

    def is_at_path(self) -> bool:
        """Whether the path still names this file, which may have been deleted or replaced."""
        try:
            return os.path.samestat(Path(self.path).stat(), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def _require_at_path(self) -> None:
        if not self.is_at_path():
            raise CheckpointNotFoundError(
                f"{self.path}: the file was deleted or replaced after it had been opened. Its datasets are chunked or "
                "compressed, so they can be read under its name only. Open it again."
            )

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """A context in which errors about damaged values, which name the value, name the file too, once."""
        try:
            yield
        except CorruptCheckpointError as error:
            if str(error).startswith(f"{self.path}: "):  # HDF5 could not open it again
                raise
            raise CorruptCheckpointError(f"{self.path}: {error}") from error

    def close(self) -> None:
        """Close the file. May be called again."""
        self._closer()


def _boxes(variable: Variable) -> list[Box]:
    """The boxes of the shards, without their writers."""
    return [Box(shard.offset, shard.shape) for shard in variable.shards]


def open_source(coordinator: Coordinator, path: str, timer: Timer) -> Source:
    """Open a checkpoint on all ranks, after rank 0 has checked it. Collective over the communicator.

    Args:
        coordinator: Coordinator of the ranks that restore.
        path: The file, with or without ".h5".
        timer: Timer of the restore.

    Raises:
        CheckpointNotFoundError: There is no such file.
        CorruptCheckpointError: The file is not a complete checkpoint.
    """
    own: list[OpenedCheckpoint] = []

    def look() -> Found:
        with timer.step("open"):
            own.append(open_checkpoint(resolve(path)))
            return Found.of(own[0])

    found = coordinator.on_root("open", look, Found)
    source = None
    try:
        with coordinator.step("open the file on every rank"), timer.step("open"):
            opened = own[0] if own else found.on_this_rank()
            source = Source(opened, open_shared(found.path, found.file_nbytes))
    except BaseException:
        if source is not None:
            source.close()
        raise
    return source


def open_local(path: str) -> Source:
    """Open a checkpoint in this process alone. Local.

    Raises:
        CheckpointNotFoundError: There is no such file.
        CorruptCheckpointError: The file is not a complete checkpoint.
    """
    path = resolve(path)
    with ExitStack() as on_error:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        on_error.callback(os.close, fd)
        opened = open_checkpoint(path)
        source = Source(opened, fd)
        on_error.pop_all()
    if source.is_at_path():
        return source
    source.close()  # `write` has replaced the file between the two openings
    return open_local(path)
