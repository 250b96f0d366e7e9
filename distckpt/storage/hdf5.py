"""The HDF5 file of a checkpoint, opened and checked; `storage.creation` makes it."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distckpt.errors import CheckpointNotFoundError, CorruptCheckpointError
from distckpt.layout.checksum_index import ChecksumIndex, index_checksums
from distckpt.layout.records import CHECKSUM_ALGORITHM, Manifest, Variable
from distckpt.log import log
from distckpt.storage import manifest as manifests
from distckpt.storage.checksum import CHECKSUM_NBYTES, StoredChecksums
from distckpt.storage.hdf5_types import hdf5_type, itemsize
from distckpt.storage.paths import resolve

MANIFEST = ".manifest"
CHECKSUMS = ".checksums"

#: No deflate stream expands further than this, and the other filters here (shuffle, fletcher32) do not expand.
_MAX_EXPANSION = 1100
_BOUNDED_FILTERS = frozenset({1, 2, 3})

#: Part of HDF5's message if the process has opened the file before, with other access properties.
_OPEN_OTHERWISE = "n't match"  # flags don't, a degree doesn't


def file_access() -> Any:
    """Access list of the serial driver; no locks, since many shared file systems have none. Closing closes objects."""
    from h5py import h5f

    access = _serial_access(locking=False)
    access.set_fclose_degree(h5f.CLOSE_STRONG)
    return access


def _serial_access(*, locking: bool, where_possible: bool = True) -> Any:
    from h5py import h5f, h5p

    access = h5p.create(h5p.FILE_ACCESS)
    access.set_fapl_sec2()
    access.set_libver_bounds(h5f.LIBVER_V18, h5f.LIBVER_LATEST)
    if hasattr(access, "set_file_locking"):
        access.set_file_locking(locking, where_possible)
    return access


@dataclass(frozen=True, slots=True, eq=False)
class OpenedCheckpoint:
    """A checkpoint that was found to be complete and consistent; data not verified.

    Attributes:
        path: Path of the file.
        manifest: Its manifest.
        manifest_bytes: The same encoded, for the other ranks (`manifest.decode`).
        offsets: int64, position of each variable in the file in bytes; -1: no elements, or to be read through HDF5.
        index: Where the checksum of each piece is.
        checksums: Where they are, one per piece in the order of `index`; None when the file has none, or of an
            algorithm unknown here.
        file_nbytes: Length of the file in bytes.
    """

    path: str
    manifest: Manifest
    manifest_bytes: bytes
    offsets: np.ndarray
    index: ChecksumIndex
    checksums: StoredChecksums | None
    file_nbytes: int


@contextmanager
def open_readonly(path: str) -> Iterator[Any]:
    """The file as a low-level h5py file, opened with the serial driver, closed at the end.

    Raises:
        CorruptCheckpointError: HDF5 cannot read the file.
    """
    try:
        file = _opened(path)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"{path}: no such file") from error
    except PermissionError:
        raise
    except OSError as error:
        raise CorruptCheckpointError(f"{path}: HDF5 cannot open the file: {error}") from error
    try:
        yield file
    finally:
        file.close()


def _opened(path: str) -> Any:
    from h5py import h5f

    name = os.fsencode(path)
    ways: tuple[Callable[[], Any], ...] = (
        file_access,
        # If the program has the file open itself, with one of the values of h5py's `locking`. This takes no lock.
        functools.partial(_serial_access, locking=True),
        functools.partial(_serial_access, locking=True, where_possible=False),
        functools.partial(_serial_access, locking=False),
        functools.partial(_serial_access, locking=False, where_possible=False),
    )
    *others, last = ways
    for access in others:
        try:
            return h5f.open(name, h5f.ACC_RDONLY, access())
        except OSError as error:
            if _OPEN_OTHERWISE not in str(error):
                raise
    return h5f.open(name, h5f.ACC_RDONLY, last())


def open_checkpoint(path: str) -> OpenedCheckpoint:
    """Open a checkpoint and check all of it but the data. Rank 0 only.

    Args:
        path: Path of the file, with or without ".h5".

    Raises:
        CheckpointNotFoundError: There is no such file.
        CorruptCheckpointError: It is no checkpoint, incomplete, damaged, or of an unknown format version.
    """
    path = resolve(path)
    file_nbytes = Path(path).stat().st_size
    with open_readonly(path) as file:
        try:
            return _check(path, file, file_nbytes)
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(f"{path}: {error}") from error
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise CorruptCheckpointError(f"{path}: HDF5 cannot read the file: {error}") from error


def _check(path: str, file: Any, file_nbytes: int) -> OpenedCheckpoint:
    manifest_bytes = _read_manifest(file, file_nbytes)
    manifest = manifests.decode(manifest_bytes)
    problems = manifests.problems(manifest)
    if not problems:
        sizes = manifests.sizes_of(manifest.variables)
        offsets = _offsets(file, manifest.variables, sizes, file_nbytes)
        problems = manifests.extent_problems(manifest.variables, sizes, offsets, file_nbytes)
    if problems:
        raise CorruptCheckpointError("the manifest does not fit the file:\n  " + "\n  ".join(problems[:10]))
    index = index_checksums(manifest.variables)
    return OpenedCheckpoint(
        path=path,
        manifest=manifest,
        manifest_bytes=manifest_bytes,
        offsets=offsets,
        index=index,
        checksums=_find_checksums(file, manifest, index.total, file_nbytes),
        file_nbytes=file_nbytes,
    )


def _read_manifest(file: Any, file_nbytes: int) -> bytes:
    try:
        data = _read_vector(_open_vector(file, MANIFEST, "uint8", file_nbytes), "uint8")
    except KeyError as error:
        raise CorruptCheckpointError("no manifest: this is an HDF5 file, but no checkpoint of distckpt") from error
    return data.tobytes().rstrip(b" ")


def _find_checksums(file: Any, manifest: Manifest, expected: int, file_nbytes: int) -> StoredChecksums | None:
    if manifest.checksums is None:
        return None
    if manifest.checksums != CHECKSUM_ALGORITHM:
        log.warning("checksums of algorithm %r cannot be verified", manifest.checksums)
        return None
    try:
        dataset = _open_vector(file, CHECKSUMS, "uint64", file_nbytes)
    except KeyError as error:
        raise CorruptCheckpointError("its checksums are missing") from error
    (total,) = dataset.shape
    if total != expected:
        raise CorruptCheckpointError(f"expected {expected} checksums. Got {total}.")
    offset = _offset_of(dataset)
    if offset < 0:
        return StoredChecksums(total, offset, _read_vector(dataset, "uint64").tobytes())
    if offset + total * CHECKSUM_NBYTES > file_nbytes:
        raise CorruptCheckpointError(f"its checksums are not inside the file of {file_nbytes} bytes")
    return StoredChecksums(total, offset)


def _open_vector(file: Any, name: str, dtype: str, file_nbytes: int) -> Any:
    """Open a one-dimensional dataset.

    Raises:
        KeyError: There is none.
        CorruptCheckpointError: It is another one, or its bytes are not in this file.
    """
    from h5py import h5d

    dataset = h5d.open(file, name.encode())
    if len(dataset.shape) != 1 or not dataset.get_type().equal(hdf5_type(dtype)):
        raise CorruptCheckpointError(f"{name} is not a vector of {dtype}")
    _check_storage(file, dataset, name, dataset.shape[0] * itemsize(dtype), file_nbytes)
    return dataset


def _read_vector(dataset: Any, dtype: str) -> np.ndarray:
    """Read all of a one-dimensional dataset."""
    from h5py import h5s

    data = np.zeros(dataset.shape, dtype)  # HDF5 leaves the memory as it is for chunks that it does not find
    if data.size:
        dataset.read(h5s.ALL, h5s.ALL, data, hdf5_type(dtype))
    return data


def _check_storage(file: Any, dataset: Any, name: str, nbytes: int, file_nbytes: int) -> None:
    """Check that a dataset keeps its bytes in this file, and that there can be as many as it says."""
    from h5py import h5d, h5f

    creation = dataset.get_create_plist()
    layout = creation.get_layout()
    elsewhere = layout == getattr(h5d, "VIRTUAL", -1) or creation.get_external_count() > 0
    if elsewhere or h5f.get_name(dataset) != h5f.get_name(file):
        raise CorruptCheckpointError(f"{name}: its data are in another file")
    stored = dataset.get_storage_size()
    if stored > file_nbytes or nbytes > stored * _max_expansion(creation):
        raise CorruptCheckpointError(f"{name}: {nbytes} bytes are not inside the file of {file_nbytes} bytes")


def _max_expansion(creation: Any) -> float:
    """How much larger data can be than their stored form."""
    filters = [creation.get_filter(number)[0] for number in range(creation.get_nfilters())]
    if not filters:
        return 1
    return _MAX_EXPANSION if set(filters) <= _BOUNDED_FILTERS else math.inf


def _offsets(file: Any, variables: Sequence[Variable], sizes: np.ndarray, file_nbytes: int) -> np.ndarray:
    """Where each variable is: what the manifest says, if that is true of the first and the last."""
    offsets = np.array([variable.offset for variable in variables], np.int64)
    offsets[sizes == 0] = -1
    filled = np.flatnonzero(sizes).tolist()
    if any(_position(file, variables[i], file_nbytes) != offsets[i] for i in {*filled[:1], *filled[-1:]}):
        # Rewritten, by h5repack for instance.
        offsets[filled] = [_position(file, variables[i], file_nbytes) for i in filled]
    return offsets


def _position(file: Any, variable: Variable, file_nbytes: int) -> int:
    """Where HDF5 has a variable's data; -1 when they are not one range of bytes."""
    from h5py import h5d

    key = variable.key
    try:
        dataset = h5d.open(file, f"/{key}".encode())
    except KeyError as error:
        raise CorruptCheckpointError(f"{key}: its dataset is missing") from error
    if dataset.shape != variable.shape or not dataset.get_type().equal(hdf5_type(variable.dtype)):
        raise CorruptCheckpointError(
            f"{key}: its dataset is another one. Expected shape {variable.shape} of {variable.dtype}. Got shape "
            f"{dataset.shape} of {dataset.dtype}."
        )
    _check_storage(file, dataset, key, manifests.nbytes_of(variable), file_nbytes)
    return _offset_of(dataset)


def _offset_of(dataset: Any) -> int:
    """Position of a dataset's bytes in the file; -1 when they are not one range."""
    from h5py import h5d

    contiguous = dataset.get_create_plist().get_layout() == h5d.CONTIGUOUS
    offset = dataset.get_offset() if contiguous else None
    return -1 if offset is None else int(offset)
