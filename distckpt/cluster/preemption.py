"""`PreemptionGuard`: stop all ranks at the same step, in time for a last save."""

from __future__ import annotations

import atexit
import math
import os
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

from distckpt.cluster.walltime import find_deadline, is_long_ago
from distckpt.coordination.coordinator import Coordinator
from distckpt.interval import require_seconds

#: Exit status of a job that has saved and wants to go on: Linux's number for "interrupted, should be restarted".
EXIT_CODE = 85
#: How many times as long as earlier saves the last one may take: other jobs stop and save at the same time.
_SAVE_FACTOR = 1.5
#: Assumed duration of a save until one has been measured, in seconds.
_UNMEASURED_SAVE = 30.0
#: Number of last steps whose durations count.
_STEPS = 20


class MeasuresSaves(Protocol):
    """An object that knows how long a save takes, such as a `CheckpointManager`."""

    @property
    def save_seconds(self) -> float | None:
        """Seconds from the call of a save until the file is durable; None before the first save."""


class PreemptionGuard:
    """Tells all ranks to stop at the same step, when a rank gets a signal or the time of the job runs out.

    The constructor installs signal handlers, which only set a flag. All ranks call `should_stop` between two steps; it
    combines the flags, so that a signal to one rank stops all of them. After a last save the program exits with
    `exit_code`, so that the launch script starts the job again.

    Rank 0 also watches the clock: it asks to stop when the time left before the deadline is less than a margin, which
    is the longest of the last steps plus 1.5 times the longest save. The manager measures the saves, or `saving()`.

    SIGUSR1 is left alone because NCCL uses it. Make the guard before the slow part of the start: until then a signal
    ends the process.

    Example:
        >>> guard = PreemptionGuard(manager=manager)
        >>> while checkpoint.step < steps:
        ...     train()
        ...     checkpoint.step += 1
        ...     stop = guard.should_stop()
        ...     manager.save(check_interval=not stop)
        ...     if stop:
        ...         break
        >>> sys.exit(guard.exit_code)
    """

    def __init__(
        self,
        comm: object | None = None,
        *,
        signals: Iterable[signal.Signals] = (signal.SIGTERM, signal.SIGUSR2),
        manager: MeasuresSaves | None = None,
        deadline: float | datetime | None = None,
        margin: float | None = None,
        timeout: float = 600.0,
    ) -> None:
        """Local. Must be called in the main thread, the only one that may set signal handlers.

        Args:
            comm: mpi4py communicator of the ranks that stop together; None for `MPI.COMM_WORLD`.
            signals: Signals that ask the job to stop.
            manager: Provides the durations of its saves; None counts only those within `saving()`.
            deadline: When the job must have ended: seconds since the epoch, or a datetime; None asks DISTCKPT_DEADLINE,
                then the scheduler (Slurm, PBS, LSF, Flux). Only that of rank 0 counts.
            margin: Seconds before the deadline at which to stop; None for the measured margin.
            timeout: Seconds that `should_stop` waits for the other ranks.

        Raises:
            TypeError: `comm` is not a communicator.
            ValueError: An option has a bad value, or this is not the main thread.
        """
        self._coordinator = Coordinator(comm)
        self._manager = manager
        self._deadline = None if deadline is None else _as_seconds(deadline)
        self._margin = None if margin is None else require_seconds("margin", margin)
        self._timeout = require_seconds("timeout", timeout)
        self._clock_read = False
        self._process = os.getpid()
        self._received: int | None = None
        self._reason = ""
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._step_start: float | None = None
        self._first_step = True
        self._saved_within_step = 0.0
        self._longest_save: float | None = None
        self._previous: dict[int, Any] = {}
        self._closed = False
        self._install(signals)
        atexit.register(self._at_exit)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Restore the previous signal handlers. Local."""
        atexit.unregister(self._at_exit)
        self._closed = True
        for number in self._previous:
            if signal.getsignal(number) == self._on_signal:
                self._give_back(number)

    # ---- the collective call ----

    def should_stop(self) -> bool:
        """Whether to save and exit; once True, always True. Collective over the communicator: call it at every step.

        Raises:
            RankTimeoutError: Some ranks did not come.
            CollectiveError: DISTCKPT_DEADLINE or the manager's `save_seconds` has a bad value.
        """
        if self._reason:
            return True
        self._end_step()
        with self._coordinator.uninterrupted():
            reason, failure = "", None
            try:
                reason = self._own_reason()
            except Exception as error:  # the other ranks must learn of it
                failure = error
            going_on = self._coordinator.arrive(
                "should_stop", 0, 1 if reason or failure is not None else 0, self._timeout
            )
            if not going_on:
                with self._coordinator.step("should_stop"):
                    if failure is not None:
                        raise failure
                reasons = self._coordinator.gather_all("should_stop", reason.encode())
                self._reason = _together([text.decode() for text in reasons])
            elif not self._clock_read:
                self._read_clock()
        self._step_start = time.monotonic()
        return bool(self._reason)

    @property
    def reason(self) -> str:
        """Why the job stops, such as "SIGUSR2 on rank 3"; empty until it does. The same on all ranks. Local."""
        return self._reason

    @property
    def exit_code(self) -> int:
        """Status for `sys.exit`: 85 after a stop, at which the launch scripts start the job again, else 0. Local."""
        return EXIT_CODE if self._reason else 0

    @property
    def margin(self) -> float:
        """Seconds before the deadline at which to stop, as measured so far. Local.

        Raises:
            ValueError: The manager's `save_seconds` is not a number of seconds.
        """
        if self._margin is not None:
            return self._margin
        saves = [self._longest_save, None if self._manager is None else self._manager.save_seconds]
        known = [require_seconds("save_seconds", seconds) for seconds in saves if seconds is not None]
        return max(self._steps, default=0.0) + _SAVE_FACTOR * max(known, default=_UNMEASURED_SAVE)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Context that measures its body as a save, not as part of the step. Local."""
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            self._saved_within_step += seconds
            self._longest_save = max(seconds, self._longest_save or 0.0)

    # ---- parts of the above ----

    def _install(self, signals: Iterable[signal.Signals]) -> None:
        try:
            for number in signals:
                previous = signal.signal(number, self._on_signal)
                self._previous.setdefault(number, previous)  # SIGIOT is SIGABRT: one signal may be listed twice
        except (ValueError, OSError, TypeError) as error:  # not the main thread, SIGKILL and its like, or no signals
            self.close()
            raise ValueError(
                f"signals: expected signals that can be handled, in the main thread. Got {error} "
                "(make the guard in the main thread, or pass signals=())."
            ) from error

    def _at_exit(self) -> None:
        """Ignore the signals from here on, except SIGTERM, which must be able to end an exit that hangs.

        Python resets its handlers before MPI is finalised. A repeated signal would then end the rank with an exit
        status other than its own.
        """
        for number in self._previous:
            if number != signal.SIGTERM and signal.getsignal(number) == self._on_signal:
                signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() == self._process and not self._closed:
            self._received = number
            return
        # Nobody calls `should_stop`. Either the guard is closed, and a handler that came later, such as that of another
        # guard, has given back this one; or this is a forked child, such as a worker of a data loader. Launchers send
        # the warning to the children of a rank, too, which needs them for its last step; but whoever sends SIGTERM,
        # such as `multiprocessing.Pool.terminate`, waits for the child to end.
        previous = self._previous[number]
        unhandled = previous is None or previous == signal.SIG_DFL
        if os.getpid() != self._process and unhandled and number != signal.SIGTERM:
            return
        self._give_back(number)
        os.kill(os.getpid(), number)

    def _give_back(self, number: int) -> None:
        """Restore the handler that was there before this guard."""
        handler = self._previous[number]
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _end_step(self) -> None:
        """Record the duration of the step, except of the first one: it compiles, opens files and fills caches."""
        if self._step_start is not None:
            if not self._first_step:
                self._steps.append(max(0.0, time.monotonic() - self._step_start - self._saved_within_step))
            self._first_step = False
        self._saved_within_step = 0.0

    def _own_reason(self) -> str:
        if self._received is not None:
            return signal.Signals(self._received).name
        if self._coordinator.rank == 0 and self._deadline is not None:
            left = self._deadline - time.time()
            if left < self.margin:
                return f"{left:.0f} s left of the job, {self.margin:.0f} s needed for a step and a save"
        return ""

    def _read_clock(self) -> None:
        """Find the deadline on rank 0, once all ranks have arrived, since the scheduler may be slow. Collective."""
        self._deadline = self._coordinator.on_root("find the end of the job", self._find_deadline, float | None)  # type: ignore[arg-type]  # msgspec takes unions
        self._clock_read = True

    def _find_deadline(self) -> float | None:
        """The deadline given, or else that of the environment. Rank 0 only: deadlines of other ranks do not count."""
        return find_deadline() if self._deadline is None else self._deadline


def _as_seconds(deadline: object) -> float:
    """A deadline as seconds since the epoch; infinity is never reached.

    Raises:
        ValueError: It is not a point in time.
    """
    if isinstance(deadline, datetime):
        return deadline.timestamp()
    number = isinstance(deadline, int | float) and not isinstance(deadline, bool) and not math.isnan(deadline)
    if number and not is_long_ago(deadline):  # type: ignore[arg-type]  # a number
        return float(deadline)  # type: ignore[arg-type]  # a number
    raise ValueError(
        "deadline: expected seconds since the epoch, a datetime, or None, such as time.time() + 3600 for an hour from "
        f"now. Got {deadline!r}."
    )


def _together(reasons: list[str]) -> str:
    """The distinct reasons of all ranks in one sentence, each with the lowest rank that has it."""
    first: Mapping[str, int] = {reason: rank for rank, reason in reversed(list(enumerate(reasons))) if reason}
    return "; ".join(f"{reason} on rank {rank}" for reason, rank in sorted(first.items(), key=lambda item: item[1]))
