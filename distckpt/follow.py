"""Follow the checkpoints of another job, as an evaluation that runs beside the training does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

from distckpt.storage.latest import latest_checkpoint

#: Seconds between two looks at a directory.
_POLL_INTERVAL = 1.0


def checkpoints_iterator(
    directory: str | os.PathLike[str],
    *,
    min_interval_secs: float = 0,
    timeout: float | None = None,
    timeout_fn: Callable[[], bool] | None = None,
) -> Iterator[str]:
    """Wait for checkpoints that another job makes, and yield them one by one. One process; no MPI.

    Yields the newest complete checkpoint whenever it differs from the last one yielded. Of several checkpoints made
    while the caller was busy, only the newest is yielded.

    Args:
        directory: Directory of the checkpoints; it need not exist yet.
        min_interval_secs: Least seconds from yielding one checkpoint to looking for the next.
        timeout: Seconds to wait for a new checkpoint; None waits for ever.
        timeout_fn: Called after each checkpoint and whenever the timeout has passed; returning True ends the iteration.
            Without it, the timeout ends the iteration.

    Yields:
        Paths, below `directory`.
    """
    last = None
    while True:
        path = _wait_for_other(directory, last, timeout)
        if path is not None:
            last, started = path, time.monotonic()
            yield path
            time.sleep(max(0.0, started + min_interval_secs - time.monotonic()))
        if timeout_fn() if timeout_fn is not None else path is None:
            return


def _wait_for_other(directory: str | os.PathLike[str], last: str | None, timeout: float | None) -> str | None:
    """Wait for a newest complete checkpoint other than `last`; None if the timeout has passed."""
    deadline = float("inf") if timeout is None else time.monotonic() + timeout
    while (path := latest_checkpoint(directory)) in {None, last}:
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        time.sleep(min(_POLL_INTERVAL, left))
    return path
