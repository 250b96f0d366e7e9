"""Verify a checkpoint: compare all its data with the stored checksums."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from distckpt.errors import CorruptCheckpointError
from distckpt.layout.box import MAX_PIECE_NBYTES, Box
from distckpt.layout.dtypes import dtype_info
from distckpt.layout.plan import ReadPlanner
from distckpt.storage.checksum import ChecksumReader, StoredChecksums
from distckpt.storage.hdf5 import OpenedCheckpoint, open_checkpoint
from distckpt.storage.reading import read, read_through_hdf5
from distckpt.storage.threads import LARGE_NBYTES, one_at_a_time, share_out, threads_of_rank
from distckpt.storage.transfer import Progress, ReadJob
from distckpt.tensor_bytes import torch_dtype


def verify_file(path: str | os.PathLike[str], *, progress: Progress | None = None) -> list[str]:
    """Read a whole checkpoint and compare every checksum. Local.

    Args:
        path: Path of the file, with or without ".h5".
        progress: Called with the number of bytes just verified, by one thread at a time.

    Returns:
        One sentence for each damaged piece, naming its variable; empty if there is none.

    Raises:
        CheckpointNotFoundError: There is no such file.
    """
    try:
        opened = open_checkpoint(os.fspath(path))
    except CorruptCheckpointError as error:
        return [str(error)]
    if opened.checksums is None:
        return [f"{opened.path}: the file has no checksums that could be verified"]
    fd = os.open(opened.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _Verification(opened, opened.checksums, fd, progress).run(threads_of_rank(1))
    finally:
        os.close(fd)


class _Piece(NamedTuple):
    """A piece of the file to verify.

    Attributes:
        number: Index among all pieces, in file order.
        variable: Index among the manifest's variables.
        box: The elements, in global coordinates.
        nbytes: Size in bytes.
        checksum: Index of its checksum.
    """

    number: int
    variable: int
    box: Box
    nbytes: int
    checksum: int


class _Verification:
    """The verification of one file: `run` shares its pieces out to threads, and collects the problems they find."""

    def __init__(self, opened: OpenedCheckpoint, stored: StoredChecksums, fd: int, progress: Progress | None) -> None:
        self._opened = opened
        self._stored = stored
        self._fd = fd
        self._progress = one_at_a_time(progress)
        self._problems: list[tuple[int, str]] = []

    def run(self, threads: int) -> list[str]:
        """Verify all pieces; returns one sentence for each damaged one, in file order."""
        small: list[_Piece] = []
        large: list[_Piece] = []
        for piece in self._pieces():
            (small if piece.nbytes < LARGE_NBYTES else large).append(piece)
        share_out(small, large, [self._verify] * threads)
        return [problem for _, problem in sorted(self._problems)]

    def _pieces(self) -> Iterator[_Piece]:
        variables = self._opened.manifest.variables
        planner = ReadPlanner(variables, self._opened.index)
        numbers = itertools.count()
        for index, variable in enumerate(variables):
            itemsize = dtype_info(variable.dtype).itemsize
            for item in planner.items(index, Box.whole(variable.shape)):
                yield _Piece(next(numbers), index, item.box, item.box.numel * itemsize, item.checksum)

    def _verify(self, pieces: Iterator[_Piece]) -> None:
        """Verify pieces, reading all into the same memory. Runs in one thread."""
        memory = torch.empty(MAX_PIECE_NBYTES, dtype=torch.uint8, device="cpu")
        checksums = ChecksumReader(self._fd, self._stored)
        for piece in pieces:
            variable, offset = self._opened.manifest.variables[piece.variable], self._opened.offsets[piece.variable]
            tensor = memory[: piece.nbytes].view(torch_dtype(variable.dtype)).view(piece.box.shape)
            expected = checksums[piece.checksum]
            job = ReadJob(variable.key, int(offset), variable.shape, piece.box, tensor, expected)
            problem = _check(self._fd, self._opened.path, job, self._progress)
            if problem is not None:
                self._problems.append((piece.number, problem))


def _check(fd: int, path: str, job: ReadJob, progress: Progress | None) -> str | None:
    """Read and verify one piece; returns what is wrong with it, or None."""
    try:
        if job.dataset_offset < 0:
            read_through_hdf5(path, [job], verify=True, progress=progress)
        else:
            read(fd, [job], verify=True, progress=progress)
    except (CorruptCheckpointError, OSError) as error:
        return str(error)
    return None
