"""The state file `checkpoint` of a directory: JSON, relative names only, replaced atomically. Rank 0 only.

The state file is a hint only: the files decide which checkpoints exist. Besides the newest file and the known prefixes
it has an entry for each manager of the directory. Managers of one directory differ in the prefix of their files.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from distckpt.storage import rawio
from distckpt.storage.commit import temp_path
from distckpt.storage.paths import STATE_FILE, numbered_files, parse_numbered

#: Name of the field with the managers' entries, by prefix.
_MANAGERS = "managers"

#: Longest state file, in bytes: a manager writes about 150 for each checkpoint.
_MAX_NBYTES = 1 << 28

#: Held from reading the state file to replacing it, since a background save may be committed at any moment.
_CHANGING = threading.RLock()


class DamagedStateError(ValueError):
    """The state file exists, but its contents are not valid."""


def read_state(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The fields of the state file; None if there is no file.

    Raises:
        DamagedStateError: The file was not written by `write_state`, or is damaged.
    """
    path = Path(directory, STATE_FILE)
    try:
        state = msgspec.json.decode(_contents(path))  # unlike json, it accepts no lone surrogates
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise DamagedStateError(f"{path}: the state file is damaged: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in _prefixes(state)):
        raise DamagedStateError(f"{path}: the state file is damaged: expected an object with the list 'prefixes'")
    return state


def _contents(path: Path) -> bytes:
    """The bytes of a regular file of sensible length.

    Raises:
        OSError: It is not there, or cannot be read.
        ValueError: It is something else, such as a pipe, whose reading would not end.
    """
    try:
        status = path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError("it is a link that leads to itself") from error
        raise
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if status.st_size > _MAX_NBYTES:
        raise ValueError(f"it has {status.st_size} bytes, more than {_MAX_NBYTES}")
    return path.read_bytes()


def known_prefixes(state: Mapping[str, Any]) -> frozenset[str]:
    """The file prefixes with which checkpoints were saved to the directory."""
    return frozenset(_prefixes(state))


def managed_prefixes(directory: str | os.PathLike[str]) -> frozenset[str]:
    """The file prefixes of the managers that have an entry; none if there is no usable state file."""
    try:
        return frozenset(_mapping((read_state(directory) or {}).get(_MANAGERS)))
    except DamagedStateError:
        return frozenset()


def _prefixes(state: Mapping[str, Any]) -> list[Any]:
    prefixes = state.get("prefixes")
    return prefixes if isinstance(prefixes, list) else [None]


def write_state(directory: str | os.PathLike[str], state: Mapping[str, Any], *, durable: bool) -> None:
    """Replace the state file.

    Args:
        directory: Directory of the state file.
        state: All fields of the state file.
        durable: Return only when it is on disk.
    """
    path = Path(directory, STATE_FILE)
    temp = Path(temp_path(path))
    data = json.dumps(state, indent=1).encode()
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            with rawio.naming(path):
                rawio.write_all(fd, memoryview(data), 0)
                if durable:
                    rawio.fsync(fd)
        finally:
            os.close(fd)
        temp.replace(path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    if durable:
        rawio.sync_directory(directory)


def record_save(path: str | os.PathLike[str], *, durable: bool) -> None:
    """Record a committed checkpoint in the state file of its directory.

    Args:
        path: The checkpoint.
        durable: Return only when the state file is on disk.

    Raises:
        ValueError: The file has no number, so it was not made by `save`.
    """
    final = Path(path)
    numbered = parse_numbered(final.name)
    if numbered is None:
        raise ValueError(f"{final}: expected a name of the form <prefix>-<number>.h5")
    with _CHANGING:
        try:
            state = read_state(final.parent) or {}
        except DamagedStateError:
            state = {}
        prefixes = sorted({*(known_prefixes(state) if state else ()), numbered.prefix})
        write_state(final.parent, {**state, "latest": final.name, "prefixes": prefixes}, durable=durable)


# ---- entries of managers ---------------------------------------------------------------------------------------------


def read_entry(directory: str | os.PathLike[str], prefix: str) -> Any | None:
    """The entry that the manager of a prefix wrote last; None if there is none.

    Raises:
        DamagedStateError: The state file is not valid.
    """
    return _mapping((read_state(directory) or {}).get(_MANAGERS)).get(prefix)


def write_entry(directory: str | os.PathLike[str], prefix: str, entry: Mapping[str, Any], *, durable: bool) -> None:
    """Set fields of a manager's entry; all other contents of the state file stay.

    Args:
        directory: Directory of the state file.
        prefix: Prefix of the manager's files.
        entry: The fields.
        durable: Return only when the state file is on disk.
    """
    with _CHANGING:
        state = _state_or_new(directory)
        entries = _mapping(state.get(_MANAGERS))
        entries = {**entries, prefix: {**_mapping(entries.get(prefix)), **entry}}
        write_state(directory, {**state, _MANAGERS: entries}, durable=durable)


def _state_or_new(directory: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The state file; if it is missing or damaged, a new one with the prefixes of all checkpoints in the directory."""
    try:
        state = read_state(directory)
    except DamagedStateError:
        state = None
    return {"prefixes": sorted({file.prefix for file in numbered_files(directory)})} if state is None else state


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
