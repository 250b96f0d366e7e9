"""Work of one rank in several threads."""

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

#: More threads of one rank are no faster, on any file system that we know of.
MAX_THREADS = 8

#: Bytes from which on a job is for any thread. To read a small one is mostly Python: threads that take turns with such
#: work are slower than one alone.
LARGE_NBYTES = 1 << 20

#: Several threads take longer steps than one: between two of them they wait for each other's Python. In bytes.
SHARED_STEP_NBYTES = 1 << 20

T = TypeVar("T")


def threads_of_rank(ranks_on_node: int) -> int:
    """How many threads may read on each rank of a node."""
    return min(cores_of_rank(ranks_on_node), MAX_THREADS)


def share_out(alone: Iterable[T], jobs: Iterable[T], workers: Sequence[Callable[[Iterator[T]], object]]) -> None:
    """Let workers take jobs, one after the other, until there are none or a worker fails. Local.

    Args:
        alone: Jobs for the first worker, before all others: those below `LARGE_NBYTES`.
        jobs: The others, in the order in which they begin.
        workers: One per thread; each is called once, with an iterator over the jobs that it is to do. The first one is
            called in this thread. Where the system has no more threads, the others are not called.

    Raises:
        BaseException: What the first worker that failed has raised.
    """
    shared = _Shared(jobs)
    inference = torch.is_inference_mode_enabled()

    def run(worker: Callable[[Iterator[T]], object], jobs: Iterator[T]) -> None:
        try:
            with torch.inference_mode(inference), torch.no_grad():  # each thread has modes of its own
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
        failure: Why the first one failed.
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
    """The same, for several threads to call."""
    if progress is None:
        return None
    lock = threading.Lock()

    def notify(nbytes: int) -> None:
        with lock:
            progress(nbytes)

    return notify
