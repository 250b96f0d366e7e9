"""`distckpt verify FILE...`: is every byte of a checkpoint what was written?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from distckpt.storage.paths import resolve
from distckpt.storage.verify import verify_file


def verify(
    files: Annotated[list[Path], typer.Argument(help="Checkpoint files, with or without .h5.")],
) -> None:
    """Compares the manifest with the file and every checksum with the data; status 1 on damage."""
    damaged = False
    for file in files:
        path = resolve(file)
        problems = verify_file(path)
        print(f"{path}: {'damaged' if problems else 'ok'}")
        for problem in problems:
            print(f"  {problem}", file=sys.stderr)
        damaged = damaged or bool(problems)
    if damaged:
        raise typer.Exit(1)
