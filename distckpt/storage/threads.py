"""Threads of one rank that share a list of jobs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, Self, TypeVar

import torch

from distckpt.cores import cores_of_rank
from distckpt.storage.transfer import Progress

#: Most threads of one rank. More are no faster on any file system that we know of.
MAX_THREADS = 8

#: Jobs of at least this many bytes go to any thread. Smaller ones are mostly Python work, which several threads, taking
#: turns, do more slowly than one.
LARGE_NBYTES = 1 << 20

#: Least bytes per thread: starting a thread takes as long as reading a few hundred KiB.
SHARE_NBYTES = 8 << 20

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
    with ThreadPoolExecutor(max(1, len(workers) - 1), "distckpt-worker") as pool:
        shared.run(pool, workers[1:])
        shared.work(workers[0], itertools.chain(alone, shared))
    shared.require()


class Team:
    """Threads that do the parts of one step after the other together. A context manager.

    Args:
        n_threads: Their number, with the thread that calls `do`.
    """

    def __init__(self, n_threads: int) -> None:
        self._n_threads = n_threads
        self._pool = ThreadPoolExecutor(n_threads - 1, "distckpt-team") if n_threads > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def do(self, part: Callable[[int], object]) -> None:
        """Call `part(0)` to `part(n_threads - 1)`, each in any of the threads; return when all have returned.

        Raises:
            BaseException: The error of the first part that failed; those that had not begun are left out.
        """
        if self._pool is None:
            part(0)
            return
        shared = _Shared(range(self._n_threads))

        def work(numbers: Iterator[int]) -> None:
            for number in numbers:
                part(number)

        shared.run(self._pool, [work] * (self._n_threads - 1))
        shared.work(work, shared)
        shared.wait()
        shared.require()


class _Shared(Generic[T]):
    """An iterator that threads share; it ends when one of them fails."""

    def __init__(self, jobs: Iterable[T]) -> None:
        self._jobs = iter(jobs)
        self._failure: BaseException | None = None  # of the first worker that failed, until it is raised
        self._has_failed = False
        self._n_working = 0
        self._changed = threading.Condition()
        self._inference = torch.is_inference_mode_enabled()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            if self._has_failed:
                raise StopIteration
            return next(self._jobs)

    def run(self, pool: Executor, workers: Iterable[Callable[[Iterator[T]], object]]) -> None:
        """Run workers in the threads of a pool, as many as the system can start."""
        with suppress(RuntimeError):
            for worker in workers:
                pool.submit(self.work, worker, self)

    def work(self, worker: Callable[[Iterator[T]], object], jobs: Iterator[T]) -> None:
        """Run a worker in this thread. Raises nothing: `require` does."""
        with self._changed:
            self._n_working += 1
        error: BaseException | None = None
        try:
            with torch.inference_mode(self._inference), torch.no_grad():  # torch's modes are per thread
                worker(jobs)
        except BaseException as raised:
            error = raised
        with self._changed:
            if error is not None and not self._has_failed:
                self._failure, self._has_failed = error, True
            error = None  # it refers to this frame, which would keep it and all its objects
            self._n_working -= 1
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until no worker runs. One that begins later finds no job, once a worker has found none."""
        with self._changed:
            self._changed.wait_for(lambda: self._n_working == 0)

    def require(self) -> None:
        """Raise the error of the first worker that failed."""
        failure, self._failure = self._failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # see `work`


def one_at_a_time(progress: Progress | None) -> Progress | None:
    """A progress callback that several threads may call: it calls `progress` under a lock."""
    if progress is None:
        return None
    lock = threading.Lock()

    def notify(nbytes: int) -> None:
        with lock:
            progress(nbytes)

    return notify
