"""Threads of one rank that share a list of jobs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

import torch

from distckpt.cores import cores_of_rank
from distckpt.storage.transfer import Progress

#: Most threads of one rank. More are no faster on any file system that we know of.
MAX_THREADS = 8

#: Jobs of at least this many bytes go to any thread. Smaller ones are mostly Python work, which several threads, taking
#: turns, do more slowly than one.
LARGE_NBYTES = 1 << 20

T = TypeVar("T")


def threads_of_rank(ranks_on_node: int) -> int:
    """Number of threads with which each rank of a node may read. Local."""
    return min(cores_of_rank(ranks_on_node), MAX_THREADS)


def share_out(alone: Iterable[T], jobs: Iterable[T], workers: Sequence[Callable[[Iterator[T]], object]]) -> None:
    """Run workers in threads that take jobs one by one, until there are none or a worker fails. Local.

    Args:
        alone: Jobs that the first worker does before all others: those below `LARGE_NBYTES`.
        jobs: The other jobs, in the order in which they begin.
        workers: One per thread. Each is called once, with an iterator over the jobs that it is to do; the first one in
            this thread. If the system cannot start more threads, the remaining workers are not called.

    Raises:
        BaseException: The error of the first worker that failed.
    """
    shared = _Shared(jobs)
    inference = torch.is_inference_mode_enabled()

    def run(worker: Callable[[Iterator[T]], object], jobs: Iterator[T]) -> None:
        try:
            with torch.inference_mode(inference), torch.no_grad():  # torch's modes are per thread
                worker(jobs)
        except BaseException as error:
            shared.fail(error)

    with ThreadPoolExecutor(max(1, len(workers) - 1), "distckpt-worker") as pool:
        with suppress(RuntimeError):
            for worker in workers[1:]:
                pool.submit(run, worker, shared)
        run(workers[0], itertools.chain(alone, shared))
    if shared.failure is not None:
        raise shared.failure


class _Shared(Generic[T]):
    """An iterator that threads share; it ends when one of them fails.

    Attributes:
        failure: Error of the first thread that failed; None without one.
    """

    def __init__(self, jobs: Iterable[T]) -> None:
        self.failure: BaseException | None = None
        self._jobs = iter(jobs)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._lock:
            if self.failure is not None:
                raise StopIteration
            return next(self._jobs)

    def fail(self, failure: BaseException) -> None:
        with self._lock:
            self.failure = self.failure or failure


def one_at_a_time(progress: Progress | None) -> Progress | None:
    """A progress callback that several threads may call: it calls `progress` under a lock."""
    if progress is None:
        return None
    lock = threading.Lock()

    def notify(nbytes: int) -> None:
        with lock:
            progress(nbytes)

    return notify
