"""`distckpt verify FILE...`: checks that every byte of a checkpoint is as it was written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from distckpt.cli.terminal import print_error, printable
from distckpt.errors import CheckpointError
from distckpt.storage.latest import file_of
from distckpt.storage.paths import resolve
from distckpt.storage.verify import verify_file


def verify(
    files: Annotated[
        list[Path], typer.Argument(help="Checkpoint files, with or without .h5; a directory means its latest.")
    ],
) -> None:
    """Compares the manifest with the file and every checksum with the data; status 1 on damage."""
    sound = [_verify(file) for file in files]
    if not all(sound):
        raise typer.Exit(1)


def _verify(file: Path) -> bool:
    """Verify one file and print the result. Does not raise if it fails, so that the next file is verified, too."""
    try:
        path = resolve(file_of(file))
        problems = verify_file(path)
    except (CheckpointError, OSError) as error:
        print_error(error)
        return False
    print(f"{printable(path)}: {'damaged' if problems else 'ok'}", flush=True)
    for problem in problems:
        print(f"  {printable(problem)}", file=sys.stderr)
    return not problems
