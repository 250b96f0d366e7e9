"""A progress bar on rank 0 for long saves and restores, when standard error is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

_MIN_NBYTES = 256 << 20


@contextmanager
def progress_bar(rank: int, what: str, nbytes: int) -> Iterator[Callable[[int], None] | None]:
    """Show a progress bar during the body, on rank 0. Local.

    Yields a function to call with the number of bytes that were just moved, or None if no bar is shown. Safe around
    collective calls: it raises only exceptions of the body, whatever standard error is.

    Args:
        rank: This process's rank.
        what: "save" or "restore".
        nbytes: Bytes that rank 0 will move; nothing is shown below 256 MiB.
    """
    progress = None
    if rank == 0 and nbytes >= _MIN_NBYTES:
        with suppress(Exception):  # standard error may be closed, hung up, or replaced by an incomplete stream object
            progress = _started(f"distckpt {what} (rank 0)", nbytes)
    if progress is None:
        yield None
        return
    [task] = progress.task_ids
    try:
        yield lambda moved: progress.advance(task, moved)
    finally:
        with suppress(Exception):
            progress.stop()


def _started(text: str, nbytes: int) -> Progress | None:
    """Start a bar, if standard error is a terminal."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    progress.add_task(text, total=nbytes)
    progress.start()
    return progress
