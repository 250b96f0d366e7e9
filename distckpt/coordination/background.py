"""A background thread that goes on with a collective operation while the program does something else.

There is one thread per communicator, so that operations over it end in the order in which they began, the same on all
ranks. A task has a beginning and an end that are collective, and a local part between them. If any thread may call MPI
(THREAD_MULTIPLE), the thread does all of it, on a duplicate of the communicator that the main thread has made for it;
it is then said to speak. Otherwise the thread does the local part only: the main thread submits a task that needs no
beginning, and ends it in the next collective call.

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

#: The lowest priority, so that the thread uses only the core time that the program leaves.
_NICE = 19


class Task(Protocol):
    """Work for the background thread. Its methods raise nothing; the task keeps its error.

    Attributes:
        timeout: Seconds that the task may take to complete when the program exits.
    """

    timeout: float

    def begin(self, coordinator: Coordinator) -> None:
        """Do the part that all ranks must finish before any rank works. Called if the thread speaks. Collective."""

    def work(self) -> None:
        """Do the part that needs no other rank. Local."""

    def end(self, coordinator: Coordinator) -> None:
        """Agree with the other ranks, and commit. Collective, unless the task has failed on all ranks by now."""

    def end_together(self, timeout: float | None) -> bool:
        """Wait for the work, then end the task if it has not ended. Called if the thread does not speak. Collective.

        Args:
            timeout: Seconds to wait for the work; None for no limit.

        Returns:
            Whether the task has ended. The same on all ranks.
        """

    def complete(self, timeout: float) -> None:
        """Wait for the end of the task, or end it, from the main thread; give up after `timeout` seconds.

        Local if the thread speaks, else collective.
        """

    def report(self) -> None:
        """Log at exit a failure that nobody has asked for, or that the task was not completed. Local."""


class Background:
    """The background thread of one communicator.

    `background_of` makes it at the first use: it calls `start`, then `speak_alone` or `speak_over` if the thread may
    call MPI. The main thread calls `submit` for each task, and `finish` or `release` at the end.

    Attributes:
        speaks: Whether the thread begins and ends tasks, calling MPI. Otherwise the main thread ends them.
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
            RuntimeError: The system cannot start more threads.
        """
        self._thread.start()
        _register(self)

    def speak_alone(self) -> None:
        """Let the thread begin and end tasks of a communicator of one rank, which needs no MPI. Local."""
        self._coordinator = Coordinator.alone()
        self.speaks = True

    def speak_over(self, duplicate: MPI.Intracomm) -> None:
        """Let the thread begin and end tasks, over a communicator that nobody else uses. Local."""
        self._duplicate = duplicate
        self._collectives = PolledCollectives(duplicate)
        self._coordinator = Coordinator.over(Spoken(self._collectives))
        self.speaks = True

    def require_running(self) -> None:
        """Check that the thread still takes tasks. Local.

        Raises:
            CheckpointError: The program is exiting, or this is a forked process.
        """
        if self._finished or not self._thread.is_alive():
            raise CheckpointError(
                "the thread in the background has ended: the program exits, or this process was forked after a save in "
                "the background. Call save(), which needs no thread."
            )

    def require_in_this_process(self) -> None:
        """Check that the thread is in this process, before waiting for it. Local.

        Raises:
            CheckpointError: This process was forked from the one that has the thread.
        """
        if not self._thread.is_alive():
            raise CheckpointError(
                "this process was forked from the one that saves, which alone knows how the save ends. Ask there."
            )

    def submit(self, task: Task) -> None:
        """Queue a task. Local; raises nothing, since the other ranks have queued theirs."""
        self._tasks.append(task)
        self._queue.put(task)

    def up_to(self, task: Task) -> list[Task]:
        """A task and those before it whose results nobody has taken, in the order in which they end. Local."""
        before = list(self._tasks)
        return before[: before.index(task) + 1] if task in before else [task]

    def forget(self, task: Task) -> None:
        """Drop a task that has ended and whose result has been taken. Local; may be called again."""
        with suppress(ValueError):
            self._tasks.remove(task)

    def finish(self) -> None:
        """Complete all tasks, and end the thread. Local or collective, as `Task.complete`.

        Called when the program exits or the communicator is freed.
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
        """End the thread and free the duplicate, when the user frees the communicator. Collective over it."""
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
            del task  # it may hold a whole checkpoint, and the next one may come much later


def background_of(coordinator: Coordinator) -> Background:
    """The background thread of a coordinator's communicator. Collective at the first use, after the arrival.

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
    """Let the thread call MPI if all ranks may do so. Collective."""
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
    """Whether any thread may call MPI at any time (THREAD_MULTIPLE). Local."""
    from mpi4py import MPI

    return MPI.Query_thread() == MPI.THREAD_MULTIPLE


# ---- the end of the program --------------------------------------------------------------------------------------

#: All `Background`s with a thread, and the ids of the processes that made them: a forked process has no such threads.
_LIVING: list[Background] = []
_PROCESS: set[int] = set()


def _register(background: Background) -> None:
    _LIVING.append(background)
    if os.getpid() not in _PROCESS:
        _PROCESS.add(os.getpid())
        atexit.register(_finish_all)


def _finish_all() -> None:
    """Complete all tasks of this process. Python calls it at exit, before mpi4py finalises MPI."""
    if os.getpid() not in _PROCESS:
        return
    for background in tuple(_LIVING):
        background.finish()


@cache
def _finish_before_finalize() -> None:
    """Make MPI_Finalize complete all tasks first, whoever calls it.

    MPI_Finalize begins by deleting the attributes of COMM_SELF, while MPI can still be used.
    """
    from mpi4py import MPI

    keyval = MPI.Comm.Create_keyval(delete_fn=_before_finalize)
    MPI.COMM_SELF.Set_attr(keyval, True)


def _before_finalize(_comm: MPI.Comm, _key: int, _value: object) -> None:
    _finish_all()
