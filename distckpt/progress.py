"""A progress bar on rank 0 for long saves and restores, when standard error is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MIN_NBYTES = 256 << 20


@contextmanager
def progress_bar(rank: int, what: str, nbytes: int) -> Iterator[Callable[[int], None] | None]:
    """A function to call with the number of bytes that were just moved, or None where nobody watches.

    Args:
        rank: This process's rank.
        what: "save" or "restore".
        nbytes: Bytes that rank 0 will move; nothing is shown below 256 MiB.
    """
    if rank != 0 or nbytes < _MIN_NBYTES or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"distckpt {what} (rank 0)", total=nbytes)
        yield lambda moved: progress.advance(task, moved)
