"""Which checkpoints of a directory are complete, and which is the newest. Rank 0 only."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from distckpt.errors import CheckpointError, CheckpointWarning
from distckpt.storage.hdf5 import open_checkpoint
from distckpt.storage.paths import NumberedFile, numbered_files
from distckpt.storage.state import DamagedStateError, known_prefixes, read_state
from distckpt.storage.verify import verify_file


def is_complete(path: str | os.PathLike[str]) -> str | None:
    """Why a file is not a complete checkpoint; None when it is. The data are not verified."""
    try:
        open_checkpoint(os.fspath(path))
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


def latest_checkpoint(directory: str | os.PathLike[str], *, verify: bool = False) -> str | None:
    """The newest complete checkpoint that `save` has made in a directory; None when there is none.

    What the state file says is only a hint: a checkpoint that was committed just before a crash is found, and a damaged
    one is passed over with a warning.

    Args:
        directory: The directory.
        verify: Compare the checksums of all data too.

    Returns:
        Path of the checkpoint, below `directory`.
    """
    by_prefix = groupby(_saved_files(directory), lambda file: file.prefix)
    newest = [found for _, files in by_prefix if (found := _newest(directory, list(files), verify)) is not None]
    return max(newest).path if newest else None


def _saved_files(directory: str | os.PathLike[str]) -> list[NumberedFile]:
    """The numbered files of the known prefixes, of all prefixes when there is no state file."""
    files = numbered_files(directory)
    try:
        state = read_state(directory)
    except DamagedStateError as error:
        _warn(f"{error}; looking at all checkpoints of the directory")
        state = None
    if state is None:
        return files
    known = known_prefixes(state)
    return [file for file in files if file.prefix in known]


@dataclass(frozen=True, slots=True, order=True)
class _Found:
    """A complete checkpoint: when it was made, its number, and its path."""

    time: float
    number: int
    path: str


def _newest(directory: str | os.PathLike[str], files: list[NumberedFile], verify: bool) -> _Found | None:
    """The complete one with the highest number, of files of one prefix in ascending order."""
    for file in reversed(files):
        path = str(Path(directory, file.name))
        try:
            manifest = open_checkpoint(path).manifest
            problems = verify_file(path) if verify else []
        except (CheckpointError, OSError) as error:
            problems = [str(error)]
        if problems:
            _warn(f"{path} is passed over: {'; '.join(problems[:3])}")
        elif manifest.save_counter is not None:
            return _Found(manifest.time, file.number, path)
    return None


def _warn(message: str) -> None:
    warnings.warn(message, CheckpointWarning, stacklevel=3)
