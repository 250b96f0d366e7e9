"""The file of a save as rank 0 sees it: created from what all ranks agreed, then committed or abandoned."""

from __future__ import annotations

import functools
import os
import platform
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import numpy as np

from distckpt.layout.merge import Merged
from distckpt.layout.records import (
    CHECKSUM_ALGORITHM,
    FORMAT,
    FORMAT_VERSION,
    Manifest,
    Variable,
)
from distckpt.log import log
from distckpt.options import SaveOptions
from distckpt.request import encode_metadata
from distckpt.storage import manifest as manifests
from distckpt.storage import mpio
from distckpt.storage.commit import commit, discard, sweep, temp_path
from distckpt.storage.hdf5 import DatasetSpec, Skeleton, create_file, write_manifest
from distckpt.storage.paths import make_directory, next_number, require_newest, single_path, split_prefix
from distckpt.storage.rawio import sync_directory
from distckpt.storage.state import record_save

_LIBRARIES = ("distckpt", "torch", "numpy", "h5py", "mpi4py")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a save goes.

    Attributes:
        path: As given to `save` or `write`.
        counter: The live save counter.
        number: The number that the file is to have; None for the next one. For files made by `write` it says nothing.
    """

    path: str | os.PathLike[str]
    counter: int
    number: int | None


@dataclass(frozen=True, slots=True)
class _Name:
    """The final path of a file, and the save counter that it stores: 0 for a file made by `write`."""

    final: str
    counter: int


class Created(msgspec.Struct, frozen=True):
    """What every rank must know of a file that rank 0 has created.

    Attributes:
        path: The final path.
        temp_path: Where the file is until it is committed.
        counter: The save counter that it stores; 0 for a file made by `write`.
        file_nbytes: Length of the file in bytes.
        checksums_offset: Position of the checksum dataset in the file, in bytes.
        transport: "mpio" or "posix".
        fresh: The positions of the variables are new; rank 0 shares them next.
    """

    path: str
    temp_path: str
    counter: int
    file_nbytes: int
    checksums_offset: int
    transport: str
    fresh: bool


class Output:
    """The files of one operation, "save" or "write". Rank 0 only."""

    def __init__(self, *, numbered: bool) -> None:
        """Local.

        Args:
            numbered: Files have numbers and a state file, and never replace one another.
        """
        self._numbered = numbered
        self._merged: Merged | None = None
        self._variables: list[Variable] = []  # with their positions in the file
        self._skeleton: Skeleton | None = None
        self._with_checksums = True
        self._swept: set[str] = set()
        self._temp = ""
        self._created: Created | None = None
        self._finished: os.stat_result | None = None  # of the complete temporary file

    def adopt(self, merged: Merged) -> None:
        """Take a new layout; the next file is made through HDF5."""
        self._merged = merged
        self._skeleton = None

    def update_values(self, python_values: Mapping[str, bytes]) -> None:
        """Take rank 0's present python values, by key."""
        self._require_merged().python_state.update(python_values)

    @property
    def offsets(self) -> np.ndarray | None:
        """Position of every variable in the file, in bytes; None on other ranks than 0."""
        return None if self._skeleton is None else self._skeleton.offsets

    def create(self, target: Target, options: SaveOptions, size: int) -> Created:
        """Create the temporary file with everything but the data.

        Args:
            target: Where the save goes.
            options: Of the save.
            size: Number of ranks.

        Raises:
            OSError: The directory or the file cannot be made, or there is no space.
            ValueError: There is a checkpoint with the wanted number or a higher one.
        """
        name = self._name(target)
        directory = Path(name.final).parent
        make_directory(directory)
        if str(directory) not in self._swept:
            sweep(directory)
            self._swept.add(str(directory))
        if self._with_checksums != options.checksums:
            self._with_checksums, self._skeleton = options.checksums, None
        transport = _choose_transport(options, size)
        manifest = self._manifest(name.counter, options, size, transport)
        self._temp = temp = temp_path(name.final)
        skeleton = self._make_file(temp, manifest)
        fresh = skeleton is not self._skeleton
        if fresh:
            self._place(skeleton)
        file_nbytes, checksums_offset = skeleton.file_nbytes, skeleton.checksums_offset
        self._created = Created(name.final, temp, name.counter, file_nbytes, checksums_offset, transport, fresh)
        self._fill_manifest(temp, msgspec.structs.replace(manifest, variables=self._variables))
        return self._created

    def commit(self, options: SaveOptions) -> None:
        """Make the finished file the checkpoint: durable, and visible to all.

        Raises:
            OSError: It could not be renamed or recorded; `abandon` takes the checkpoint back.
        """
        assert self._created is not None, "created first"
        temp, final, durable = self._created.temp_path, Path(self._created.path), options.durable
        self._finished = Path(temp).stat()
        commit(temp, str(final), replace=not self._numbered, durable=False)
        if durable:
            sync_directory(final.parent)
        if self._numbered:
            record_save(final, durable=durable)

    def finish(self) -> None:
        """All ranks know that the checkpoint is committed."""
        self._created = self._finished = None
        self._temp = ""

    def abandon(self) -> None:
        """Remove what a failed save has left; nothing happens when there is nothing, as on other ranks than 0."""
        self._skeleton = None  # perhaps not all ranks have heard where it has the variables
        try:
            if self._created is not None and self._finished is not None and self._numbered:
                _remove(Path(self._created.path), self._finished)
            if self._temp:
                discard(self._temp)
        except OSError as error:  # all ranks raise what they agreed on; a later sweep removes a temporary file
            log.warning("%s: what a failed save has left could not be removed: %s", self._temp, error)
        self.finish()

    # ---- parts of create ----

    def _name(self, target: Target) -> _Name:
        if not self._numbered:
            return _Name(single_path(target.path), 0)
        prefix = split_prefix(target.path)
        if target.number is None:
            number = next_number(prefix, target.counter)
            return _Name(prefix.numbered(number), number)
        require_newest(prefix, target.number)
        return _Name(prefix.numbered(target.number), target.counter + 1)

    def _manifest(self, counter: int, options: SaveOptions, size: int, transport: str) -> Manifest:
        merged = self._require_merged()
        return Manifest(
            format=FORMAT,
            format_version=FORMAT_VERSION,
            save_id=uuid.uuid4().hex,
            save_counter=counter if self._numbered else None,
            world_size=size,
            time=time.time(),
            host=socket.gethostname(),
            transport=transport,
            versions=_versions(),
            checksums=CHECKSUM_ALGORITHM if options.checksums else None,
            metadata=msgspec.Raw(encode_metadata(options)),
            object_graph=merged.object_graph,
            variables=self._variables if self._skeleton is not None else merged.variables,
            python_state={key: msgspec.Raw(value) for key, value in merged.python_state.items()},
            file_nbytes=self._skeleton.file_nbytes if self._skeleton is not None else 0,
        )

    def _make_file(self, temp: str, manifest: Manifest) -> Skeleton:
        merged = self._require_merged()
        nbytes = manifests.max_nbytes(manifest)
        datasets: Sequence[DatasetSpec] = ()
        if self._skeleton is None or nbytes > self._skeleton.manifest_capacity:
            datasets = [DatasetSpec(variable.key, variable.dtype, variable.shape) for variable in merged.variables]
        n_checksums = merged.n_checksums if self._with_checksums else 0
        return create_file(temp, self._skeleton, datasets, n_checksums, nbytes)

    def _place(self, skeleton: Skeleton) -> None:
        """Remember where a new file has its variables; the next files have them there, too."""
        self._skeleton = skeleton
        variables = self._require_merged().variables
        self._variables = [
            msgspec.structs.replace(variable, offset=offset)
            for variable, offset in zip(variables, skeleton.offsets.tolist(), strict=True)
        ]

    def _fill_manifest(self, temp: str, manifest: Manifest) -> None:
        assert self._skeleton is not None, "just made"
        manifest = msgspec.structs.replace(manifest, file_nbytes=self._skeleton.file_nbytes)
        fd = os.open(temp, os.O_WRONLY | os.O_CLOEXEC)
        try:
            write_manifest(fd, self._skeleton, manifests.encode(manifest))
        finally:
            os.close(fd)

    def _require_merged(self) -> Merged:
        assert self._merged is not None, "the ranks have agreed on a layout first"
        return self._merged


def _remove(final: Path, finished: os.stat_result) -> None:
    """Remove a checkpoint that was committed, but not its namesake of another job that was in the way."""
    if final.exists() and os.path.samestat(finished, final.stat()):
        final.unlink()


def _choose_transport(options: SaveOptions, size: int) -> str:
    """The transport of this save; rank 0 decides for all."""
    if options.transport == "posix" or (options.transport == "auto" and size == 1):
        return "posix"
    reason = mpio.why_unavailable()
    if reason is None:
        return "mpio"
    if options.transport == "mpio":
        raise RuntimeError(f"transport='mpio': {reason}. Pass transport='posix': the file is the same.")
    return "posix"


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
