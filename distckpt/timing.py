"""How long the steps of a save or restore take: measured on each rank, compared on rank 0, known to all.

Each rank measures its own work. The time that it waits for others in an agreement belongs to no step, so that a slow
rank shows in its own times and not in those of the ranks that wait for it. Rank 0 gathers one number per step and rank
(`Coordinator.gather_rows`) right after an agreement that found no failure, and sends the result with a later broadcast.
The timing of a save is also stored in its file, and logged in one line.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import msgspec
import numpy as np

from distckpt.words import nbytes_in_words

#: Waiting for the last rank to come: its slowest rank is the one that the others wait for.
AGREE = "agree"
#: Steps of a save up to the writing of the data, in order; and the whole save but for the commit.
SAVE_STEPS = ("walk", "digest", AGREE, "merge", "plan", "create", "stage", "open", "exchange", "write")
DURABLE_SAVE_STEPS = (*SAVE_STEPS, "fsync")
#: Steps of a restore, in order.
RESTORE_STEPS = ("walk", AGREE, "open", "plan", "exchange", "read", "assign")

#: Gives rank 0 the rows of all ranks.
Gather = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any] | None]


class StepTiming(msgspec.Struct, frozen=True, array_like=True):
    """How long one step took, in seconds, over the ranks that did it.

    Attributes:
        min: On the fastest rank.
        median: In the middle; of an even number of ranks the upper one.
        max: On the slowest rank.
        slowest_rank: That rank. For "agree", in which ranks wait for the last one to come: the one that came last.
    """

    min: float
    median: float
    max: float
    slowest_rank: int


class Timing(msgspec.Struct, frozen=True, omit_defaults=True):
    """How long a save or restore took; the same on all ranks but for `own`.

    Steps of a save: "walk" the objects, "digest" what they hold, "agree": wait for the last rank to come; when the
    layout is new, "merge" those of all ranks and take in the "plan"; "create" the file, "stage": copy for the
    background, "open" the file, "exchange" narrow strips and write them, "write" with checksums, "fsync", "commit".
    Of a restore: "walk", "agree", "open" and check, "plan" what goes where, "exchange": read together with other
    ranks, "read" the rest, "assign". Waiting for other ranks counts in "agree" and "exchange" only; the collective
    open and close of parallel HDF5 count nowhere.

    Attributes:
        seconds: From the call to the end, on rank 0. In a file: until its manifest was written.
        steps: Step to its times over all ranks, in order. "merge", "create" and "commit" are work of rank 0 alone.
        own: Step to seconds on this rank; empty when it comes from a file.
    """

    seconds: float
    steps: dict[str, StepTiming]
    own: dict[str, float] = {}

    def in_words(self) -> str:
        """Each step and the seconds of its slowest rank.

        Of the steps that several ranks did, the longest names its slowest rank. If that is "agree", so does the next.
        """
        shared = sorted((step.max, name) for name, step in self.steps.items() if step.max > step.min)
        names = [name for _, name in reversed(shared)]
        named = names[: 2 if names[:1] == [AGREE] else 1]
        return ", ".join(_in_words(name, step, named=name in named) for name, step in self.steps.items())

    def of_file_in_words(self, nbytes: int) -> str:
        """One line about a save.

        Args:
            nbytes: Length of the file in bytes.
        """
        rate = nbytes_in_words(int(nbytes / max(self.seconds, 1e-6)))  # a program may stop its clock
        return f"{nbytes_in_words(nbytes)} in {self.seconds:.3f} s ({rate}/s): {self.in_words()}"


def _in_words(name: str, step: StepTiming, *, named: bool) -> str:
    which = "last" if name == AGREE else "slowest"
    return f"{name} {step.max:.3f}" + (f" ({which}: rank {step.slowest_rank})" if named else "")


class Timer:
    """Measures the steps of one save or restore on this rank. One thread at a time."""

    def __init__(self) -> None:
        """The save or restore begins. Local."""
        self._start = time.perf_counter()
        self._own: dict[str, float] = {}
        self._steps: dict[str, StepTiming] = {}  # rank 0 only

    def step(self, name: str) -> AbstractContextManager[None]:
        """Measure the body, which may be one of several parts of the step, whether it fails or not. Local."""
        return _Body(self._own, name)

    def collect(self, gather: Gather, names: Sequence[str]) -> None:
        """Tell rank 0 how long steps took here. One gather, after an agreement that no rank has failed.

        Args:
            gather: `Coordinator.gather_rows`.
            names: The steps, the same on all ranks; a rank need not have done all of them.
        """
        rows = gather(np.array([self._own.get(name, np.nan) for name in names]))
        if rows is not None:
            self._steps.update(compare(names, rows))

    def add_own(self, name: str) -> None:
        """Add a step that only rank 0 does. Rank 0 only."""
        seconds = _rounded(self._own[name])
        self._steps[name] = StepTiming(seconds, seconds, seconds, slowest_rank=0)

    def timing(self) -> Timing:
        """What is known so far. Rank 0 only."""
        return Timing(_rounded(time.perf_counter() - self._start), dict(self._steps))

    def on_this_rank(self, timing: Timing) -> Timing:
        """What rank 0 found, with the times of this rank. Local."""
        return msgspec.structs.replace(timing, own=dict(self._own))


class _Body(AbstractContextManager[None]):
    """Adds the time of its body to that of a step. Written out, for it is entered a dozen times in each save."""

    __slots__ = ("_name", "_seconds", "_start")

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds = seconds
        self._name = name
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_error: object) -> None:
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + time.perf_counter() - self._start


def compare(names: Iterable[str], rows: np.ndarray[Any, Any]) -> dict[str, StepTiming]:
    """The times of all ranks, step by step.

    Args:
        names: The steps.
        rows: Seconds, a row for each rank and a column for each step; NaN: the rank did not do it.

    Returns:
        Step to its times, without steps that no rank did.
    """
    found = {}
    for name, column in zip(names, rows.T.tolist(), strict=True):
        seconds = sorted([one for one in column if not math.isnan(one)])
        if seconds:
            least, median, most = seconds[0], seconds[len(seconds) // 2], seconds[-1]
            slowest = column.index(least if name == AGREE else most)
            found[name] = StepTiming(_rounded(least), _rounded(median), _rounded(most), slowest)
    return found


def _rounded(seconds: float) -> float:
    """To microseconds."""
    return round(seconds, 6)
