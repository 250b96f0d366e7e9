"""The skeleton of a checkpoint file: what HDF5 writes of it, and where its datasets are.

Every variable is a contiguous dataset, so a piece of it is a range of bytes in the file. The skeleton is the same for
every save of a layout: HDF5 makes it once, in memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distckpt.layout.aggregation import SMALL_NBYTES
from distckpt.layout.box import Shape
from distckpt.storage import manifest as manifests
from distckpt.storage.checksum import CHECKSUM_NBYTES
from distckpt.storage.commit import temp_path
from distckpt.storage.hdf5 import CHECKSUMS, MANIFEST, file_access
from distckpt.storage.hdf5_types import hdf5_type, itemsize

#: Datasets from `SMALL_NBYTES` on start at a multiple of this; smaller ones are neighbours. In bytes.
_ALIGNMENT = 4096

#: HDF5 takes room for its metadata in blocks of at most this size: few and long runs of bytes. In bytes.
_MAX_METADATA_BLOCK = 1 << 20

#: A file system in memory, where there is one.
_MEMORY = Path("/dev/shm")

#: HDF5 metadata per dataset and group, without the name: upper bounds. In bytes; measured: 330, and 1,300 for a group
#: of nine members, which is the dearest.
_METADATA_PER_DATASET = 600
_METADATA_PER_GROUP = 1600


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """A dataset to create.

    Attributes:
        key: Path of the dataset without the leading slash.
        dtype: torch dtype name.
        shape: Global shape.
    """

    key: str
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Skeleton:
    """A checkpoint file without its data.

    Attributes:
        file_nbytes: Length of the file in bytes.
        offsets: int64, position of each dataset in the file in bytes; -1 for a dataset without elements.
        checksums_offset: Position of the checksum dataset; -1 when it has no elements.
        n_checksums: Number of checksums.
        manifest_offset: Position of the manifest dataset.
        manifest_capacity: Size of the manifest dataset in bytes.
        runs: Position and bytes of everything that HDF5 wrote; all else between the datasets is zero.
    """

    file_nbytes: int
    offsets: np.ndarray
    checksums_offset: int
    n_checksums: int
    manifest_offset: int
    manifest_capacity: int
    runs: tuple[tuple[int, bytes], ...]


def max_file_nbytes(datasets: Sequence[DatasetSpec], n_checksums: int, manifest_nbytes: int) -> int:
    """Upper bound for the length of the file, in bytes."""
    sizes = [spec.nbytes for spec in datasets]
    sizes += [n_checksums * CHECKSUM_NBYTES, manifests.capacity_for(manifest_nbytes)]
    data = sum(nbytes + _ALIGNMENT for nbytes in sizes if nbytes >= SMALL_NBYTES)
    data += sum(nbytes + 8 for nbytes in sizes if nbytes < SMALL_NBYTES)
    return data + _max_metadata_nbytes(datasets)


def make_skeleton(datasets: Sequence[DatasetSpec], n_checksums: int, manifest_nbytes: int, directory: Path) -> Skeleton:
    """Let HDF5 make a file without data, and keep what HDF5 wrote. Rank 0 only.

    The file is sparse and in memory where there is such a file system, else in `directory`: HDF5 must not meet a full
    disk or an exceeded quota, since a failing H5Fclose kills the interpreter at the next garbage collection.
    """
    capacity = manifests.capacity_for(manifest_nbytes)
    # The last two come after the variables, whose positions then do not depend on the length of the manifest.
    checksums = DatasetSpec(CHECKSUMS, "uint64", (n_checksums,))
    specs = [*datasets, checksums, DatasetSpec(MANIFEST, "uint8", (capacity,))]
    access = file_access()
    access.set_alignment(SMALL_NBYTES, _ALIGNMENT)
    access.set_meta_block_size(_metadata_block(datasets))
    needed = 2 * _max_metadata_nbytes(datasets)
    path = temp_path((_MEMORY if _has_room(_MEMORY, needed) else directory) / "skeleton")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        offsets = _create_datasets(path, specs, access)
        return Skeleton(
            file_nbytes=os.fstat(fd).st_size,
            offsets=np.array(offsets[:-2], np.int64),
            checksums_offset=offsets[-2],
            n_checksums=n_checksums,
            manifest_offset=offsets[-1],
            manifest_capacity=capacity,
            runs=_read_runs(fd, [(offset, spec.nbytes) for offset, spec in zip(offsets, specs, strict=True)]),
        )
    finally:
        os.close(fd)
        Path(path).unlink(missing_ok=True)


def _has_room(directory: Path, nbytes: int) -> bool:
    try:
        system = os.statvfs(directory)
    except OSError:
        return False
    return os.access(directory, os.W_OK | os.X_OK) and system.f_bavail * system.f_frsize >= nbytes


def _create_datasets(path: str, specs: Sequence[DatasetSpec], access: Any) -> list[int]:
    """Create datasets over the file at `path`, and return their positions."""
    from h5py import h5f

    file = h5f.create(os.fsencode(path), h5f.ACC_TRUNC, _file_creation(), access)
    try:
        # It stays open, and a process that is killed leaves nothing behind.
        Path(path).unlink()
        creator = _DatasetCreator(file)
        return [creator.create(spec) for spec in specs]
    finally:
        file.close()


@dataclass(frozen=True, slots=True)
class _Names:
    """What the paths of datasets cost in HDF5 metadata.

    Attributes:
        groups: Number of groups on the paths.
        nbytes: Length of all names.
    """

    groups: int
    nbytes: int

    @classmethod
    def of(cls, datasets: Sequence[DatasetSpec]) -> _Names:
        groups: set[str] = set()
        for spec in datasets:
            parent = spec.key.rpartition("/")[0]
            while parent and parent not in groups:
                groups.add(parent)
                parent = parent.rpartition("/")[0]
        # At most four bytes per character.
        nbytes = sum(len(path.rpartition("/")[2]) for path in (*groups, *(spec.key for spec in datasets)))
        return cls(len(groups), 4 * nbytes)


def _metadata_block(datasets: Sequence[DatasetSpec]) -> int:
    """Size of HDF5's metadata blocks: for little metadata about its expected size, so that there is one block."""
    names = _Names.of(datasets)
    expected = 2048 + 320 * len(datasets) + 160 * names.groups + names.nbytes // 2
    return min(_MAX_METADATA_BLOCK, expected)


def _max_metadata_nbytes(datasets: Sequence[DatasetSpec]) -> int:
    """Upper bound for what HDF5 writes beside the data."""
    names = _Names.of(datasets)
    needed = len(datasets) * _METADATA_PER_DATASET + names.groups * _METADATA_PER_GROUP + 2 * names.nbytes
    return needed + 2 * _MAX_METADATA_BLOCK


def _file_creation() -> Any:
    from h5py import h5p

    creation = h5p.create(h5p.FILE_CREATE)
    creation.set_obj_track_times(False)
    return creation


class _DatasetCreator:
    """Creates contiguous datasets and the groups on their paths, all without timestamps."""

    def __init__(self, file: Any) -> None:
        from h5py import h5d, h5g, h5p, h5s, h5t

        self._new_dataset, self._new_group, self._new_space = h5d.create, h5g.create, h5s.create_simple
        self._scalar = h5s.create(h5s.SCALAR)
        self._groups = {"": file}
        self._links = h5p.create(h5p.LINK_CREATE)
        self._links.set_char_encoding(h5t.CSET_UTF8)
        self._group_creation = h5p.create(h5p.GROUP_CREATE)
        self._group_creation.set_obj_track_times(False)
        self._creation = h5p.create(h5p.DATASET_CREATE)
        self._creation.set_layout(h5d.CONTIGUOUS)
        self._creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        self._creation.set_fill_time(h5d.FILL_TIME_NEVER)
        self._creation.set_obj_track_times(False)

    def create(self, spec: DatasetSpec) -> int:
        """Create one dataset and return its position in the file; -1 when it has no elements."""
        parent, _, name = spec.key.rpartition("/")
        dataset = self._new_dataset(
            self._group(parent),
            name.encode(),
            hdf5_type(spec.dtype),
            self._new_space(spec.shape) if spec.shape else self._scalar,
            self._creation,
            self._links,
        )
        offset = dataset.get_offset()
        return -1 if offset is None else int(offset)

    def _group(self, path: str) -> Any:
        """The group of this path. HDF5 would create groups on the way by itself, but with timestamps."""
        missing = []
        while path not in self._groups:
            missing.append(path)
            path = path.rpartition("/")[0]
        group = self._groups[path]
        for path in reversed(missing):
            name = path.rpartition("/")[2]
            group = self._groups[path] = self._new_group(group, name.encode(), self._links, self._group_creation)
        return group


def _read_runs(fd: int, extents: Sequence[tuple[int, int]]) -> tuple[tuple[int, bytes], ...]:
    """Everything outside the datasets that is not zero."""
    runs = []
    for start, stop in _gaps(extents, os.fstat(fd).st_size):
        data = os.pread(fd, stop - start, start).rstrip(b"\0")
        if data:
            runs.append((start, data))
    return tuple(runs)


def _gaps(extents: Sequence[tuple[int, int]], file_nbytes: int) -> Iterator[tuple[int, int]]:
    position = 0
    for offset, nbytes in sorted(extent for extent in extents if extent[1]):
        if offset > position:
            yield position, offset
        position = offset + nbytes
    if file_nbytes > position:
        yield position, file_nbytes
