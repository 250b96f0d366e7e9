"""How rank 0 makes the files of saves: each from the merged layout, a target and options."""

from __future__ import annotations

import functools
import os
import platform
import socket
import time
import uuid
from collections.abc import Mapping
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
)
from distckpt.options import SaveOptions
from distckpt.request import encode_metadata
from distckpt.saving.draft import Draft, NewFile
from distckpt.storage import manifest as manifests
from distckpt.storage import mpio
from distckpt.storage.commit import sweep, temp_path
from distckpt.storage.creation import create_file
from distckpt.storage.paths import (
    make_directory,
    next_number,
    require_newest,
    single_path,
    split_prefix,
)
from distckpt.storage.skeleton import DatasetSpec, Skeleton
from distckpt.timing import Timing

_LIBRARIES = ("distckpt", "torch", "numpy", "h5py", "mpi4py")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a save goes.

    Attributes:
        path: As given to `save` or `write`.
        counter: The live save counter.
        number: The number in the file name; None for the next one. `write` ignores it.
    """

    path: str | os.PathLike[str]
    counter: int
    number: int | None


@dataclass(frozen=True, slots=True)
class _Name:
    """The final path of a file, and the save counter that it stores: 0 for a file made by `write`."""

    final: str
    counter: int


@dataclass(frozen=True, slots=True)
class _Template:
    """What all files of a layout have in common, known once the first one is made.

    Attributes:
        skeleton: All of a file but the data and the manifest.
        layout: The part of the manifest that is the same in all files, encoded. It is by far the largest.
    """

    skeleton: Skeleton
    layout: manifests.EncodedLayout

    @classmethod
    def of(cls, skeleton: Skeleton, manifest: Manifest) -> _Template:
        """From the first file.

        Args:
            skeleton: The skeleton of that file, with the positions of the variables.
            manifest: The manifest of any file of the layout.
        """
        variables = [
            msgspec.structs.replace(variable, offset=offset)
            for variable, offset in zip(manifest.variables, skeleton.offsets.tolist(), strict=True)
        ]
        return cls(skeleton, manifests.encode_layout(msgspec.structs.replace(manifest, variables=variables)))

    def encode(self, manifest: Manifest) -> manifests.Unsealed:
        """The manifest of one file, without a timing."""
        manifest = msgspec.structs.replace(manifest, file_nbytes=self.skeleton.file_nbytes)
        return manifests.encode_unsealed(manifest, self.layout)

    def fits(self, encoded: manifests.Unsealed) -> bool:
        """Whether the file has room for a manifest."""
        return encoded.max_nbytes <= self.skeleton.manifest_capacity


class Output:
    """Makes the files of one operation, "save" or "write". Rank 0 only, except where a method says otherwise."""

    def __init__(self, *, numbered: bool) -> None:
        """Local, on all ranks.

        Args:
            numbered: Files have numbers and a state file, and never replace one another.
        """
        self._numbered = numbered
        self._merged: Merged | None = None
        self._template: _Template | None = None
        self._confirmed: _Template | None = None  # the template whose positions all ranks know
        self._with_checksums = True
        self._swept: set[str] = set()
        self._draft: Draft | None = None  # of the save in progress
        self._handed_over: list[Draft] = []

    def adopt(self, merged: Merged) -> None:
        """Take a new layout; the next file is made through HDF5."""
        self._merged = merged
        self._template = self._confirmed = None

    def update_values(self, python_values: Mapping[str, bytes]) -> None:
        """Take rank 0's present python values, by key."""
        self._require_merged().python_state.update(python_values)

    @property
    def offsets(self) -> np.ndarray | None:
        """Position of every variable in the file, in bytes; None on other ranks than 0. Local, on all ranks."""
        return None if self._template is None else self._template.skeleton.offsets

    def confirm(self) -> None:
        """Keep the positions of the variables even if this save fails: all ranks know them now. Local, on all ranks."""
        self._confirmed = self._template

    def create(self, target: Target, options: SaveOptions, size: int, *, later: bool = False) -> NewFile:
        """Create the temporary file with everything but the data and the manifest.

        Args:
            target: Where the save goes.
            options: How to save.
            size: Number of ranks.
            later: Only describe the file; `Draft.make` makes it later. The first file of a layout is always made.

        Raises:
            OSError: The directory or the file cannot be made, or there is no space.
            ValueError: There is a checkpoint with the wanted number or a higher one.
        """
        name = self._name(target)
        self._prepare_directory(Path(name.final).parent)
        if self._with_checksums != options.checksums:
            self._with_checksums = options.checksums
            self._template = self._confirmed = None
        transport = _choose_transport(options, size)
        manifest = self._manifest(name.counter, options, size, transport)
        temp = temp_path(name.final)
        self._draft = draft = Draft(temp, numbered=self._numbered)
        template = known = self._template
        encoded = None if template is None else template.encode(manifest)
        if template is None or encoded is None or not template.fits(encoded):
            template = self._template = self._make_first(temp, manifest)
            encoded = template.encode(manifest)
        fresh = template is not known
        file = NewFile(
            path=name.final,
            temp_path=temp,
            counter=name.counter,
            nbytes=template.skeleton.file_nbytes,
            checksums_offset=template.skeleton.checksums_offset,
            transport=transport,
            fresh=fresh,
            exists=fresh or not later,
        )
        draft.describe(file, template.skeleton, encoded)
        if not (fresh or later):
            draft.make()
        return file

    def seal(self, timing: Timing) -> None:
        """Write the manifest, see `Draft.seal`. Local, on all ranks; does nothing on others than rank 0."""
        if self._draft is not None:
            self._draft.seal(timing, durable=False)

    def commit(self, options: SaveOptions) -> None:
        """Make the finished file the checkpoint: see `Draft.commit`."""
        assert self._draft is not None, "described first"
        self._draft.commit(durable=options.durable)

    def finish(self) -> None:
        """All ranks know that the checkpoint is committed. Local, on all ranks."""
        if self._draft is not None:
            self._draft.finish()
            self._draft = None

    def abandon(self) -> None:
        """Remove what a failed save has left, if anything. Local, on all ranks."""
        self._template = self._confirmed
        if self._draft is not None:
            self._draft.abandon()
            self._draft = None

    def hand_over(self) -> Draft | None:
        """Give the draft to the caller, who commits or abandons it. Local, on all ranks; None on others than rank 0."""
        draft, self._draft = self._draft, None
        if draft is not None:
            self._handed_over.append(draft)
        return draft

    # ---- parts of create ----

    def _prepare_directory(self, directory: Path) -> None:
        make_directory(directory)
        if str(directory) not in self._swept:
            sweep(directory)
            self._swept.add(str(directory))

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
            variables=merged.variables,
            python_state={key: msgspec.Raw(value) for key, value in merged.python_state.items()},
            file_nbytes=0,
        )

    def _make_first(self, temp: str, manifest: Manifest) -> _Template:
        """Make the first file of a layout, through HDF5."""
        merged = self._require_merged()
        datasets = [DatasetSpec(variable.key, variable.dtype, variable.shape) for variable in merged.variables]
        n_checksums = merged.n_checksums if self._with_checksums else 0
        return _Template.of(create_file(temp, datasets, n_checksums, manifests.max_nbytes(manifest)), manifest)

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
