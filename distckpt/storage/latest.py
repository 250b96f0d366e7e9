"""Find the complete checkpoints of a directory, and the newest of them. Rank 0 only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from distckpt.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from distckpt.log import warn
from distckpt.storage.hdf5 import open_checkpoint
from distckpt.storage.paths import SUFFIX, NumberedFile, as_text, numbered_files
from distckpt.storage.state import DamagedStateError, known_prefixes, managed_prefixes, read_state
from distckpt.storage.verify import verify_file


def is_complete(path: str | os.PathLike[str]) -> str | None:
    """The reason why a file is not a complete checkpoint; None if it is one. Does not verify the data."""
    try:
        open_checkpoint(os.fspath(path))
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


def latest_checkpoint(directory: str | os.PathLike[str], *, verify: bool = False) -> str | None:
    """The newest complete checkpoint that `save` has made in a directory; None when there is none.

    What the state file says is only a hint: a checkpoint that was committed just before a crash is found, and a damaged
    one is passed over with a warning. There is also a warning if a file or file prefix is given for the directory.

    Args:
        directory: The directory.
        verify: Compare the checksums of all data too. One that was saved without them counts as complete, with a
            warning.

    Returns:
        Path of the checkpoint, below `directory`.

    Raises:
        TypeError: `directory` is not a path.
    """
    text = as_text("directory", directory)
    _warn_of_a_prefix(Path(text))
    return next(complete_checkpoints(text, verify=verify), None)


def _warn_of_a_prefix(path: Path) -> None:
    """Warn if the path is a file or a file prefix: a caller starts afresh on None, although checkpoints exist."""
    if path.is_dir():
        return
    name = path.name.removesuffix(SUFFIX)
    if path.exists() or any(file.prefix == name for file in numbered_files(path.parent)):
        _warn(
            f"{path} is no directory, so no checkpoint is found in it. Expected a directory, such as "
            f"{str(path.parent)!r} for what was saved as {str(path.with_name(name))!r}."
        )


def file_of(path: str | os.PathLike[str]) -> str:
    """The file to read for a path: the path itself, or the latest checkpoint if it is a directory.

    Raises:
        TypeError: `path` is not a path.
        CheckpointNotFoundError: There is no complete checkpoint in the directory.
    """
    text = as_text("path", path)
    if not Path(text).is_dir():
        return text
    latest = latest_checkpoint(text)
    if latest is None:
        raise CheckpointNotFoundError(f"{text}: no complete checkpoint of `save` in this directory.")
    return latest


def complete_checkpoints(
    directory: str | os.PathLike[str], *, verify: bool = False, prefix: str | None = None
) -> Iterator[str]:
    """The complete checkpoints that `save` has made in a directory, newest first.

    Files are opened one by one during the iteration; a damaged one is passed over with a warning.

    Args:
        directory: The directory.
        verify: Compare the checksums of all data too.
        prefix: The prefix of a manager: as for `saved_files`, and those of other managers come last. None for none.

    Yields:
        Paths, below `directory`.
    """
    others = managed_prefixes(directory) - {prefix} if prefix is not None else frozenset()
    by_prefix = groupby(saved_files(directory, prefix), lambda file: file.prefix)
    found = {name: _newest_first(directory, list(files), verify) for name, files in by_prefix}
    yield from _merged([files for name, files in found.items() if name not in others])
    yield from _merged([files for name, files in found.items() if name in others])


def _merged(found: Iterable[Iterator[_Found]]) -> Iterator[str]:
    """The paths of all, newest first. Not heapq.merge: its frame would be the line that a warning points at."""
    heads = [(head, rest) for rest in found if (head := next(rest, None)) is not None]
    while heads:
        newest, rest = max(heads, key=itemgetter(0))
        yield newest.path
        heads.remove((newest, rest))
        if (head := next(rest, None)) is not None:
            heads.append((head, rest))


def saved_files(directory: str | os.PathLike[str], prefix: str | None = None) -> list[NumberedFile]:
    """The numbered files of the prefixes in the state file; of all prefixes if there is no usable state file.

    Args:
        directory: The directory.
        prefix: One whose files count although the state file lacks it, as when they were copied; None for none.
    """
    files = numbered_files(directory)
    try:
        state = read_state(directory)
    except DamagedStateError as error:
        _warn(f"{error}; looking at all checkpoints of the directory")
        state = None
    if state is None:
        return files
    known = known_prefixes(state) | {prefix}
    return [file for file in files if file.prefix in known]


@dataclass(frozen=True, slots=True, order=True)
class _Found:
    """A complete checkpoint: its time in seconds since the epoch, its number, and its path."""

    time: float
    number: int
    path: str


def _newest_first(directory: str | os.PathLike[str], files: list[NumberedFile], verify: bool) -> Iterator[_Found]:
    """The complete checkpoints by descending number; `files` are those of one prefix, in ascending order."""
    tried: set[str] = set()
    while files:
        file = files.pop()
        tried.add(file.name)
        path = str(Path(directory, file.name))
        try:
            found = _look_at(path, file.number, verify)
        except (CheckpointError, OSError) as error:
            if not os.path.lexists(path):  # whoever has removed it, such as a manager, has made a newer one before
                present = [other for other in numbered_files(directory) if other.prefix == file.prefix]
                files = [other for other in present if other.name not in tried]
                continue
            _warn(f"{path} is passed over: {str(error).removeprefix(f'{path}: ')}")
        else:
            if found is not None:
                yield found


def _look_at(path: str, number: int, verify: bool) -> _Found | None:
    """Open a file, and verify its data if wanted; None if it was made by `write`.

    Raises:
        CheckpointError: It is damaged.
        OSError: It cannot be read.
    """
    opened = open_checkpoint(path)
    if verify and opened.checksums is None:
        _warn(f"{path} is not verified: it was saved without checksums, or with those of a newer version.")
    elif verify and (problems := verify_file(path)):
        raise CorruptCheckpointError("; ".join(problems[:3]))
    counter = opened.manifest.save_counter
    return None if counter is None else _Found(opened.manifest.time, number, path)


def _warn(message: str) -> None:
    warn([message])
