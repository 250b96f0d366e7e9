"""`distckpt ls DIR`: the checkpoints of a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

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
    for path in sorted(directory.glob("*.h5"), key=lambda path: path.stat().st_mtime):
        table.add_row(path.name, *_describe(path))
    Console(highlight=False, soft_wrap=True).print(table)


def _describe(path: Path) -> tuple[str, ...]:
    size = nbytes_in_words(path.stat().st_size)
    try:
        manifest = open_checkpoint(str(path)).manifest
    except (CheckpointError, OSError) as error:
        reason = str(error).removeprefix(f"{path}: ").splitlines()[0]
        return ("", "", "", "", size, f"[red]no[/]: {reason}")
    counter = "" if manifest.save_counter is None else str(manifest.save_counter)
    ranks = str(manifest.world_size)
    return (counter, _step(manifest), time_in_words(manifest.time), ranks, size, "[green]yes[/]")


def _step(manifest: Manifest) -> str:
    """The trainer's step, where the user keeps one as `checkpoint.step`."""
    step = manifest.python_state.get("step")
    return "" if step is None else str(decode(bytes(step)))
