"""A thread that goes on with a collective operation while the program does something else.

There is one thread per communicator, so that operations over it end in the order in which they began, the same on all
ranks. A task has a beginning and an end that are collective, and between them a local part. Where any thread may call
MPI (THREAD_MULTIPLE), the thread does all of it, on a duplicate of the communicator that the main thread has made for
it; it is then said to speak. Elsewhere the thread does the local part only: the main thread submits a task that needs
no beginning, and ends it in the next collective call.

    with THREAD_MULTIPLE     main thread    submit
                             this thread          begin --> local part --> end
    without                  main thread    submit -----------------------> end, in the next call
                             this thread          local part

When the program exits, or calls MPI_Finalize, tasks are completed first, within their timeout.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Protocol

from distckpt.coordination.coordinator import Coordinator
from distckpt.coordination.polled import PolledCollectives
from distckpt.coordination.session import Alone, Session, Spoken
from distckpt.errors import CheckpointError

if TYPE_CHECKING:
    from mpi4py import MPI

#: The lowest priority: the thread gets what the program leaves of the cores.
_NICE = 19


class Task(Protocol):
    """What is to be done in the background. Its methods raise nothing; what fails is kept in the task.

    Attributes:
        timeout: Seconds that it may take to complete when the program exits.
    """

    timeout: float

    def begin(self, coordinator: Coordinator) -> None:
        """Do what all ranks must have finished before any rank works. Called if the thread speaks. Collective."""

    def work(self) -> None:
        """The part that needs no other rank. Local."""

    def end(self, coordinator: Coordinator) -> None:
        """Agree with the other ranks, and commit. Collective, unless the task has failed on all ranks by now."""

    def end_together(self, timeout: float | None) -> bool:
        """Wait for the work, then end the task, unless it has ended. Called if the thread does not speak. Collective.

        Args:
            timeout: Seconds to wait for the work; None for no limit.

        Returns:
            Whether it has ended. The same on all ranks.
        """

    def complete(self, timeout: float) -> None:
        """Wait for the end, or bring it about, from the main thread; give up after the timeout, in seconds.

        Local where the thread speaks to the other ranks, else collective.
        """

    def report(self) -> None:
        """The program exits: log a failure that nobody has asked for, or that the task was not completed. Local."""


class Background:
    """The thread of one communicator.

    Attributes:
        speaks: The thread calls MPI: it begins and ends tasks. Otherwise the main thread ends them.
    """

    def __init__(self) -> None:
        self.speaks = False
        self._coordinator: Coordinator | None = None
        self._collectives: PolledCollectives | None = None
        self._duplicate: MPI.Intracomm | None = None
        self._queue: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._tasks: list[Task] = []
        self._finished = False
        self._thread = threading.Thread(target=self._run, name="distckpt-background", daemon=True)

    def start(self) -> None:
        """Start the thread. Local.

        Raises:
            RuntimeError: The system has no more threads.
        """
        self._thread.start()
        _register(self)

    def speak_alone(self) -> None:
        """Let the thread begin and end tasks of a communicator of one rank, which needs no MPI."""
        self._coordinator = Coordinator.alone()
        self.speaks = True

    def speak_over(self, duplicate: MPI.Intracomm) -> None:
        """Let the thread begin and end tasks, over a communicator that nobody else uses."""
        self._duplicate = duplicate
        self._collectives = PolledCollectives(duplicate)
        self._coordinator = Coordinator.over(Spoken(self._collectives))
        self.speaks = True

    def require_running(self) -> None:
        """Check that the thread still takes tasks. Local.

        Raises:
            CheckpointError: The program exits, or this is a forked process.
        """
        if self._finished or not self._thread.is_alive():
            raise CheckpointError(
                "the thread in the background has ended: the program exits, or this process was forked after a save in "
                "the background. Call save(), which needs no thread."
            )

    def require_in_this_process(self) -> None:
        """Check that the thread is in this process, before waiting for it. Local.

        Raises:
            CheckpointError: This process was forked from the one that has it.
        """
        if not self._thread.is_alive():
            raise CheckpointError(
                "this process was forked from the one that saves, which alone knows how the save ends. Ask there."
            )

    def submit(self, task: Task) -> None:
        """Take a task. Local; raises nothing, for the other ranks take theirs."""
        self._tasks.append(task)
        self._queue.put(task)

    def up_to(self, task: Task) -> list[Task]:
        """A task and those before it whose results nobody has, in the order in which they end. Local."""
        before = list(self._tasks)
        return before[: before.index(task) + 1] if task in before else [task]

    def forget(self, task: Task) -> None:
        """Drop a task that has ended and whose result somebody has. Local; may be called again."""
        with suppress(ValueError):
            self._tasks.remove(task)

    def finish(self) -> None:
        """Complete what is in flight, and end the thread. The program exits, or the communicator is freed. Local or
        collective, as `Task.complete`.
        """
        start = time.monotonic()
        self._finished = True
        for task in tuple(self._tasks):
            task.complete(max(0.0, start + task.timeout - time.monotonic()))
            task.report()
        self._tasks.clear()
        self._queue.put(None)
        if self._collectives is not None:
            self._collectives.close()
        if self._thread.is_alive():
            self._thread.join(timeout=1.0)
        with suppress(ValueError):
            _LIVING.remove(self)

    def release(self) -> None:
        """The user frees the communicator. Collective over it."""
        self.finish()
        if self._duplicate is not None and not self._thread.is_alive():
            self._duplicate.Free()

    def _run(self) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while (task := self._queue.get()) is not None:
            if self._coordinator is not None:
                task.begin(self._coordinator)
            task.work()
            if self._coordinator is not None:
                task.end(self._coordinator)
            del task  # it may hold a whole checkpoint; the next one may come late


def background_of(coordinator: Coordinator) -> Background:
    """The thread of a coordinator's communicator. Collective at the first use, after all ranks have arrived.

    Raises:
        CollectiveError: A rank cannot start a thread, or MPI has no communicators left.
    """
    session = coordinator.session
    if session.background is None:
        background = Background()
        try:
            with coordinator.step("start a thread"):
                background.start()
            _let_speak(background, coordinator, session)
        except BaseException:
            background.finish()
            raise
        session.background = background
    found: Background = session.background
    return found


def _let_speak(background: Background, coordinator: Coordinator, session: Session | Alone | Spoken) -> None:
    """Let the thread speak to the other ranks where that is allowed on all of them. Collective."""
    if session.size == 1:
        background.speak_alone()
    elif isinstance(session, Session):
        _finish_before_finalize()
        if not coordinator.any_set(not threads_may_speak()):
            _give_duplicate(background, coordinator, session)


def _give_duplicate(background: Background, coordinator: Coordinator, session: Session) -> None:
    error: Exception | None = None
    try:
        background.speak_over(session.duplicate_again("distckpt background"))
    except Exception as caught:
        error = caught
    with coordinator.step("duplicate the communicator"):
        if error is not None:
            raise error


def threads_may_speak() -> bool:
    """Whether MPI takes calls from any thread at any time. Local."""
    from mpi4py import MPI

    return MPI.Query_thread() == MPI.THREAD_MULTIPLE


# ---- the end of the program --------------------------------------------------------------------------------------

#: All that have a thread; and the processes that they were made in: a forked process has none of the threads.
_LIVING: list[Background] = []
_PROCESS: set[int] = set()


def _register(background: Background) -> None:
    _LIVING.append(background)
    if os.getpid() not in _PROCESS:
        _PROCESS.add(os.getpid())
        atexit.register(_finish_all)


def _finish_all() -> None:
    """Complete everything that is in flight in this process. Python calls it before mpi4py finalises MPI."""
    if os.getpid() not in _PROCESS:
        return
    for background in tuple(_LIVING):
        background.finish()


@cache
def _finish_before_finalize() -> None:
    """Complete everything before MPI_Finalize, whoever calls it.

    MPI_Finalize first deletes the attributes of COMM_SELF, while MPI can still be used.
    """
    from mpi4py import MPI

    keyval = MPI.Comm.Create_keyval(delete_fn=_before_finalize)
    MPI.COMM_SELF.Set_attr(keyval, True)


def _before_finalize(_comm: MPI.Comm, _key: int, _value: object) -> None:
    _finish_all()
