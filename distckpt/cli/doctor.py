"""`distckpt doctor`: checks that a machine has everything that checkpoints need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from distckpt.cli.terminal import printable


def doctor(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the checkpoints are to go.")] = Path(),
) -> None:
    """Checks MPI, HDF5 and the file system of DIR: one line each, with the cure; status 1 if something needs one.

    Runs with or without mpirun; under mpirun it also compares the number of ranks, and rank 0 answers.
    """
    from distckpt.cluster.environment import check_environment

    report = check_environment(directory)
    if report.rank != 0:
        return
    console = Console(soft_wrap=True, highlight=False)
    for check in report.checks:
        mark = Text("ok  ", "green") if check.ok else Text("FAIL", "bold red")
        cure = f". Cure: {check.cure}" if check.cure else ""
        console.print(Text.assemble(mark, f"  {check.subject:11}  {printable(check.found + cure)}"))
    if not report.ok:
        raise typer.Exit(1)
