"""The HDF5 file of a checkpoint, made by rank 0 before any data are written.

The first file of a layout has its skeleton made by HDF5 (`storage.skeleton`); all later ones get the same bytes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from distckpt.storage import rawio
from distckpt.storage.skeleton import DatasetSpec, Skeleton, make_skeleton, max_file_nbytes

#: Errors that another directory or name may avoid.
_NO_PLACE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG})

#: Parts from this size on are worth a system call of their own. HDF5's metadata come in runs of 1 MiB. In bytes.
_LONG_NBYTES = 512 << 10


def create_file(path: str, datasets: Sequence[DatasetSpec], n_checksums: int, manifest_nbytes: int) -> Skeleton:
    """Make the first checkpoint file of a layout, without data, its space reserved. Rank 0 only.

    Args:
        path: Where; nothing may be there.
        datasets: The datasets, in file order.
        n_checksums: Number of checksums.
        manifest_nbytes: Upper bound for the length of the encoded manifest (`manifest.max_nbytes`).

    Returns:
        The skeleton of the file.

    Raises:
        OSError: No space, no permission, or something is at `path`. Nothing new is left there.
        ValueError: HDF5 cannot hold one of the datasets.
    """
    with _new_file(path) as fd:
        rawio.reserve(fd, max_file_nbytes(datasets, n_checksums, manifest_nbytes))
        skeleton = make_skeleton(datasets, n_checksums, manifest_nbytes, Path(path).parent)
        rebuild(fd, skeleton)
    return skeleton


def create_like(path: str, skeleton: Skeleton) -> None:
    """Make a further checkpoint file of a layout, without data, its space reserved. Rank 0 only; any thread.

    Args:
        path: Where; nothing may be there.
        skeleton: That of the first file of the layout.

    Raises:
        OSError: No space, no permission, or something is at `path`. Nothing new is left there.
    """
    with _new_file(path) as fd:
        rebuild(fd, skeleton)


@contextmanager
def _new_file(path: str) -> Iterator[int]:
    """A new file, which is removed if the body fails."""
    fd = _open_new(path)
    try:
        with rawio.naming(Path(path).parent):
            yield fd
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _open_new(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise
        text = f"cannot make the file: {error.strerror}, choose another directory or name"
        raise OSError(error.errno, text, path) from error


def rebuild(fd: int, skeleton: Skeleton) -> None:
    """Turn an empty file, perhaps with more space reserved, into one with this skeleton. Rank 0 only."""
    os.ftruncate(fd, min(os.fstat(fd).st_size, skeleton.file_nbytes))
    rawio.reserve(fd, skeleton.file_nbytes)
    for offset, data in skeleton.runs:
        rawio.write_all(fd, memoryview(data), offset)
        _start_writeback(fd, offset, len(data))


def _start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Let the disk begin with a long part: with many variables, what is no data is a third of the file."""
    if nbytes >= _LONG_NBYTES:
        rawio.start_writeback(fd, offset, nbytes)


def write_manifest(fd: int, skeleton: Skeleton, *parts: bytes) -> None:
    """Write an encoded manifest into its dataset, which is padded with blanks. Rank 0 only.

    Args:
        fd: Descriptor of the file.
        skeleton: Its skeleton.
        parts: The manifest, at most `rawio.MAX_VECTORS - 1` parts.

    Raises:
        ValueError: It does not fit.
    """
    nbytes, capacity = sum(map(len, parts)), skeleton.manifest_capacity
    if nbytes > capacity:
        raise ValueError(f"the manifest has {nbytes} bytes, its dataset {capacity}")
    rawio.write_vector(
        fd, [memoryview(part) for part in (*parts, b" " * (capacity - nbytes))], skeleton.manifest_offset
    )
    _start_writeback(fd, skeleton.manifest_offset, capacity)
