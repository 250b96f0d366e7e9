"""`distckpt ls DIR`: the checkpoints of a directory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from distckpt.cli.terminal import console
from distckpt.errors import CheckpointError
from distckpt.graph.python_value import decode
from distckpt.layout.records import Manifest
from distckpt.storage.hdf5 import open_checkpoint
from distckpt.words import nbytes_in_words, time_in_words


def ls(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory with checkpoints.")] = Path(),
) -> None:
    """Lists the checkpoints of DIR: number, step, time, ranks, size, complete or not."""
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is no directory")
    table = Table(box=None, pad_edge=False)
    for column in ("file", "save", "step", "time", "ranks", "size", "complete"):
        table.add_column(column, justify="right" if column in {"save", "step", "ranks", "size"} else "left")
    for path, status in _oldest_first(directory):
        table.add_row(Text(path.name), *_describe(path, status))
    console().print(table)


def _oldest_first(directory: Path) -> list[tuple[Path, os.stat_result]]:
    """The files of a directory in use: some may be gone by now, and links may lead nowhere."""
    found: list[tuple[Path, os.stat_result]] = []
    for path in directory.glob("*.h5"):
        with contextlib.suppress(OSError):
            found.append((path, path.stat()))
    return sorted(found, key=lambda item: item[1].st_mtime)


def _describe(path: Path, status: os.stat_result) -> tuple[Text, ...]:
    size = nbytes_in_words(status.st_size)
    try:
        manifest = open_checkpoint(str(path)).manifest
    except (CheckpointError, OSError) as error:
        reason = str(error).removeprefix(f"{path}: ").splitlines()[0]
        return (*map(Text, ("", "", "", "", size)), Text.assemble(("no", "red"), f": {reason}"))
    counter = "" if manifest.save_counter is None else str(manifest.save_counter)
    cells = (counter, _step(manifest), time_in_words(manifest.time), str(manifest.world_size), size)
    return (*map(Text, cells), Text("yes", "green"))


def _step(manifest: Manifest) -> str:
    """The trainer's step, where the user keeps one as `checkpoint.step`."""
    step = manifest.python_state.get("step")
    return "" if step is None else str(decode(bytes(step)))
