"""The files of saves as rank 0 sees them: each created from what all ranks agreed, then committed or abandoned."""

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

from distckpt.draft import Created, Draft
from distckpt.layout.merge import Merged
from distckpt.layout.records import (
    CHECKSUM_ALGORITHM,
    FORMAT,
    FORMAT_VERSION,
    Manifest,
    Variable,
)
from distckpt.options import SaveOptions
from distckpt.request import encode_metadata
from distckpt.storage import manifest as manifests
from distckpt.storage import mpio
from distckpt.storage.commit import sweep, temp_path
from distckpt.storage.creation import DatasetSpec, Skeleton, create_file
from distckpt.storage.paths import (
    make_directory,
    next_number,
    require_newest,
    single_path,
    split_prefix,
)
from distckpt.timing import Timing

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
        self._draft: Draft | None = None  # of the save that is going on
        self._handed_over: list[Draft] = []

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
        """Create the temporary file with everything but the data and the manifest.

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
        temp = temp_path(name.final)
        self._draft = draft = Draft(temp, numbered=self._numbered)
        skeleton = self._make_file(temp, manifest)
        fresh = skeleton is not self._skeleton
        if fresh:
            self._place(skeleton)
        file_nbytes, checksums_offset = skeleton.file_nbytes, skeleton.checksums_offset
        created = Created(name.final, temp, name.counter, file_nbytes, checksums_offset, transport, fresh)
        manifest = msgspec.structs.replace(manifest, variables=self._variables, file_nbytes=file_nbytes)
        draft.describe(created, skeleton, manifests.encode(manifest))
        return created

    def seal(self, timing: Timing) -> None:
        """Write the manifest, see `Draft.seal`; nothing happens on other ranks than 0."""
        if self._draft is not None:
            self._draft.seal(timing, durable=False)

    def commit(self, options: SaveOptions) -> None:
        """Make the finished file the checkpoint: see `Draft.commit`."""
        assert self._draft is not None, "created first"
        self._draft.commit(durable=options.durable)

    def finish(self) -> None:
        """All ranks know that the checkpoint is committed."""
        if self._draft is not None:
            self._draft.finish()
            self._draft = None

    def abandon(self) -> None:
        """Remove what a failed save has left; nothing happens when there is nothing, as on other ranks than 0."""
        self._skeleton = None  # perhaps not all ranks have heard where it has the variables
        if self._draft is not None:
            self._draft.abandon()
            self._draft = None

    def hand_over(self) -> Draft | None:
        """Give the file to the caller, who commits or abandons it later; None on other ranks than 0."""
        draft, self._draft = self._draft, None
        if draft is not None:
            self._handed_over.append(draft)
        return draft

    # ---- parts of create ----

    def _name(self, target: Target) -> _Name:
        if not self._numbered:
            return _Name(single_path(target.path), 0)
        prefix = split_prefix(target.path)
        self._handed_over = [draft for draft in self._handed_over if not draft.ended]
        in_flight = max((draft.number_for(prefix) for draft in self._handed_over), default=0)
        if target.number is None:
            number = next_number(prefix, max(target.counter, in_flight))
            return _Name(prefix.numbered(number), number)
        require_newest(prefix, target.number, in_flight)
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

    def _require_merged(self) -> Merged:
        assert self._merged is not None, "the ranks have agreed on a layout first"
        return self._merged


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
