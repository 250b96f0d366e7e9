"""When a manager saves."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distckpt.cluster import checkpoint_interval
from distckpt.schedule import AutoSchedule, LastSave, SaveTimes, Schedule, as_integer, read_step

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


def saves_of(schedule: AutoSchedule, times: SaveTimes, *, step: float, save: float, steps: int) -> list[int]:
    """The steps at which a training saves; a step and a save take so many seconds."""
    now, last, saved = 0.0, LastSave(), []
    for number in range(1, steps + 1):
        now += step
        if schedule.is_due(number, now, last, check_interval=True):
            now += save
            times.add(save, save)
            last = LastSave(number, now)
            saved.append(number)
    return saved


@pytest.mark.parametrize(("step", "save"), [(1.0, 2.0), (7.0, 2.0), (0.1, 0.02), (100.0, 2.0)])
def test_auto_saves_at_the_steps_nearest_to_the_best_interval(step: float, save: float) -> None:
    times = SaveTimes()
    schedule = AutoSchedule(3600.0, times, Schedule(None, None))
    assert schedule.interval() is None
    saved = saves_of(schedule, times, step=step, save=save, steps=2000)
    assert saved[0] == 1, "the first call, to measure"
    best = checkpoint_interval(save, 3600.0)
    assert schedule.interval() == best
    gaps = {later - earlier for earlier, later in itertools.pairwise(saved[1:])}
    assert gaps == {max(1, round(best / step))}


def test_auto_waits_for_the_save_in_the_background() -> None:
    times = SaveTimes()
    schedule = AutoSchedule(3600.0, times, Schedule(None, None))
    times.add(stall=0.01, save=100.0)
    assert schedule.interval() == 100.0
    assert not schedule.is_due(5, 99.0, LastSave(1, 0.0), check_interval=True)
    assert schedule.is_due(5, 100.0, LastSave(1, 0.0), check_interval=True)


def test_auto_with_another_interval_forced_twice_and_with_the_clock_set_back() -> None:
    times = SaveTimes()
    times.add(1.0, 1.0)
    schedule = AutoSchedule(1e6, times, Schedule(None, 10.0))
    assert not schedule.is_due(2, 9.0, LastSave(1, 0.0), check_interval=True)
    assert schedule.is_due(2, 10.0, LastSave(1, 0.0), check_interval=True)
    assert schedule.is_due(2, 1.0, LastSave(1, 0.0), check_interval=False)
    assert not schedule.is_due(1, 1.0, LastSave(1, 0.0), check_interval=False)
    assert schedule.is_due(2, -5.0, LastSave(1, 0.0), check_interval=True)


def test_times_are_those_of_the_last_saves_that_succeeded() -> None:
    times = SaveTimes()
    assert (times.stall, times.longest_save) == (None, None)
    with pytest.raises(OSError, match="full"), times.synchronous():
        raise OSError("full")
    assert times.longest_save is None
    times.add(9.0, 99.0)
    for seconds in (1.0, 1.0, 2.0, 1.0, 1.0):
        times.add(seconds, 2 * seconds)
    assert (times.stall, times.longest_save) == (1.0, 4.0)


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


def test_a_save_in_the_background_stalls_until_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 100.5, 103.0])
    monkeypatch.setattr("distckpt.schedule.time.monotonic", lambda: next(clock))
    times = SaveTimes()
    timing = times.background()
    timing.returned()
    assert times.stall is None  # not durable yet
    timing.committed()
    assert (times.stall, times.longest_save) == (0.5, 3.0)


def test_a_save_that_is_committed_before_its_call_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 101.0, 102.0])
    monkeypatch.setattr("distckpt.schedule.time.monotonic", lambda: next(clock))
    times = SaveTimes()
    timing = times.background()
    timing.committed()
    timing.returned()
    assert (times.stall, times.longest_save) == (1.0, 1.0)
