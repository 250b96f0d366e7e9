"""`distckpt ls DIR`: lists the checkpoints of a directory."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from distckpt.cli.terminal import console, printable, table_lines
from distckpt.errors import CheckpointError
from distckpt.graph.python_value import decode
from distckpt.layout.records import Manifest
from distckpt.storage.hdf5 import open_checkpoint
from distckpt.words import nbytes_in_words, time_in_words

_COLUMNS = ("file", "save", "step", "time", "ranks", "size", "complete")
_RIGHT = frozenset(map(_COLUMNS.index, ("save", "step", "ranks", "size")))


def ls(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory with checkpoints.")] = Path(),
) -> None:
    """Lists the checkpoints of DIR: number, step, time, ranks, size, complete or not."""
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is no directory")
    rows = [[Text(name, "bold") for name in _COLUMNS]]
    rows += [[Text(printable(path.name)), *_describe(path, status)] for path, status in _oldest_first(directory)]
    output = console()
    for line in table_lines(rows, _RIGHT):
        output.print(line)


def _oldest_first(directory: Path) -> list[tuple[Path, os.stat_result | None]]:
    """The HDF5 files of a directory with their status, oldest first; the status is None without permission.

    Files that have just been removed, and links that lead nowhere, are left out.
    """
    found: list[tuple[Path, os.stat_result | None]] = []
    for path in directory.iterdir():
        if path.name.endswith(".h5"):
            try:
                found.append((path, path.stat()))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    found.append((path, None))
    return sorted(found, key=lambda item: 0.0 if item[1] is None else item[1].st_mtime)


def _describe(path: Path, status: os.stat_result | None) -> tuple[Text, ...]:
    size = "" if status is None else nbytes_in_words(status.st_size)
    unread = tuple(map(Text, ("", "", "", "", size)))
    try:
        manifest = open_checkpoint(str(path)).manifest
    except PermissionError:
        return (*unread, Text.assemble(("unknown", "red"), ": permission denied"))
    except (CheckpointError, OSError) as error:
        reason = str(error).removeprefix(f"{path}: ").splitlines()[0]
        return (*unread, Text.assemble(("no", "red"), f": {printable(reason)}"))
    counter = "" if manifest.save_counter is None else str(manifest.save_counter)
    cells = (counter, _step(manifest), time_in_words(manifest.time), str(manifest.world_size), size)
    return (*map(Text, cells), Text("yes", "green"))


def _step(manifest: Manifest) -> str:
    """The trainer's step, if the user keeps it as `checkpoint.step`."""
    step = manifest.python_state.get("step")
    try:
        return "" if step is None else printable(str(decode(bytes(step))))
    except ValueError:  # the value is damaged, or an int with more digits than Python prints
        return "?"
