"""Schedules of a manager's saves: at intervals of steps or seconds, or as their cost allows."""

from __future__ import annotations

import operator
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from distckpt.interval import checkpoint_interval, require_seconds
from distckpt.retention import require_positive

#: A function that returns the step, a tensor that holds it, or the name of an attribute of the Checkpoint that does.
StepCounter = Callable[[], int] | torch.Tensor | str


@dataclass(frozen=True, slots=True)
class LastSave:
    """The checkpoint from which intervals count: the last one saved or restored.

    Attributes:
        step: Value of the step counter at that time; None without one.
        time: Time of the save or restore, in seconds on rank 0's clock; None before the first.
    """

    step: int | None = None
    time: float | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    """Intervals between saves. A save is due when one of them has passed; without intervals every call saves.

    Attributes:
        steps: Steps between two checkpoints.
        seconds: Seconds between two checkpoints.
    """

    steps: int | None
    seconds: float | None

    def __post_init__(self) -> None:
        """Reject bad values.

        Raises:
            ValueError: An interval is not a number above 0.
        """
        require_positive("checkpoint_interval", self.steps)
        require_positive("checkpoint_interval_seconds", self.seconds)

    def is_due(self, step: int | None, now: float, last: LastSave, *, check_interval: bool) -> bool:
        """Whether a save is due.

        Args:
            step: Value of the step counter; None without one.
            now: Present time, in seconds.
            last: The checkpoint from which the intervals count.
            check_interval: False saves at any time, but, with an interval, not twice at one step.
        """
        if self.steps is None and self.seconds is None:
            return True
        if step is not None and step == last.step:
            return False
        return not check_interval or self._steps_passed(step, last) or self._seconds_passed(now, last)

    def _steps_passed(self, step: int | None, last: LastSave) -> bool:
        if self.steps is None or step is None:
            return False
        # If the step is smaller, training continues from an older checkpoint, and the last one does not count.
        return last.step is None or not 0 <= step - last.step < self.steps

    def _seconds_passed(self, now: float, last: LastSave) -> bool:
        if self.seconds is None:
            return False
        return last.time is None or not 0 <= now - last.time < self.seconds  # the clock may have been set back


#: Number of the latest saves, and of the latest steps, that count: the first ones differ from later ones.
_SAVES, _STEPS = 5, 20


class SaveTimes:
    """Durations of the latest saves on this rank. Local."""

    def __init__(self) -> None:
        self._stalls: deque[float] = deque(maxlen=_SAVES)
        self._saves: deque[float] = deque(maxlen=_SAVES)

    def add(self, stall: float, save: float) -> None:
        """Add a save that succeeded.

        Args:
            stall: Seconds for which training stood still.
            save: Seconds from the call until the file was durable; the same for a synchronous save.
        """
        self._stalls.append(stall)
        self._saves.append(save)

    @contextmanager
    def synchronous(self) -> Iterator[None]:
        """Measure the body, a save; one that fails does not count."""
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        self.add(seconds, seconds)

    def background(self) -> BackgroundTiming:
        """Begin to measure a background save; called when the save is."""
        return BackgroundTiming(self)

    @property
    def stall(self) -> float | None:
        """The median of `stall`, in seconds; None before the first save."""
        stalls = list(self._stalls)  # the background thread may add one meanwhile
        return statistics.median(stalls) if stalls else None

    @property
    def longest_save(self) -> float | None:
        """The longest `save`, in seconds; None before the first one."""
        return max(list(self._saves), default=None)


class BackgroundTiming:
    """Measures one background save; one that fails does not count. Local; any thread may call `committed`."""

    def __init__(self, times: SaveTimes) -> None:
        self._times = times
        self._start = time.monotonic()
        self._stall: float | None = None

    def returned(self) -> None:
        """Record that the call has returned, so that training goes on."""
        self._stall = time.monotonic() - self._start

    def committed(self) -> None:
        """Record that the file is durable, which may be before the call has returned."""
        seconds = time.monotonic() - self._start
        self._times.add(seconds if self._stall is None else self._stall, seconds)


class AutoSchedule:
    """Saves at the interval that `checkpoint_interval` computes from the measured cost of a save. Rank 0 only.

    The first call saves, to measure the cost. From then on a save is due at the end of the step nearest to the best
    time, but never before the time that a save takes has passed, so that a background save has ended.
    """

    def __init__(self, mtbf: float | None, times: SaveTimes, other: Schedule) -> None:
        """Local.

        Args:
            mtbf: Mean time between two failures of the job, in seconds.
            times: Measured durations of saves.
            other: A further schedule, whose interval in seconds counts if it passes first.

        Raises:
            ValueError: `mtbf` is not a finite number above 0.
        """
        self._mtbf = require_seconds("mtbf", mtbf)
        self._times = times
        self._other = other
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._last_call: float | None = None

    def is_due(self, step: int | None, now: float, last: LastSave, *, check_interval: bool) -> bool:
        """See `Schedule.is_due`."""
        self._measure_step(now, last)
        if step is not None and step == last.step:
            return False
        other = self._other.seconds is not None and self._other.is_due(step, now, last, check_interval=True)
        return not check_interval or other or self._interval_passed(now, last)

    def interval(self) -> float | None:
        """Seconds of training between two saves; None until a save has been measured."""
        stall, save = self._times.stall, self._times.longest_save
        return None if stall is None or save is None else max(checkpoint_interval(stall, self._mtbf), save)

    def _interval_passed(self, now: float, last: LastSave) -> bool:
        interval = self.interval()
        if interval is None or last.time is None:
            return True
        step = statistics.median(self._steps) if self._steps else 0.0
        return not 0 <= now - last.time < interval - step / 2  # the clock may have been set back

    def _measure_step(self, now: float, last: LastSave) -> None:
        """Measure a step: the time between two calls without a save between them."""
        if self._last_call is not None and (last.time is None or last.time <= self._last_call):
            self._steps.append(max(0.0, now - self._last_call))
        self._last_call = now


def require_step_counter(counter: object) -> None:
    """Check that a step counter is one. A number is none: it would never change, and no save after the first be due.

    Raises:
        ValueError: It is not.
    """
    if counter is None or isinstance(counter, str | torch.Tensor) or callable(counter):
        return
    raise ValueError(
        f"step_counter: expected a function, a tensor, or the name of an attribute of the checkpoint such as 'step'. "
        f"Got {counter!r:.100}."
    )


def read_step(counter: StepCounter | None, owner: object) -> int | None:
    """The present step; None without a counter. Local.

    Raises:
        AttributeError: The owner has no attribute of that name.
        ValueError: The step is not an integer.
    """
    if counter is None:
        return None
    if isinstance(counter, str):
        return as_integer(f"step_counter={counter!r}", operator.attrgetter(counter)(owner))
    return as_integer("step_counter", counter() if callable(counter) else counter)


def as_integer(name: str, value: Any) -> int:
    """Convert a number, which may be a tensor, to an int.

    Raises:
        ValueError: The value is not an integer.
    """
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected an integer. Got {value!r:.100}.") from error
