"""End the whole job with MPI_Abort, in the two cases in which ranks would otherwise wait for each other for ever."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType, TracebackType

from distckpt.errors import RankTimeoutError
from distckpt.log import log

_EXIT_CODE = 1


@contextmanager
def watchdog(step: str, rank: int, timeout: float) -> Iterator[None]:
    """End the job if the body takes longer than the timeout. Local.

    Args:
        step: Name of the step, for the message.
        rank: This rank, for the message.
        timeout: Seconds that the body may take.
    """
    ended = threading.Event()
    thread = threading.Thread(
        target=_end_unless, args=(ended, step, rank, timeout), name=f"distckpt-watchdog-{step}", daemon=True
    )
    try:
        thread.start()
    except RuntimeError:  # no more threads; going on without a watchdog is better than leaving the other ranks
        log.warning("rank %d: cannot start the watchdog of step '%s'", rank, step)
    try:
        yield
    finally:
        ended.set()


def end_job_on_uncaught_timeout() -> None:
    """Make an uncaught `RankTimeoutError` end the job. Local.

    The rank would otherwise wait in MPI_Finalize for the ranks that did not come, possibly for ever.
    """
    if not isinstance(sys.excepthook, _EndOnTimeout):
        sys.excepthook = _EndOnTimeout(sys.excepthook)


class _EndOnTimeout:
    """An exception hook that shows the error as before, and then ends the job if it is a `RankTimeoutError`."""

    def __init__(self, show: Callable[[type[BaseException], BaseException, TracebackType | None], object]) -> None:
        self._show = show

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._show(kind, error, trace)
        if isinstance(error, RankTimeoutError):
            _end_job("distckpt: nobody caught the RankTimeoutError above; ending the job with MPI_Abort.")


def _end_unless(ended: threading.Event, step: str, rank: int, timeout: float) -> None:
    if ended.wait(min(timeout, threading.TIMEOUT_MAX)):
        return
    _show_stacks()
    _end_job(
        f"distckpt: rank {rank}: step '{step}' has not ended after {timeout:g} s, and a collective call that hangs "
        f"cannot be taken back: ending the job with MPI_Abort. Nothing was committed, so the last checkpoint stands. "
        f"Look for an I/O error, a stale file handle or a full quota of the checkpoint directory."
    )


def _show_stacks() -> None:
    with suppress(AttributeError, ValueError, RuntimeError):  # a standard error without a file descriptor
        faulthandler.dump_traceback(all_threads=True)


def _end_job(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    mpi = sys.modules.get("mpi4py.MPI")
    # Other threads may call MPI only with THREAD_MULTIPLE. Otherwise exit: the launcher then ends the other processes.
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() and _may_call(mpi):
        mpi.COMM_WORLD.Abort(_EXIT_CODE)
    os._exit(_EXIT_CODE)


def _may_call(mpi: ModuleType) -> bool:
    in_main_thread = threading.current_thread() is threading.main_thread()
    return in_main_thread or mpi.Query_thread() == mpi.THREAD_MULTIPLE
