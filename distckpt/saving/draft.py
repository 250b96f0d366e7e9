"""A checkpoint file while it has its temporary name. Rank 0 only, except for the record `NewFile`.

A draft is described, which fixes what the ranks must know of it; made, at once or by the thread in the background;
filled by all ranks; sealed with the manifest; and committed under its final name. If anything fails, it is abandoned.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec

from distckpt.log import log
from distckpt.storage.commit import commit, discard
from distckpt.storage.creation import create_like, write_manifest
from distckpt.storage.manifest import Unsealed, sealed
from distckpt.storage.paths import Prefix, from_here, parse_numbered
from distckpt.storage.rawio import fsync, naming
from distckpt.storage.skeleton import Skeleton
from distckpt.storage.state import record_save
from distckpt.timing import Timing


class NewFile(msgspec.Struct, frozen=True):
    """What every rank must know of a file that rank 0 has created, or is about to create.

    Attributes:
        path: The final path.
        temp_path: The temporary path, in the same directory: relative if the user's path is.
        counter: The save counter that it stores; 0 for a file made by `write`.
        nbytes: Length of the file in bytes.
        checksums_offset: Position of the checksum dataset in the file, in bytes.
        transport: "mpio" or "posix".
        fresh: The positions of the variables are new; rank 0 shares them next.
        exists: The file is there. Else rank 0 makes it in the background, and says so before a rank may open it.
    """

    path: str
    temp_path: str
    counter: int
    nbytes: int
    checksums_offset: int
    transport: str
    fresh: bool
    exists: bool


def log_saved(file: NewFile, timing: Timing) -> None:
    """Log in one line that a file is committed. Rank 0 only."""
    if log.isEnabledFor(logging.INFO):
        log.info("saved %s: %s", file.path, timing.of_file_in_words(file.nbytes))


class Draft:
    """A checkpoint file while it has its temporary name. Rank 0 only.

    Attributes:
        file: What all ranks know of it; None until it is described.
        ended: It was committed or abandoned.
    """

    def __init__(self, temp_path: str, *, numbered: bool) -> None:
        # Both are absolute, as the program may change directory meanwhile.
        self._temp_path = from_here(temp_path)
        self._final = Path()
        self.file: NewFile | None = None
        self.ended = False
        self._manifest: tuple[Skeleton, Unsealed] | None = None  # where it goes, and what; None once sealed
        self._numbered = numbered
        self._finished: os.stat_result | None = None  # of the complete temporary file

    def describe(self, file: NewFile, skeleton: Skeleton, manifest: Unsealed) -> None:
        """Say what the file is, or will be.

        Args:
            file: What all ranks know of it.
            skeleton: All of it but the data and the manifest.
            manifest: The manifest, which fits.
        """
        self.file = file
        self._final = Path(from_here(file.path))
        self._manifest = skeleton, manifest

    def make(self) -> None:
        """Make the file, but for the data and the manifest, its space reserved. Any thread.

        Raises:
            OSError: No space, or no permission. Nothing is left.
        """
        assert self._manifest is not None, "described, and not sealed yet"
        create_like(self._temp_path, self._manifest[0])

    def seal(self, timing: Timing, *, durable: bool) -> None:
        """Write the manifest, without which the file is no checkpoint.

        Args:
            timing: What is known by now of how long the save takes.
            durable: Return only when it is on disk.
        """
        assert self._manifest is not None, "described, and not sealed yet"
        skeleton, manifest = self._manifest
        fd = os.open(self._temp_path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            with naming(self._final):
                write_manifest(fd, skeleton, *sealed(manifest, timing))
                if durable:
                    fsync(fd)
        finally:
            os.close(fd)
        self._manifest = None

    def commit(self, *, durable: bool) -> None:
        """Make the finished file the checkpoint: durable, and visible to all.

        Raises:
            OSError: It could not be renamed or recorded; `abandon` takes the checkpoint back.
        """
        assert self.file is not None, "described first"
        assert self._manifest is None, "sealed first"
        self._finished = Path(self._temp_path).stat()
        commit(self._temp_path, str(self._final), replace=not self._numbered, durable=durable)
        if self._numbered:
            record_save(self._final, durable=durable)

    def finish(self) -> None:
        """All ranks know that the checkpoint is committed."""
        self.ended = True

    def abandon(self) -> None:
        """Remove what a failed save has left."""
        if self.ended:
            return
        self.ended = True
        self._manifest = None
        try:
            if self.file is not None and self._finished is not None and self._numbered:
                _remove(self._final, self._finished)
            discard(self._temp_path)
        except OSError as error:  # all ranks raise what they agreed on; a later sweep removes a temporary file
            log.warning("%s: what a failed save has left could not be removed: %s", self._temp_path, error)

    def number_for(self, prefix: Prefix) -> int:
        """The number of the checkpoint that this will be; 0 when it is of another prefix, or has ended."""
        if self.ended or self.file is None:
            return 0
        numbered, directory = parse_numbered(self._final.name), self._final.parent
        if numbered is None or numbered.prefix != prefix.name or directory.resolve() != prefix.directory.resolve():
            return 0
        return numbered.number


def _remove(final: Path, finished: os.stat_result) -> None:
    """Remove a checkpoint that was committed, but not its namesake of another job that was in the way."""
    if final.exists() and os.path.samestat(finished, final.stat()):
        final.unlink()
