"""Compare all data of a checkpoint with its checksums."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from distckpt.errors import CorruptCheckpointError
from distckpt.layout.box import MAX_PIECE_NBYTES, Box
from distckpt.layout.plan import ReadPlanner
from distckpt.storage.checksum import ChecksumReader
from distckpt.storage.hdf5 import Opened, open_checkpoint
from distckpt.storage.reading import read, read_through_hdf5
from distckpt.storage.transfer import Progress, ReadJob
from distckpt.tensor_bytes import torch_dtype


def verify_file(path: str | os.PathLike[str], *, progress: Progress | None = None) -> list[str]:
    """Read a whole checkpoint and compare every checksum.

    Args:
        path: Path of the file, with or without ".h5".
        progress: Called with the number of bytes just verified.

    Returns:
        One sentence for each damaged piece, naming its variable; empty when all is well.

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
        jobs = _piece_jobs(opened, ChecksumReader(fd, opened.checksums))
        return [problem for job in jobs if (problem := _check(fd, opened.path, job, progress))]
    finally:
        os.close(fd)


def _piece_jobs(opened: Opened, checksums: ChecksumReader) -> Iterator[ReadJob]:
    """One job per piece, all with the same memory."""
    memory = torch.empty(MAX_PIECE_NBYTES, dtype=torch.uint8, device="cpu")
    variables = opened.manifest.variables
    planner = ReadPlanner(variables, opened.index)
    for number, (variable, offset) in enumerate(zip(variables, opened.offsets.tolist(), strict=True)):
        dtype = torch_dtype(variable.dtype)
        for item in planner.items(number, Box.whole(variable.shape)):
            tensor = memory[: item.box.numel * dtype.itemsize].view(dtype).view(item.box.shape)
            yield ReadJob(variable.key, offset, variable.shape, item.box, tensor, checksums[item.checksum])


def _check(fd: int, path: str, job: ReadJob, progress: Progress | None) -> str | None:
    """What is wrong with a piece; None when nothing is."""
    try:
        if job.dataset_offset < 0:
            read_through_hdf5(path, [job], verify=True, progress=progress)
        else:
            read(fd, [job], verify=True, progress=progress)
    except (CorruptCheckpointError, OSError) as error:
        return str(error)
    return None
