"""When a manager saves: at intervals of steps or seconds."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from distckpt.retention import require_positive

#: Called for the step, or holds it, or names an attribute of the Checkpoint that does.
StepCounter = Callable[[], int] | torch.Tensor | str


@dataclass(frozen=True, slots=True)
class LastSave:
    """The checkpoint from which intervals count: the last one saved or restored.

    Attributes:
        step: Of the step counter then; None before there was one.
        time: When it was, in seconds on rank 0's clock; None before there was one.
    """

    step: int | None = None
    time: float | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    """At least one of the intervals must have passed; without any every call saves.

    Attributes:
        steps: Steps between two checkpoints.
        seconds: Seconds between two checkpoints.
    """

    steps: int | None
    seconds: float | None

    def __post_init__(self) -> None:
        """Reject bad values.

        Raises:
            ValueError: An interval is not above 0.
        """
        require_positive("checkpoint_interval", self.steps)
        require_positive("checkpoint_interval_seconds", self.seconds)

    def is_due(self, step: int | None, now: float, last: LastSave, *, check_interval: bool) -> bool:
        """Whether to save.

        Args:
            step: Of the step counter; None without one.
            now: In seconds.
            last: Where the intervals begin.
            check_interval: False saves at any time, but not twice at one step.
        """
        if self.steps is None and self.seconds is None:
            return True
        if step is not None and step == last.step:
            return False
        return not check_interval or self._steps_passed(step, last) or self._seconds_passed(now, last)

    def _steps_passed(self, step: int | None, last: LastSave) -> bool:
        if self.steps is None or step is None:
            return False
        # A smaller step: training continues from an older checkpoint, and the last one says nothing.
        return last.step is None or not 0 <= step - last.step < self.steps

    def _seconds_passed(self, now: float, last: LastSave) -> bool:
        if self.seconds is None:
            return False
        return last.time is None or not 0 <= now - last.time < self.seconds  # the clock may have been set back


def read_step(counter: StepCounter | None, owner: object) -> int | None:
    """The present step; None without a counter.

    Raises:
        AttributeError: The owner has no attribute of that name.
        ValueError: The step is no integer.
    """
    if counter is None:
        return None
    if isinstance(counter, str):
        return as_integer(f"step_counter={counter!r}", operator.attrgetter(counter)(owner))
    return as_integer("step_counter", counter() if callable(counter) else counter)


def as_integer(name: str, value: Any) -> int:
    """A number that may come as a tensor.

    Raises:
        ValueError: It is no integer.
    """
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected an integer. Got {value!r:.100}.") from error
