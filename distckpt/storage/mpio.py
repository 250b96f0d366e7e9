"""Write large pieces through parallel HDF5.

HDF5's cost is per dataset, not per byte. So only contiguous pieces of at least a threshold go through `H5Dwrite`; the
rest is written with `pwrite` on the descriptor that each rank has open anyway. MPI-IO never gets a strided selection:
Open MPI 4.1.0-4.1.6 and 5.0.0-5.0.5 corrupt data in their sieving of such writes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from distckpt.storage import rawio
from distckpt.storage.checksum import ChecksumLog
from distckpt.storage.hdf5 import MANIFEST
from distckpt.storage.transfer import Progress, WriteJob
from distckpt.storage.writing import Piece, PieceBytes, pieces_of, write_pieces

#: Contiguous pieces of at least this size go through HDF5. In bytes.
THRESHOLD_NBYTES = 1 << 20


def why_unavailable() -> str | None:
    """The reason why parallel HDF5 cannot be used; None if it can. Local."""
    try:
        import h5py
    except ImportError as error:
        return f"h5py cannot be imported: {error}"
    if not h5py.get_config().mpi:
        return f"h5py {h5py.__version__} was built without MPI (the wheels on PyPI are); build it with HDF5_MPI=ON"
    return None


class ParallelFile:
    """The checkpoint file, open on all ranks with HDF5's MPI-IO driver.

    The constructor and `close` are collective over the communicator. Once it is open, all ranks must call `close`,
    also after an error.

    Args:
        path: Path of the file.
        comm: Communicator of mpi4py.
        hints: MPI-IO hints.
    """

    def __init__(self, path: str, comm: Any, hints: Mapping[str, str] | None = None) -> None:
        from h5py import h5f, h5p

        self._empty: _EmptyTransfer | None = None
        info = _info(comm, hints or {})
        access = h5p.create(h5p.FILE_ACCESS)
        access.set_fapl_mpio(comm, info)
        # The version bounds of creation, or HDF5 would rewrite the superblock. CLOSE_STRONG closes datasets, too.
        access.set_libver_bounds(h5f.LIBVER_V18, h5f.LIBVER_LATEST)
        access.set_fclose_degree(h5f.CLOSE_STRONG)
        try:
            self._file = h5f.open(os.fsencode(path), h5f.ACC_RDWR, access)
        finally:
            access.close()
            info.Free()

    def prepare_collective(self) -> None:
        """Prepare transfers without data, by which this rank takes part in collective writes after a failure. Local.

        Raises:
            OSError: HDF5 cannot open a dataset of the file.
        """
        self._empty = _EmptyTransfer.of(self._file)

    def close(self) -> None:
        """Close the file. Collective over the communicator."""
        self._empty = None
        self._file.close()

    def write(self, pieces: Iterable[Piece], fd: int, log: ChecksumLog | None, progress: Progress | None) -> None:
        """Write contiguous pieces with independent transfers. Local."""
        with _Transfer(self._file, collective=False) as transfer:
            source, writeback = PieceBytes(log), rawio.Writeback(fd)
            for piece in itertools.chain.from_iterable(source.batches(pieces)):
                transfer.run(piece, source)
                _finish(piece, writeback, progress)

    def write_collectively(
        self, pieces: Sequence[Piece], n_calls: int, fd: int, log: ChecksumLog | None, progress: Progress | None
    ) -> None:
        """Write contiguous pieces in `n_calls` collective transfers. Collective over the communicator.

        A rank that has no piece left, or that failed, takes part in the remaining transfers without data.
        `prepare_collective` must have been called.

        Args:
            pieces: At most `n_calls` pieces of this rank.
            n_calls: Number of transfers, the same on all ranks.
            fd: Descriptor of the file, for write-back.
            log: Receives the checksums; None computes none.
            progress: Called with the number of bytes just written.
        """
        failure: BaseException | None = None
        assert self._empty is not None, "prepared first"
        with _Transfer(self._file, collective=True) as transfer:
            source, writeback = PieceBytes(log), rawio.Writeback(fd)
            stream = itertools.chain.from_iterable(source.batches(pieces))
            # If an exception prevents a transfer, the call is made without data instead.
            while transfer.calls < n_calls:
                try:
                    piece = next(stream, None) if failure is None else None
                    if piece is None:
                        transfer.skip(self._empty)
                    else:
                        transfer.run(piece, source)
                        _finish(piece, writeback, progress)
                except BaseException as error:  # raised below, when all transfers have been made
                    failure = failure or error
        if failure is not None:
            raise failure


class _EmptyTransfer(NamedTuple):
    """The arguments of a transfer without data, made in advance so that nothing can fail when it is needed.

    Attributes:
        dataset: Some dataset of the file.
        in_memory: An empty selection.
        in_file: An empty selection.
        data: An empty array.
        datatype: Datatype of the dataset.
    """

    dataset: Any
    in_memory: Any
    in_file: Any
    data: np.ndarray
    datatype: Any

    @classmethod
    def of(cls, file: Any) -> _EmptyTransfer:
        """Make a transfer into the manifest, a dataset that every checkpoint has."""
        from h5py import h5d, h5s

        dataset = h5d.open(file, MANIFEST.encode())
        in_memory, in_file = h5s.create_simple((1,)), dataset.get_space()
        in_memory.select_none()
        in_file.select_none()
        return cls(dataset, in_memory, in_file, np.empty(0, np.uint8), dataset.get_type())


class _Transfer:
    """Calls `H5Dwrite` for pieces. Keeps the dataset of the last piece open until the context ends."""

    def __init__(self, file: Any, *, collective: bool) -> None:
        from h5py import h5fd, h5p

        self.calls = 0
        self._file = file
        self._options = h5p.create(h5p.DATASET_XFER)
        self._options.set_dxpl_mpio(h5fd.MPIO_COLLECTIVE if collective else h5fd.MPIO_INDEPENDENT)
        self._key = ""
        self._dataset: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def run(self, piece: Piece, source: PieceBytes) -> None:
        """Write a piece."""
        from h5py import h5s

        dataset = self._open(piece.job.key)
        source.flushed()
        data = np.frombuffer(source.get(piece), np.uint8)
        in_memory, in_file = h5s.create_simple((piece.block.box.numel,)), dataset.get_space()
        if piece.block.box.shape:
            in_file.select_hyperslab(*piece.block.box)
        self._write(dataset.write, in_memory, in_file, data, dataset.get_type())

    def skip(self, empty: _EmptyTransfer) -> None:
        """Take part in a collective transfer without data."""
        dataset, *arguments = empty
        self._write(dataset.write, *arguments)

    def _write(self, write: Callable[..., None], *arguments: Any) -> None:
        options = self._options
        # The try contains only the call, so that `calls` is right even if a signal handler raises.
        try:
            write(*arguments, options)
        finally:
            self.calls += 1

    def _open(self, key: str) -> Any:
        from h5py import h5d

        if key != self._key:
            self._close()
            self._dataset = h5d.open(self._file, key.encode())
            self._key = key
        return self._dataset

    def _close(self) -> None:
        if self._dataset is not None:
            self._dataset.close()
        self._dataset, self._key = None, ""


def _finish(piece: Piece, writeback: rawio.Writeback, progress: Progress | None) -> None:
    writeback.add(piece.file_offset, piece.block.nbytes)
    if progress is not None:
        progress(piece.block.nbytes)


def _info(comm: Any, hints: Mapping[str, str]) -> Any:
    """An MPI info object with just these hints, made from the communicator's, since mpi4py is not imported here."""
    info = comm.Get_info()
    for key in [info.Get_nthkey(i) for i in range(info.Get_nkeys())]:
        info.Delete(key)
    for key, value in hints.items():
        info.Set(key, value)
    return info


# ---- jobs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SplitPieces:
    """The pieces of a rank's jobs, divided by how they are written.

    Attributes:
        large: Contiguous pieces of at least the threshold, written through HDF5.
        small: All others, written with `pwrite`.
    """

    large: list[Piece]
    small: list[Piece]


def split_pieces(jobs: Iterable[WriteJob], threshold: int = THRESHOLD_NBYTES) -> SplitPieces:
    """Divide pieces into those for HDF5, contiguous and of at least `threshold` bytes, and those for `pwrite`."""
    split = SplitPieces([], [])
    for piece in pieces_of(jobs):
        through_hdf5 = piece.block.nbytes >= threshold and piece.is_contiguous
        (split.large if through_hdf5 else split.small).append(piece)
    return split


def write_mpio(
    file: ParallelFile,
    fd: int,
    pieces: SplitPieces,
    *,
    checksums: bool,
    n_collective_calls: int | None = None,
    progress: Progress | None = None,
) -> ChecksumLog:
    """Write pieces through parallel HDF5 and with `pwrite`. Collective only with `n_collective_calls`.

    Args:
        file: The open file.
        fd: This rank's own descriptor of the same file.
        pieces: The pieces of this rank.
        checksums: Compute the checksum of each piece.
        n_collective_calls: Number of collective transfers that every rank makes: the largest `len(pieces.large)` of all
            ranks. None makes independent transfers.
        progress: Called with the number of bytes just written.

    Returns:
        The checksums; empty without `checksums`.
    """
    result = ChecksumLog()
    log = result if checksums else None
    if n_collective_calls is None:
        file.write(pieces.large, fd, log, progress)
    else:
        file.write_collectively(pieces.large, n_collective_calls, fd, log, progress)
    write_pieces(fd, pieces.small, log, progress)
    return result
