"""What managers keep in the state file, and the removal of checkpoints. Rank 0 only.

Managers of one directory differ in the prefix of their files. Each has an entry of its own in the field "managers".
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distckpt.log import log
from distckpt.storage.paths import numbered_files
from distckpt.storage.state import CHANGING, DamagedStateError, read_state, write_state

_FIELD = "managers"


def read_entry(directory: str | os.PathLike[str], prefix: str) -> Any | None:
    """What the manager of a prefix wrote last; None when there is nothing.

    Raises:
        DamagedStateError: The state file cannot be understood.
    """
    return _mapping((read_state(directory) or {}).get(_FIELD)).get(prefix)


def write_entry(directory: str | os.PathLike[str], prefix: str, entry: Mapping[str, Any], *, durable: bool) -> None:
    """Set the fields of a manager's entry; whatever else the state file has stays.

    Args:
        directory: Directory of the state file.
        prefix: Prefix of the manager's files.
        entry: The fields.
        durable: Return only when the state file is on disk.
    """
    with CHANGING:
        state = _state_or_new(directory)
        entries = _mapping(state.get(_FIELD))
        entries = {**entries, prefix: {**_mapping(entries.get(prefix)), **entry}}
        write_state(directory, {**state, _FIELD: entries}, durable=durable)


def remove_checkpoints(directory: str | os.PathLike[str], names: Iterable[str]) -> list[str]:
    """Remove files of a directory; those that are gone already count as removed.

    Returns:
        The names that could not be removed.
    """
    return [name for name in names if not _remove(Path(directory, name))]


def _remove(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("old checkpoint %s cannot be removed: %s", path, error)
        return False
    log.info("removed old checkpoint %s", path)
    return True


def _state_or_new(directory: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The state file, or one that finds all checkpoints that are there."""
    try:
        state = read_state(directory)
    except DamagedStateError:
        state = None
    return {"prefixes": sorted({file.prefix for file in numbered_files(directory)})} if state is None else state


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
