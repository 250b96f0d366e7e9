"""Samples: the measured values of trials."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from distckpt.bench.runner import Meter, TrialT, extra_mib, interleave
from distckpt.bench.setting import Bench
from distckpt.bench.state import State


@dataclass(frozen=True, slots=True)
class Samples:
    """Measured values of one competitor in one case.

    Attributes:
        case: Name of the case.
        name: Name of the trial in the report.
        kind: `Trial.kind`.
        unit: Unit of the values: "s", "s lost" or "MiB".
        nbytes: Bytes of the state over all ranks.
        values: One value per round, from the rank with the largest.
    """

    case: str
    name: str
    kind: str
    unit: str
    nbytes: int
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the values."""
        return statistics.median(self.values)


def measure(
    bench: Bench, case: str, state: State, trials: Sequence[TrialT], meter: Meter[TrialT], unit: str = "s"
) -> list[Samples]:
    """Measure trials in interleaved rounds. Collective over the process group.

    Times are measured after one round that does not count; memory from the first round on, which also loads libraries.

    Args:
        bench: The setup that all cases share.
        case: Name of the case.
        state: The state that the trials save or restore, or another one of the same size.
        trials: The trials, with different names.
        meter: Runs a trial and returns the measured value.
        unit: Unit of the meter's values.

    Returns:
        The samples of each trial, the same on all ranks; without rivals that failed, which are in `bench.failed`.

    Raises:
        CollectiveError: A trial failed that is no rival's.
    """
    with _collections_of_new_objects_only():
        if meter is not extra_mib:
            interleave(trials, 1, meter, bench.failed)
        values = interleave(trials, bench.setup.rounds, meter, bench.failed)
    return [
        Samples(case, each.name, each.kind, unit, state.nbytes, tuple(values[each.name]))
        for each in trials
        if each.name in values
    ]


@contextmanager
def _collections_of_new_objects_only() -> Iterator[None]:
    """Keep the garbage collector, during the body, from visiting existing objects, such as those of competitors."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
