"""The raw limits of the disk and of the page cache: plain system calls on one shared file."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from distckpt.bench.competitor import Competitor
from distckpt.bench.runner import gather
from distckpt.bench.state import State

#: Position in the file, and the memory that is read or written there.
_Step = tuple[int, memoryview]

_STEP = 16 << 20
_BLOCK = 4096
_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None, use_errno=True)


class Raw(Competitor):
    """Writes each rank's bytes, in one page-aligned buffer, to its part of one file, and reads them from there.

    Of a replicated state, each rank writes a part and reads everything.
    """

    is_rival = False

    def __init__(self, state: State, *, direct: bool = False, threads: int = 1) -> None:
        """Fill the buffer with the state. Collective over the process group.

        Args:
            state: The state whose bytes are saved and restored.
            direct: Write with O_DIRECT, past the page cache; else through it, starting write-back after each step.
            threads: Number of threads with which each rank reads.
        """
        super().__init__("raw" + " O_DIRECT" * direct + f", {threads} threads" * (threads > 1), state)
        self._direct = direct
        self._threads = threads
        # O_DIRECT needs whole blocks, and memory aligned to a block.
        nbytes = -(-state.local_nbytes // _BLOCK) * _BLOCK
        start = 0 if state.is_replicated else sum(gather(nbytes)[: dist.get_rank()])
        self._buffer = mmap.mmap(-1, max(nbytes, _BLOCK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = memoryview(self._buffer)
        self._steps = [(start + at, memory[at : min(at + _STEP, nbytes)]) for at in range(0, nbytes, _STEP)]
        self._own = _part(self._steps) if state.is_replicated else self._steps
        self._exchange(to_state=False)

    def save(self, stem: Path) -> Path:
        """Write this rank's part of the file, and flush it."""
        path = stem.with_suffix(".raw")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_DIRECT if self._direct else 0), 0o644)
        try:
            self._write(descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        flush_directory(path.parent)
        return path

    def restore(self, path: Path) -> None:
        """Read this rank's bytes back into the buffer."""
        descriptor = os.open(path, os.O_RDONLY)

        def read(step: _Step) -> None:
            at, view = step
            _require(os.preadv(descriptor, [view], at), view)

        try:
            if self._threads == 1:
                for step in self._steps:
                    read(step)
            else:
                with ThreadPoolExecutor(self._threads) as pool:
                    list(pool.map(read, self._steps))
        finally:
            os.close(descriptor)

    def show(self) -> None:
        """Copy the buffer into the state. Local."""
        self._exchange(to_state=True)

    def _write(self, descriptor: int) -> None:
        nbytes = sum(len(view) for _, view in self._own)
        if nbytes:
            os.posix_fallocate(descriptor, self._own[0][0], nbytes)
        for at, view in self._own:
            _require(os.pwritev(descriptor, [view], at), view)
            if not self._direct:
                start_write_back(descriptor, at, len(view))

    def _exchange(self, *, to_state: bool) -> None:
        flat = torch.from_numpy(np.frombuffer(self._buffer, dtype=np.uint8))
        at = 0
        for shard in self.state.shards:
            there, here = shard.view(-1).view(torch.uint8), flat[at : at + shard.nbytes]
            at += shard.nbytes
            if to_state:
                there.copy_(here)
            else:
                here.copy_(there)


def supports_direct(directory: Path) -> bool:
    """Whether files in a directory can be opened with O_DIRECT. Local."""
    probe = directory / f"direct-{dist.get_rank()}"
    try:
        os.close(os.open(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644))
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def start_write_back(descriptor: int, offset: int, nbytes: int) -> None:
    """Start to write a range of bytes back to the disk, without waiting for the end. Local."""
    arguments = (ctypes.c_int(descriptor), ctypes.c_int64(offset), ctypes.c_int64(nbytes))
    _libc.sync_file_range(*arguments, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


def flush_directory(directory: Path) -> None:
    """Flush a directory to disk, so that its names survive a power cut. Local."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _part(steps: Sequence[_Step]) -> Sequence[_Step]:
    """This rank's share of steps that all ranks have, as a stretch of neighbours."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return steps[len(steps) * rank // size : len(steps) * (rank + 1) // size]


def _require(moved: int, view: memoryview) -> None:
    if moved != len(view):
        raise OSError(f"expected to move {len(view)} bytes in one call. Got {moved}.")
