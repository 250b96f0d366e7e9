"""When a manager saves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distckpt.schedule import LastSave, Schedule, as_integer, read_step

NEVER = LastSave()


@pytest.mark.parametrize(
    ("schedule", "step", "now", "last", "due"),
    [
        (Schedule(None, None), None, 0.0, NEVER, True),
        (Schedule(None, None), 5, 0.0, LastSave(5, 0.0), True),
        (Schedule(10, None), 0, 0.0, NEVER, True),
        (Schedule(10, None), 9, 0.0, LastSave(0, 0.0), False),
        (Schedule(10, None), 10, 0.0, LastSave(0, 0.0), True),
        (Schedule(10, None), 3, 0.0, LastSave(5, 0.0), True),
        (Schedule(None, 60.0), None, 0.0, NEVER, True),
        (Schedule(None, 60.0), None, 59.0, LastSave(None, 0.0), False),
        (Schedule(None, 60.0), None, 60.0, LastSave(None, 0.0), True),
        (Schedule(None, 60.0), None, -1.0, LastSave(None, 0.0), True),
        (Schedule(None, 60.0), 7, 90.0, LastSave(7, 0.0), False),
        (Schedule(10, 60.0), 5, 59.0, LastSave(0, 0.0), False),
        (Schedule(10, 60.0), 10, 59.0, LastSave(0, 0.0), True),
        (Schedule(10, 60.0), 5, 60.0, LastSave(0, 0.0), True),
    ],
)
def test_is_due(schedule: Schedule, step: int | None, now: float, last: LastSave, due: bool) -> None:
    assert schedule.is_due(step, now, last, check_interval=True) == due


def test_forced_but_not_twice_at_one_step() -> None:
    assert Schedule(10, None).is_due(1, 0.0, LastSave(0, 0.0), check_interval=False)
    assert not Schedule(10, None).is_due(0, 0.0, LastSave(0, 0.0), check_interval=False)


@pytest.mark.parametrize(("steps", "seconds"), [(0, None), (-1, None), (None, 0), (None, "9"), (True, None)])
def test_bad_intervals(steps: Any, seconds: Any) -> None:
    with pytest.raises(ValueError, match=r"checkpoint_interval(_seconds)?: expected a number > 0"):
        Schedule(steps, seconds)


OWNER = SimpleNamespace(step=3, loader=SimpleNamespace(batch=np.int64(5)), name="x")


@pytest.mark.parametrize(
    ("counter", "step"),
    [
        (None, None),
        ("step", 3),
        ("loader.batch", 5),
        (torch.tensor(7), 7),
        (lambda: 9, 9),
        (lambda: torch.tensor(2), 2),
    ],
)
def test_read_step(counter: Any, step: int | None) -> None:
    assert read_step(counter, OWNER) == step


@pytest.mark.parametrize("counter", ["name", torch.tensor(1.5), torch.ones(2, dtype=torch.int64), lambda: None])
def test_steps_that_are_no_integers(counter: Any) -> None:
    with pytest.raises(ValueError, match=r"step_counter.*: expected an integer"):
        read_step(counter, OWNER)


def test_a_counter_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="epoch"):
        read_step("epoch", OWNER)


def test_as_integer() -> None:
    assert as_integer("n", torch.tensor(4, dtype=torch.int16)) == 4
    with pytest.raises(ValueError, match=r"n: expected an integer\. Got 1\.0"):
        as_integer("n", 1.0)
